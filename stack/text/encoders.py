"""Frozen T5 and CLIP text encoders behind one interface: captions in, one `EncodedText` each out.

The only module that imports transformers and open_clip. CLIP gives the hidden states of the second to last layer
without the final LayerNorm, and the EOT state after the final LayerNorm, projected (SD3, arXiv 2403.03206) or as it is
(FLUX.1).

Shape suffixes: B batch · L text tokens · D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor, nn

from stack.config import Config, Location, UserError, refusal
from stack.files import probe
from stack.text import clip_tokenizer, tokenizer
from stack.text.clean import clean
from stack.text.conditioning import EncodedText, Pad

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

NAMES = ("t5", "clip_l", "clip_g")
CLIP_TOKENS = 77

PAD_IDS = {"t5": 0, "clip_l": 49407, "clip_g": 0}  # as the published models were trained
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"


class TextConfig(Config):
    """Which encoders (a local folder or a hub id; None: absent), and in which form captions are kept.

    pad: trim  the caption's true tokens; T5 sees its attention mask, so nothing is lost by trimming
         full  `t5_max_tokens` and 77 tokens, T5 without a mask, as SD3 and FLUX were trained
    """

    t5: Location | None = None
    clip_l: Location | None = None
    clip_g: Location | None = None
    t5_max_tokens: int = pydantic.Field(default=77, ge=1)
    clip_tokens: bool = True
    """Whether CLIP's tokens stand in the context beside T5's, as in SD3. Without them CLIP gives the pooled vector
    alone, as in FLUX: half the text tokens, which is a good part of a step where images are small."""
    clip_projection: bool = True
    """Whether the pooled vector has gone through CLIP's projection, as in SD3; FLUX takes the EOT state before it."""
    pad: Pad = "trim"
    batch_size: int = pydantic.Field(default=64, ge=1)

    @property
    def form(self) -> dict[str, Any]:
        """All that decides, beside the encoders, what is kept of a caption."""
        return {key: getattr(self, key) for key in ("pad", "t5_max_tokens", "clip_tokens", "clip_projection")}

    @pydantic.model_validator(mode="after")
    def _needs_a_clip(self) -> TextConfig:
        if self.clip_l is None and self.clip_g is None:
            raise ValueError("name clip_l or clip_g: the pooled vector that modulates the model comes from them")
        if self.t5 is None and not self.clip_tokens:
            raise ValueError("clip_tokens=false without t5 leaves no tokens for the context: name t5")
        return self


Forward = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]  # ids_BL, length_B, masked → hidden, pooled


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Tokenizer
    forward: Forward
    dim: int
    pad_id: int
    max_tokens: int


