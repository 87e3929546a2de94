"""Encoders and tokenizers as transformers loads them, against this stack's own encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stack.config import UserError
from stack.text import tokenizer
from stack.text.encoders import PAD_IDS, TextConfig, TextEncoders, write_untrained_encoders
from stack.text.folders import write_encoder, write_tokenizer

CAPTIONS = [
    "a red star!",
    "",
    "hello !! it's 12 o'clock, réunion & more",
    "a " + "very " * 90 + "long one",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    return write_untrained_encoders(tmp_path_factory.mktemp("text") / "encoders", seed=0)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_an_open_clip_tower_becomes_transformers(config: TextConfig, tmp_path: Path, quick_gelu: bool) -> None:
    """As a folder of this stack, with the tokenizer that was written: the same embeddings from the same captions."""
    source = tmp_path / "source"
    shutil.copytree(str(config.clip_g), source)
    described = json.loads((source / "open_clip_config.json").read_text())
    described["model_cfg"]["quick_gelu"] = quick_gelu
    (source / "open_clip_config.json").write_text(json.dumps(described))
    write_encoder("clip_g", source, tmp_path / "out")
    assert write_tokenizer("clip_g", source, tmp_path / "tokenizer") == "CLIPTokenizer"
    for pad in ("trim", "full"):
        ours = TextEncoders(TextConfig(clip_g=str(source), pad=pad)).encode(CAPTIONS)
        theirs = TextEncoders(TextConfig(clip_g=str(tmp_path / "out"), pad=pad)).encode(CAPTIONS)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.clip_g, other.clip_g, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(one.pooled, other.pooled, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("eos", [2, 49407])
def test_both_ways_of_pooling_take_the_same_token(config: TextConfig, tmp_path: Path, eos: int) -> None:
    """Published configurations say eos_token_id: 2, and mean the highest id."""
    from transformers import CLIPTextModelWithProjection

    write_encoder("clip_g", Path(str(config.clip_g)), tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**described, "eos_token_id": eos}))
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = TextEncoders(TextConfig(clip_g=config.clip_g, pad="full")).encode(["a red star"])[0]
    for pad_id in (0, 49407):
        ids = torch.tensor([[49406, 320, 736, 1565, 49407] + [pad_id] * 72])
        with torch.no_grad():
            torch.testing.assert_close(model(ids).text_embeds[0], expected.pooled, rtol=1e-4, atol=2e-5)


def test_a_tower_of_another_architecture_is_refused(config: TextConfig, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(str(config.clip_g), source)
    described = json.loads((source / "open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    (source / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="no place for no_causal_mask of its text_cfg"):
        write_encoder("clip_g", source, tmp_path / "out")
    shutil.copyfile(Path(str(config.clip_g)) / "open_clip_config.json", source / "open_clip_config.json")
    weights = load_file(source / "open_clip_model.safetensors")
    save_file({**weights, "transformer.resblocks.0.ls_1.gamma": torch.ones(80)}, source / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"no place for transformer.resblocks.0.ls_1.gamma"):
        write_encoder("clip_g", source, tmp_path / "out")


def test_a_model_in_parts_is_copied_whole(config: TextConfig, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    source = tmp_path / "source"
    shutil.copytree(str(config.t5), source)
    (source / "model.safetensors").unlink()
    T5EncoderModel.from_pretrained(str(config.t5), dtype=torch.float16).save_pretrained(source, max_shard_size="300kB")
    (source / "model.fp16.safetensors").write_bytes(b"a variant that nothing reads")
    write_encoder("t5", source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in source.glob("model*")} - {"model.fp16.safetensors"} | {"config.json"}
    assert len(names) > 4


def test_a_tokenizer_of_t5s_own_class_is_loaded_by_it(tmp_path: Path) -> None:
    import transformers

    pieces = json.loads((tokenizer.CAPTION_TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]
    transformers.T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=0).save_pretrained(tmp_path / "source")
    assert write_tokenizer("t5", tmp_path / "source", tmp_path / "out") == "T5TokenizerFast"
    theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path / "out", local_files_only=True)
    ours = tokenizer.load(tmp_path / "source")
    for caption in CAPTIONS:
        assert theirs(caption).input_ids == ours.encode(caption).ids


@pytest.mark.parametrize("shipped", [False, True], ids=["open_clip's", "the folder's own"])
@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5"])
def test_a_tokenizer_gives_our_ids_and_our_padding(
    config: TextConfig, tmp_path: Path, name: str, shipped: bool
) -> None:
    """Of a CLIP folder with a tokenizer of its own, and of one without; "!" stands in prompts and is bigG's padding."""
    import transformers
    from open_clip.tokenizer import SimpleTokenizer

    bpe, fast = SimpleTokenizer(), tokenizer.load(tokenizer.CAPTION_TOKENIZER)
    fast.enable_truncation(77)

    def clip_ids(caption: str) -> list[int]:
        return [49406, *bpe.encode(caption)[:75], 49407]

    def t5_ids(caption: str) -> list[int]:
        return fast.encode(caption).ids

    source = tmp_path / "source"
    shutil.copytree(str(getattr(config, name)), source)
    if shipped and name != "t5":
        write_tokenizer("clip_l", source, tmp_path / "first")
        for file in ("tokenizer.json", "vocab.json"):
            shutil.copyfile(tmp_path / "first" / file, source / file)
    class_name = write_tokenizer(name, source, tmp_path / "out")
    theirs = getattr(transformers, class_name).from_pretrained(tmp_path / "out", local_files_only=True)
    assert theirs.pad_token_id == PAD_IDS[name]
    padded = theirs(CAPTIONS, padding="max_length", max_length=77, truncation=True).input_ids
    for caption, ids in zip(CAPTIONS, padded, strict=True):
        expected = t5_ids(caption) if name == "t5" else clip_ids(caption)
        assert ids == expected + [PAD_IDS[name]] * (77 - len(expected)), caption
    if name != "t5":
        assert theirs.model_max_length == 77
