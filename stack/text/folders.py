"""Text encoders and their tokenizers as folders that transformers loads.

Files are copied where they are transformers' already: a model that it loads and saves again has other names of tensors,
which older readers do not find. The text tower of an open_clip folder is renamed by a table.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from stack.config import UserError
from stack.files import copy_model
from stack.text import tokenizer
from stack.text.encoders import CLIP_TOKENS, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, PAD_IDS, write_clip_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "added_tokens.json")
_TOKENIZER_CLASSES = {
    "CLIPTokenizer": "CLIPTokenizer",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "T5Tokenizer": "T5TokenizerFast",
    "T5TokenizerFast": "T5TokenizerFast",
}
"""Of tokenizer_config.json → as published pipelines name it. Any other is loaded from tokenizer.json as it stands."""


def write_encoder(name: str, source: Path, out: Path) -> None:
    """The encoder `name` of the folder `source`, as the folder `out`.

    Raises UserError where it is open_clip's and transformers' CLIP cannot hold it.
    """
    if name != "t5" and (source / OPEN_CLIP_CONFIG).is_file():
        _convert(name, source, out)
    else:
        copy_model(source, out, "model")


def write_tokenizer(name: str, source: Path, out: Path) -> str:
    """The tokenizer of the encoder `name`, which pads as that encoder was trained; the class that loads it."""
    out.mkdir(parents=True)
    if not (source / "tokenizer.json").is_file():  # T5 always has one
        write_clip_tokenizer(out, PAD_IDS[name])
        return "CLIPTokenizer"
    for file in _TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, out / file)
    described = source / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast" if name == "t5" else "CLIPTokenizer")
    settings["pad_token"] = pad = tokenizer.load(source).id_to_token(PAD_IDS[name])
    special = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    if pad not in {token["content"] for token in special}:
        settings["split_special_tokens"] = True  # or what only now becomes special would be cut out of prompts
    if name != "t5":
        settings["model_max_length"] = CLIP_TOKENS
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return _TOKENIZER_CLASSES.get(settings["tokenizer_class"], "PreTrainedTokenizerFast")


# open_clip's names of the text tower, and transformers'.
_OUTER = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}
_BESIDE = ("visual.", "logit_scale", "logit_bias")
# Of open_clip's text_cfg: sizes, and what is said of the tokenizer. Any other key is of another architecture.
_SIZES = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_TOKENIZING = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}


def _convert(name: str, source: Path, out: Path) -> None:
    """An open_clip folder's text tower as a CLIPTextModelWithProjection."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = json.loads((source / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    text, where = model["text_cfg"], f"text.{name}: {source}"
    if odd := sorted(set(text) - _SIZES - _TOKENIZING):
        raise UserError(f"{where}: transformers' CLIP has no place for {', '.join(odd)} of its text_cfg")
    with safe_open(source / OPEN_CLIP_WEIGHTS, framework="pt") as file:
        names = [key for key in file.keys() if not key.startswith(_BESIDE)]  # noqa: SIM118 (not a dictionary)
        weights = dict(_renamed(names, file.get_tensor, where))
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    vocabulary, width = weights["text_model.embeddings.token_embedding.weight"].shape
    config = {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.bias"]),
        "projection_dim": len(weights["text_projection.weight"]),
        "num_hidden_layers": sum(key.endswith("mlp.fc1.bias") for key in weights),
        "num_attention_heads": text.get("heads", 8),  # open_clip's default
        "max_position_embeddings": len(weights["text_model.embeddings.position_embedding.weight"]),
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        # What is pooled is the first token of this id; under 2, which published configurations have, that of the
        # highest id: the same one, as EOT ends the vocabulary.
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
        "pad_token_id": PAD_IDS[name],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _renamed(names: list[str], take: Callable[[str], Tensor], where: str) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        own = name.removeprefix("text.")  # the tower of a CustomTextCLIP
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", own)
        if own == "text_projection":
            yield "text_projection.weight", take(name).T.contiguous()
        elif own in _OUTER:
            yield f"text_model.{_OUTER[own]}", take(name)
        elif layer and layer[2] in _LAYER:
            parts = _LAYER[layer[2]]
            for part, tensor in zip(parts, take(name).chunk(len(parts)), strict=True):
                yield f"text_model.encoder.layers.{layer[1]}.{part}.{layer[3]}", tensor.clone()
        else:
            raise UserError(f"{where}: transformers' CLIP has no place for {name}")