class TextEncoders:
    """The encoders of `config`, frozen, on `device` in `dtype`.

    dims: channels by encoder, of those that are present.

    Raises UserError naming the key for a folder or hub id that is missing, has no weights, or not all of them, and
    where both CLIPs' tokens are to be joined and their tokenizers are different ones.
    """

    def __init__(
        self, config: TextConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):  # the libraries draw weights before they load them
            self._encoders = {
                name: _load(name, folder, config, self.device, dtype) for name, folder in folders(config).items()
            }
        self._refuse_different_clips()
        self.dims = {name: encoder.dim for name, encoder in self._encoders.items()}
        self.max_tokens = {name: encoder.max_tokens for name, encoder in self._encoders.items()}

    def _refuse_different_clips(self) -> None:
        both = [self._encoders[name].tokenizer for name in ("clip_l", "clip_g") if name in self._encoders]
        joined = self.config.clip_tokens and self.config.pad == "trim" and len(both) == 2
        if joined and not clip_tokenizer.same_table(*both):
            raise UserError(
                "text.clip_l and text.clip_g have different tokenizers, so their tokens cannot be joined one by one: "
                "name CLIPs with one tokenizer, leave one out, or set text.clip_tokens=false"
            )

    def encode(self, captions: Sequence[str]) -> list[EncodedText]:
        """Encode `captions`, in the given order; CPU tensors in the encoders' dtype, each with its own memory.

        Each encoder reads the caption as `stack.text.clean.clean` leaves it, and of a long one its first tokens.
        """
        captions = [clean(caption) for caption in captions]
        tokens = {
            name: [encoder.tokenizer.encode(text) for text in captions] for name, encoder in self._encoders.items()
        }
        encoded = {
            name: self._run(encoder, [part.ids for part in tokens[name]]) for name, encoder in self._encoders.items()
        }
        absent: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(captions)
        results = []
        for row, (t5, *clips) in enumerate(zip(*(encoded.get(name, absent) for name in NAMES), strict=True)):
            pooled = [vector for _, vector in clips if vector is not None]
            clip_l, clip_g = (
                hidden if hidden is None or self.config.clip_tokens else hidden[:0].clone() for hidden, _ in clips
            )
            beyond = {name: _num_beyond(parts[row]) for name, parts in tokens.items() if parts[row].overflowing}
            cut = {name: self.max_tokens[name] + count for name, count in beyond.items()}
            results.append(EncodedText(t5[0], clip_l, clip_g, torch.cat(pooled) if pooled else torch.empty(0), cut))
        return results

    def _run(self, encoder: _Encoder, ids: Sequence[list[int]]) -> list[tuple[Tensor | None, Tensor | None]]:
        full = self.config.pad == "full"
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        results: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(ids)
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            length_B = torch.tensor([len(ids[index]) for index in chosen])
            num_tokens = encoder.max_tokens if full else int(length_B.max())
            ids_BL = torch.full((len(chosen), num_tokens), encoder.pad_id)
            for row, index in enumerate(chosen):
                ids_BL[row, : len(ids[index])] = torch.tensor(ids[index])
            with torch.inference_mode():
                hidden_BLD, pooled_BD = encoder.forward(ids_BL.to(self.device), length_B.to(self.device), not full)
            hidden_BLD = hidden_BLD.cpu()
            pooled_BD = None if pooled_BD is None else pooled_BD.cpu()
            for row, index in enumerate(chosen):
                kept = hidden_BLD[row] if full else hidden_BLD[row, : length_B[row]]
                # Cloned outside inference mode: an ordinary tensor that doesn't hold its whole batch in memory.
                results[index] = kept.clone(), None if pooled_BD is None else pooled_BD[row].clone()
        return results


def _num_beyond(tokens: Encoding) -> int:
    """How many tokens of the text were cut off."""
    return sum(part.special_tokens_mask.count(0) for part in tokens.overflowing)


def fingerprints(config: TextConfig) -> dict[str, str]:
    """sha256 by encoder over the bytes of its configuration, weights and tokenizer. Loads no weights."""
    return {name: _fingerprint(name, folder) for name, folder in folders(config).items()}


class ClipScore:
    """100·cos(image, caption), at least 0, of each pair (Hessel et al., arXiv 2104.08718, in torchmetrics' scale).

    folder: open_clip_config.json and open_clip_model.safetensors of a whole CLIP. Nothing is fetched.
    Raises UserError where they are missing or do not fit.
    """

    def __init__(self, folder: Path, device: torch.device):
        import open_clip
        from safetensors import SafetensorError

        for name in (OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"clip: {folder} has no {name}; expected a CLIP as open_clip saves it")
        try:
            if (
                "hf_model_name"
                in json.loads((folder / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
            ):
                raise ValueError("its text tower is described on the hub: name a CLIP with open_clip's own")
            with torch.random.fork_rng(devices=[]):
                model, self._transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
            self._tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
            if isinstance(self._tokenize, open_clip.SimpleTokenizer):
                clip_tokenizer.speed_up(self._tokenize)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            message = f"clip: {folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
            raise refusal(error, message) from None
        self._model: Any = model.requires_grad_(False).eval().to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        """images: uint8 [H, W, 3]."""
        image_BCHW = torch.stack([self._transform(Image.fromarray(image)) for image in images])
        image_BD = self._model.encode_image(image_BCHW.to(self._device), normalize=True)
        text_BD = self._model.encode_text(self._tokenize(list(captions)).to(self._device), normalize=True)
        return (100 * (image_BD * text_BD).sum(-1)).clamp(min=0).tolist()


# Files


def folders(config: TextConfig) -> dict[str, Path]:
    """Local folder by encoder, of those that are present. Raises UserError where one is not to be had."""
    return {name: _folder(name, source) for name in NAMES if (source := getattr(config, name)) is not None}


def _folder(name: str, source: str) -> Path:
    """`source` itself, or the local copy of what it names on the hub."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository = source.removeprefix("hf-hub:")
    wanted = ["config.json", "tokenizer.json", OPEN_CLIP_CONFIG]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
        weights = OPEN_CLIP_WEIGHTS if (folder / OPEN_CLIP_CONFIG).is_file() else "model*.safetensors*"
        return Path(snapshot_download(repository, allow_patterns=[*wanted, weights]))
    except (OSError, HFValidationError) as error:
        message = f"text.{name}: {source!r} is no local folder, nor a hub id that can be reached"
        raise refusal(error, message) from None


def _files(name: str, folder: Path) -> list[Path]:
    """Configuration, weights and tokenizer: what `_load` reads, and what the fingerprint covers."""
    if name != "t5" and (folder / OPEN_CLIP_CONFIG).is_file():
        files = [folder / OPEN_CLIP_CONFIG, folder / OPEN_CLIP_WEIGHTS]
    else:
        weights = sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]
        files = [folder / "config.json", *weights]
    files.append(folder / "tokenizer.json" if name == "t5" else _clip_vocabulary(folder))
    for file in files:
        if not file.is_file():
            raise UserError(f"text.{name}: {folder} has no {file.name}")
    return files


def _clip_vocabulary(folder: Path) -> Path:
    """The folder's own tokenizer, else open_clip's BPE."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    from open_clip.tokenizer import default_bpe

    return Path(default_bpe())


def _open_clip_table(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token → id, merges) of open_clip's BPE, with the names that transformers gives the special tokens."""
    from open_clip.tokenizer import SimpleTokenizer

    bpe = SimpleTokenizer(str(file))
    names = dict(zip((bpe.sot_token_id, bpe.eot_token_id), clip_tokenizer.SPECIAL, strict=True))
    return {names.get(index, token): index for token, index in bpe.encoder.items()}, list(bpe.bpe_ranks)


def write_clip_tokenizer(folder: Path, pad_id: int) -> None:
    """open_clip's BPE as transformers' CLIPTokenizer: the same ids for a text that is cleaned (`stack.text.clean`)."""
    from open_clip.tokenizer import default_bpe

    vocabulary, merges = _open_clip_table(Path(default_bpe()))
    tokenizer = _transformers().CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token=next(token for token, index in vocabulary.items() if index == pad_id),
        model_max_length=CLIP_TOKENS,
        split_special_tokens=True,  # a padding token "!" would otherwise be cut out of prompts
    )
    tokenizer.save_pretrained(folder)
    # What transformers before 5 reads.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _fingerprint(name: str, folder: Path) -> str:
    whole = hashlib.sha256()
    for file in _files(name, folder):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        whole.update(f"{file.name} {digest.hexdigest()}\n".encode())
    return whole.hexdigest()


# Loading


def _load(name: str, folder: Path, config: TextConfig, device: torch.device, dtype: torch.dtype) -> _Encoder:
    from safetensors import SafetensorError

    files = _files(name, folder)
    for file in files:
        probe(file)
    build = _load_t5 if name == "t5" else _load_open_clip if files[0].name == OPEN_CLIP_CONFIG else _load_clip
    try:
        model, forward, dim = build(folder, dtype, config.clip_projection)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        message = f"text.{name}: {folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        raise refusal(error, message) from None
    model.requires_grad_(False).eval().to(device)
    max_tokens = config.t5_max_tokens if name == "t5" else CLIP_TOKENS
    return _Encoder(_tokenizer(name, files[-1], max_tokens), forward, dim, PAD_IDS[name], max_tokens)


def _tokenizer(name: str, vocabulary: Path, max_tokens: int) -> Tokenizer:
    """For cleaned texts, of which `max_tokens` tokens are kept."""
    if vocabulary.name != "tokenizer.json":
        fast = clip_tokenizer.build(*_open_clip_table(vocabulary))
    else:
        fast = (tokenizer if name == "t5" else clip_tokenizer).load(vocabulary.parent)
    fast.no_padding()
    fast.enable_truncation(max_tokens)
    return fast


def _load_t5(folder: Path, dtype: torch.dtype, projected: bool) -> tuple[nn.Module, Forward, int]:
    model = _from_pretrained(_transformers().T5EncoderModel, folder, dtype)

    def forward(ids_BL: Tensor, length_B: Tensor, masked: bool) -> tuple[Tensor, None]:
        mask_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < length_B[:, None]
        return model(ids_BL, attention_mask=mask_BL if masked else None).last_hidden_state, None

    return model, forward, model.config.d_model


def _load_clip(folder: Path, dtype: torch.dtype, projected: bool) -> tuple[nn.Module, Forward, int]:
    library = _transformers()
    model_class = library.CLIPTextModelWithProjection if projected else library.CLIPTextModel
    model = _from_pretrained(model_class, folder, dtype)
    if projected:
        _require_equal_widths(model.config.hidden_size, model.config.projection_dim)

    def forward(ids_BL: Tensor, length_B: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
        output = model(ids_BL, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds if projected else output.pooler_output

    return model, forward, model.config.hidden_size


def _load_open_clip(folder: Path, dtype: torch.dtype, projected: bool) -> tuple[nn.Module, Forward, int]:
    import open_clip

    model: Any = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    del model.visual
    text = getattr(model, "text", model).to(dtype)
    width = text.token_embedding.embedding_dim
    if projected:
        _require_equal_widths(width, text.text_projection.shape[1])

    def forward(ids_BL: Tensor, length_B: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
        num_tokens = ids_BL.shape[1]
        hidden_BLD = text.token_embedding(ids_BL) + text.positional_embedding[:num_tokens]
        causal_LL = text.attn_mask[:num_tokens, :num_tokens]
        last_BLD, hidden = text.transformer.forward_intermediates(hidden_BLD, attn_mask=causal_LL)
        eot_BD = last_BLD[torch.arange(len(ids_BL), device=ids_BL.device), length_B - 1]
        pooled_BD = text.ln_final(eot_BD)
        return hidden[-2], pooled_BD @ text.text_projection if projected else pooled_BD

    return text, forward, width


def _transformers() -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _from_pretrained(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    model, report = model_class.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:  # transformers fills these at random and goes on
        raise ValueError(f"the weights lack {', '.join(sorted(report['missing_keys'])[:4])}")
    return model


def _require_equal_widths(hidden_dim: int, pooled_dim: int) -> None:
    # `conditioning.join` finds each encoder's part of the pooled vector by the width of its hidden states.
    if hidden_dim != pooled_dim:
        raise ValueError(f"hidden states have {hidden_dim} channels, the projection {pooled_dim}; they must agree")


# Untrained encoders


def write_untrained_encoders(folder: str | Path, seed: int) -> TextConfig:
    """Write small frozen encoders with random weights to `folder`/t5, /clip_l and /clip_g; the config that loads them.

    A sixteenth of the widths of SD3's CLIPs, and T5 as wide as both together. The bytes follow from `seed`. They tell
    words and their order apart and know nothing else: features for a demonstration on few words. A folder that is
    complete already is kept (it appears by rename); raises UserError if another seed made it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            _write_untrained_t5(partial / "t5", generator)
            _write_untrained_clip(partial / "clip_l", generator)
            _write_untrained_open_clip(partial / "clip_g", generator)
        (partial / _SEED_FILE).write_text(json.dumps({"seed": seed}) + "\n", encoding="utf-8")
        for file in partial.rglob("*.*"):
            file.chmod(0o644)  # safetensors writes 0600, whatever the umask
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(partial)  # another process was first
    made_with = (
        json.loads((folder / _SEED_FILE).read_text(encoding="utf-8"))["seed"]
        if (folder / _SEED_FILE).is_file()
        else None
    )
    if made_with != seed:
        raise UserError(f"{folder}: holds encoders of seed {made_with}, wanted seed {seed}: remove it or use another")
    return TextConfig(t5=str(folder / "t5"), clip_l=str(folder / "clip_l"), clip_g=str(folder / "clip_g"))


_SEED_FILE = "untrained.json"
_CLIP_VOCABULARY = 49408
_CLIP_SOT, _CLIP_EOT = 49406, 49407


def _write_untrained_t5(folder: Path, generator: torch.Generator) -> None:
    transformers = _transformers()
    pieces = tokenizer.load(tokenizer.CAPTION_TOKENIZER)
    shutil.copytree(tokenizer.CAPTION_TOKENIZER, folder)
    config = transformers.T5Config(
        vocab_size=pieces.get_vocab_size(),
        d_model=128,
        d_kv=16,
        num_heads=8,
        d_ff=256,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    model = transformers.T5EncoderModel(config)
    _randomize(model, generator)
    model.half().save_pretrained(folder)


def _write_untrained_clip(folder: Path, generator: torch.Generator) -> None:
    transformers = _transformers()
    config = transformers.CLIPTextConfig(
        hidden_size=48,
        intermediate_size=192,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_act="quick_gelu",
        vocab_size=_CLIP_VOCABULARY,
        bos_token_id=_CLIP_SOT,
        eos_token_id=_CLIP_EOT,
        pad_token_id=_CLIP_EOT,
    )
    model = transformers.CLIPTextModelWithProjection(config)
    _randomize(model, generator)
    model.half().save_pretrained(folder)


def _write_untrained_open_clip(folder: Path, generator: torch.Generator) -> None:
    from open_clip import CLIP
    from safetensors.torch import save_file

    text = {"context_length": CLIP_TOKENS, "vocab_size": _CLIP_VOCABULARY, "width": 80, "heads": 5, "layers": 2}
    vision = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}  # open_clip insists on one
    config: dict[str, Any] = {"embed_dim": 80, "vision_cfg": vision, "text_cfg": text}
    model = CLIP(**config)
    _randomize(model, generator)
    folder.mkdir(parents=True)
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps({"model_cfg": config}, indent=2) + "\n", encoding="utf-8")
    save_file(model.half().state_dict(), folder / OPEN_CLIP_WEIGHTS)


# Standard deviations by name, else 1/√(fan-in): unit-scale features in which a token is seen before its neighbours.
# What a layer adds to a token is scaled down, or after two layers of random mixing little is left of the word itself.
# T5 doesn't divide its scores by √d_kv: without a small q they would drown the heads' offsets.
_BRANCH_ENDS = ("SelfAttention.o", "DenseReluDense.wo", "out_proj", "c_proj", "fc2")
_BRANCH_SCALE = 0.3
_STDS = {"shared": 1.0, "token_embedding": 1.0, "position": 0.25, "SelfAttention.q": 0.02}


@torch.no_grad()
def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))  # norms 1, biases 0
        elif name.endswith("relative_attention_bias.weight"):
            _look_at_neighbours(parameter)
        else:
            std = next((std for part, std in _STDS.items() if part in name), parameter.shape[1] ** -0.5)
            branch_end = any(part in name for part in _BRANCH_ENDS)
            parameter.normal_(0, std * (_BRANCH_SCALE if branch_end else 1), generator=generator)
        if name.endswith("token_embedding.weight"):
            parameter[_CLIP_SOT:] *= 0.2  # what is pooled at EOT is the caption, not EOT


def _look_at_neighbours(bias_buckets_heads: Tensor) -> None:
    """Each head of T5 looks at one neighbour, up to four words away: order alone tells "a red star above a blue circle"
    from its reverse, and MM-DiT gives its context no positions."""
    bias_buckets_heads.zero_()
    num_buckets = bias_buckets_heads.shape[0]
    for head, offset in enumerate((-4, -3, -2, -1, 1, 2, 3, 4)):
        bias_buckets_heads[abs(offset) + (num_buckets // 2 if offset > 0 else 0), head] = 6.0
