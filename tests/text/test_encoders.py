from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stack.config import UserError, load, validate
from stack.data.synthetic import COLOURS, OUTLINES, SynthConfig, make_sample
from stack.text import tokenizer
from stack.text.conditioning import collate, join
from stack.text.encoders import NAMES, EncodedText, TextConfig, TextEncoders, fingerprints, write_untrained_encoders

CAPTIONS = [
    "a red star",
    "",
    "a small yellow square at the left of a large purple triangle on a grey background",
    "grinning face with smiling eyes",
    "flag: réunion, 5 o’clock & more",
    "a " + "very " * 200 + "long caption",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    return write_untrained_encoders(tmp_path_factory.mktemp("text") / "encoders", seed=0)


@pytest.fixture(scope="module")
def encoders(config: TextConfig) -> TextEncoders:
    return TextEncoders(config)


def embeddings(encoded: EncodedText) -> list[Tensor]:
    return [value for value in (encoded.t5, encoded.clip_l, encoded.clip_g, encoded.pooled) if value is not None]


def changed(config: TextConfig, **values: object) -> TextConfig:
    return TextConfig.model_validate({**config.model_dump(), **values})


def test_shapes_are_the_captions_true_lengths(encoders: TextEncoders) -> None:
    assert encoders.dims == {"t5": 128, "clip_l": 48, "clip_g": 80}
    fast = tokenizer.load(tokenizer.CAPTION_TOKENIZER)
    for caption, encoded in zip(CAPTIONS, encoders.encode(CAPTIONS), strict=True):
        t5, clip_l, clip_g, pooled = embeddings(encoded)
        assert t5.shape == (min(len(fast.encode(caption).ids), 77), 128)
        assert len(clip_l) == len(clip_g)
        assert (clip_l.shape[1], clip_g.shape[1], pooled.shape) == (48, 80, (128,))
        for tensor in (t5, clip_l, clip_g, pooled):
            assert tensor.dtype == torch.float32
            assert not tensor.is_inference()
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
    assert [len(embeddings(encoded)[1]) for encoded in encoders.encode(["", "a red star", CAPTIONS[-1]])] == [2, 5, 77]


def test_a_caption_does_not_depend_on_its_batch(config: TextConfig, encoders: TextEncoders) -> None:
    alone = [encoders.encode([caption])[0] for caption in CAPTIONS]
    for batch_size in (1, 4, 64):
        together = TextEncoders(changed(config, batch_size=batch_size)).encode(CAPTIONS)
        for one, other in zip(alone, together, strict=True):
            for a, b in zip(embeddings(one), embeddings(other), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_without_clip_tokens_the_context_is_t5s_and_the_pooled_vector_stays(
    config: TextConfig, encoders: TextEncoders
) -> None:
    alone = TextEncoders(changed(config, clip_tokens=False)).encode(CAPTIONS)
    assert all((len(text.clip_l), len(text.clip_g)) == (0, 0) for text in alone)  # type: ignore[arg-type]
    lengths = [len(text.t5) for text in alone]  # type: ignore[arg-type]
    keep_B = torch.arange(len(CAPTIONS)) % 2 == 0
    both = join(collate(encoders.encode(CAPTIONS)), 128, None, keep_B, None)
    context = join(collate(alone), 128, None, keep_B, None)
    assert context.lengths == lengths
    captions = (x.tokens_TD.split(x.lengths) for x in (context, both))
    assert all(torch.equal(t5_LD, tokens_LD[-len(t5_LD) :]) for t5_LD, tokens_LD in zip(*captions, strict=True))
    assert torch.equal(context.pooled_BD, both.pooled_BD)
    narrow = [replace(text, t5=text.t5[:, :64]) for text in alone]  # type: ignore[index]
    assert join(collate(narrow), 64).tokens_TD.shape == (sum(lengths), 64)  # narrower than the CLIPs, which don't enter
    dropped = join(collate(alone), 128, ~keep_B, None, None)
    assert dropped.lengths == torch.where(keep_B, 1, torch.tensor(lengths)).tolist()
    with pytest.raises(UserError, match="clip_tokens=false without t5"):
        load(TextConfig, overrides=[f"clip_l={config.clip_l}", "clip_tokens=false"])


def test_full_padding_is_the_published_form(config: TextConfig) -> None:
    import open_clip
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    encoded = TextEncoders(changed(config, pad="full", t5_max_tokens=40)).encode(["a red star"])[0]
    t5, clip_l, clip_g, pooled = embeddings(encoded)
    assert (len(t5), len(clip_l), len(clip_g)) == (40, 77, 77)

    ids = tokenizer.load(tokenizer.CAPTION_TOKENIZER).encode("a red star").ids
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(config.t5, dtype=torch.float32)(torch.tensor([ids + [0] * 36]))
        torch.testing.assert_close(t5, expected.last_hidden_state[0])
        clip = CLIPTextModelWithProjection.from_pretrained(config.clip_l, dtype=torch.float32)
        ids = [49406, 320, 736, 1565, *[49407] * 73]  # <sot> a red star <eot> and padding
        expected = clip(torch.tensor([ids]), output_hidden_states=True)
        big_g = open_clip.create_model(f"local-dir:{config.clip_g}", require_pretrained=True)
        text = big_g.forward_intermediates(text=torch.tensor([ids[:5] + [0] * 72]), normalize=False)
    torch.testing.assert_close(clip_g, text["text_intermediates"][-2][0])
    torch.testing.assert_close(pooled[48:], text["text_features"][0])
    torch.testing.assert_close(clip_l, expected.hidden_states[-2][0])
    torch.testing.assert_close(pooled[:48], expected.text_embeds[0])

    trimmed = TextEncoders(config).encode(["a red star"])[0]
    torch.testing.assert_close(embeddings(trimmed)[1], clip_l[:5], rtol=1e-4, atol=1e-5)  # causal: the same
    assert (embeddings(trimmed)[0] - t5[:4]).abs().max() > 0.1  # unmasked padding is seen


def test_the_pooled_vector_without_its_projection_is_fluxs(config: TextConfig, tmp_path: Path) -> None:
    """FLUX.1's CLIP is a CLIPTextModel, whose folder has no projection at all."""
    import open_clip
    from transformers import CLIPTextModel

    theirs = CLIPTextModel.from_pretrained(config.clip_l, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "clip_l")
    with pytest.raises(UserError, match="text_projection"):
        TextEncoders(TextConfig(clip_l=str(tmp_path / "clip_l")))
    projected = TextEncoders(config).encode(["a red star"])[0]
    plain = TextEncoders(changed(config, clip_l=str(tmp_path / "clip_l"), clip_projection=False)).encode(["a red star"])
    for one, other in zip(embeddings(projected)[:3], embeddings(plain[0])[:3], strict=True):
        torch.testing.assert_close(one, other)  # only the pooled vector is another

    big_g = open_clip.create_model(f"local-dir:{config.clip_g}", require_pretrained=True)
    with torch.no_grad():
        pooled = theirs(torch.tensor([[49406, 320, 736, 1565, 49407]])).pooler_output[0]
        torch.testing.assert_close(plain[0].pooled[:48], pooled)
        torch.testing.assert_close(plain[0].pooled[48:] @ big_g.text_projection, projected.pooled[48:])


def test_transformers_and_open_clip_agree(config: TextConfig, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    theirs = load_file(Path(str(config.clip_g)) / "open_clip_model.safetensors")
    settings = CLIPTextConfig(
        hidden_size=80,
        intermediate_size=320,
        projection_dim=80,
        num_hidden_layers=2,
        num_attention_heads=5,
        hidden_act="gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    model = CLIPTextModelWithProjection(settings)
    state = {
        "text_model.embeddings.token_embedding.weight": theirs["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": theirs["positional_embedding"],
        "text_projection.weight": theirs["text_projection"].T,
    }
    for kind in ("weight", "bias"):
        state[f"text_model.final_layer_norm.{kind}"] = theirs[f"ln_final.{kind}"]
        for layer in range(2):
            source, target = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
            qkv = theirs[f"{source}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", qkv, strict=True):
                state[f"{target}.self_attn.{name}_proj.{kind}"] = part
            for ours, name in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
            ):
                state[f"{target}.{name}.{kind}"] = theirs[f"{source}.{ours}.{kind}"]
            for ours, name in (("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                state[f"{target}.{name}.{kind}"] = theirs[f"{source}.{ours}.{kind}"]
    model.load_state_dict(state, strict=True)
    model.save_pretrained(tmp_path)

    for pad in ("trim", "full"):
        converted = TextEncoders(TextConfig(clip_g=str(tmp_path), pad=pad)).encode(CAPTIONS)
        original = TextEncoders(TextConfig(clip_g=config.clip_g, pad=pad)).encode(CAPTIONS)
        for one, other in zip(converted, original, strict=True):
            for a, b in zip(embeddings(one), embeddings(other), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_both_clip_tokenizers_give_the_same_ids(config: TextConfig, tmp_path: Path) -> None:
    """transformers' CLIP tokenizer, built from the same table, in a tokenizer.json beside the weights."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    bpe = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in bpe.encoder.items()}
    folder = tmp_path / "clip_l"
    shutil.copytree(str(config.clip_l), folder)
    CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks)).save_pretrained(folder)

    own, shipped = TextConfig(clip_l=str(folder)), TextConfig(clip_l=config.clip_l)
    assert fingerprints(own) != fingerprints(shipped)
    captions = [caption.replace("’", "'") for caption in CAPTIONS]  # open_clip's mends curly quotes, theirs doesn't
    for one, other in zip(TextEncoders(own).encode(captions), TextEncoders(shipped).encode(captions), strict=True):
        assert torch.equal(embeddings(one)[0], embeddings(other)[0])
        assert torch.equal(one.pooled, other.pooled)


def test_loading_leaves_the_global_generator_alone(config: TextConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    write_untrained_encoders(tmp_path / "encoders", seed=3)
    TextEncoders(config).encode(CAPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_long_caption_still_ends_in_eos(config: TextConfig) -> None:
    short = TextEncoders(changed(config, t5_max_tokens=4))
    cut, whole = short.encode(["a red star above a blue circle", "a red star"])
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(embeddings(cut)[:1], embeddings(whole)[:1], strict=True))


def test_reduced_precision(config: TextConfig, encoders: TextEncoders) -> None:
    reduced = TextEncoders(config, dtype=torch.bfloat16).encode(CAPTIONS)
    for one, other in zip(reduced, encoders.encode(CAPTIONS), strict=True):
        for a, b in zip(embeddings(one), embeddings(other), strict=True):
            assert a.dtype == torch.bfloat16
            assert (a.float() - b).pow(2).mean() < 1e-2 * b.pow(2).mean()


def test_absent_encoders_leave_nothing(config: TextConfig) -> None:
    only_g = TextEncoders(TextConfig(clip_g=config.clip_g)).encode(["a red star"])[0]
    assert (only_g.t5, only_g.clip_l, len(only_g.pooled)) == (None, None, 80)
    without_l = TextEncoders(TextConfig(t5=config.t5, clip_g=config.clip_g))
    assert (list(without_l.dims), without_l.encode([])) == (["t5", "clip_g"], [])
    with pytest.raises(UserError, match="clip_l or clip_g"):
        validate(TextConfig, {"t5": config.t5}, "text")


def test_fingerprints_follow_the_bytes(config: TextConfig, tmp_path: Path) -> None:
    known = fingerprints(config)
    assert tuple(known) == NAMES
    for file, name in (("t5/tokenizer.json", "t5"), ("clip_l/model.safetensors", "clip_l"), ("clip_g/x", None)):
        copy = tmp_path / str(name)
        shutil.copytree(Path(str(config.t5)).parent, copy)
        moved = changed(config, **{key: str(copy / key) for key in NAMES})
        assert fingerprints(moved) == known  # no matter where they lie
        with (copy / file).open("ab") as stream:
            stream.write(b" ")
        different = {key for key, value in fingerprints(moved).items() if value != known[key]}
        assert different == ({name} if name else set())


def test_untrained_encoders_follow_from_the_seed(config: TextConfig, tmp_path: Path) -> None:
    again = write_untrained_encoders(tmp_path / "encoders", seed=0)
    assert fingerprints(again) == fingerprints(config)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert write_untrained_encoders(tmp_path / "encoders", seed=0) == again
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in written if file.is_file())
    with pytest.raises(UserError, match="encoders of seed 0, wanted seed 1"):
        write_untrained_encoders(tmp_path / "encoders", seed=1)
    other = write_untrained_encoders(tmp_path / "other", seed=1)
    assert not set(fingerprints(other).values()) & set(fingerprints(config).values())


def solve_and_score(features_ND: Tensor, labels: list[int], num_training: int) -> float:
    """Accuracy of a least-squares probe on the captions that it was not fitted to."""
    features_ND = torch.cat([features_ND, torch.ones(len(features_ND), 1)], dim=1).double()
    labels_N = torch.tensor(labels)
    targets_NK = torch.nn.functional.one_hot(labels_N).double()
    weights_DK = torch.linalg.lstsq(features_ND[:num_training], targets_NK[:num_training]).solution
    return ((features_ND @ weights_DK).argmax(1) == labels_N)[num_training:].double().mean().item()


def test_untrained_features_are_well_conditioned(encoders: TextEncoders) -> None:
    samples = [make_sample(SynthConfig(two_shape_share=0), index) for index in range(1500)]
    encoded = encoders.encode([caption for _, caption in samples])
    t5, clip_l, clip_g = (torch.cat([embeddings(e)[i] for e in encoded]) for i in range(3))
    pooled = torch.stack([e.pooled for e in encoded])
    for features in (t5, clip_l, clip_g, pooled):
        assert 0.3 < features.std(0).min() < features.std(0).max() < 3
        assert features.abs().max() < 20

    mean_t5 = torch.stack([embeddings(e)[0].mean(0) for e in encoded])
    colours = [list(COLOURS).index(scene.shapes[0].colour) for scene, _ in samples]
    kinds = [list(OUTLINES).index(scene.shapes[0].kind) for scene, _ in samples]
    for features in (pooled, mean_t5):
        assert solve_and_score(features, colours, 1000) >= 0.95
        assert solve_and_score(features, kinds, 1000) >= 0.95


def test_one_word_changes_the_pooled_vector(encoders: TextEncoders) -> None:
    captions = [f"a {colour} {kind} on a white background" for colour in COLOURS for kind in OUTLINES]
    pooled = torch.stack([encoded.pooled for encoded in encoders.encode(captions)])
    distances = torch.cdist(pooled, pooled) / pooled.shape[1] ** 0.5
    assert distances[~torch.eye(len(captions), dtype=torch.bool)].min() > 0.1


def test_untrained_t5_knows_which_colour_belongs_to_which_shape(encoders: TextEncoders) -> None:
    """In "a red star above a blue circle" the states of `star` and `circle` tell their own colours."""
    rng = random.Random(0)
    features, labels = [], []
    pairs = [rng.choices(list(COLOURS), k=2) for _ in range(400)]
    captions = [f"a {first} star above a {second} circle" for first, second in pairs]
    for caption, encoded in zip(captions, encoders.encode(captions), strict=True):
        words = caption.split()
        for shape in ("star", "circle"):
            features.append(embeddings(encoded)[0][words.index(shape)])
            labels.append(list(COLOURS).index(words[words.index(shape) - 1]))
    assert solve_and_score(torch.stack(features), labels, 500) >= 0.95


def test_missing_sources_are_named(config: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (str(tmp_path / "absent"), "nobody/no-such-encoder", "hf-hub:nobody/no-such-encoder"):
        with pytest.raises(UserError, match=rf"text\.t5: '{source}' is no local folder, nor a hub id"):
            fingerprints(TextConfig(t5=source, clip_l=config.clip_l))
    with pytest.raises(UserError, match=r"text\.clip_l: .* has no config\.json"):
        TextEncoders(TextConfig(clip_l=str(tmp_path)))
    with pytest.raises(UserError, match="unknown key 't5_tokens', did you mean 't5_max_tokens'"):
        load(TextConfig, overrides=["t5_tokens=3"])


@pytest.mark.parametrize("file", ["t5/model.safetensors", "t5/tokenizer.json", "clip_g/open_clip_model.safetensors"])
def test_missing_or_broken_files_are_named(config: TextConfig, tmp_path: Path, file: str) -> None:
    shutil.copytree(Path(str(config.t5)).parent, tmp_path, dirs_exist_ok=True)
    key = file.split("/")[0]
    half = (tmp_path / file).read_bytes()[:-1000]
    (tmp_path / file).write_bytes(half)
    with pytest.raises(UserError, match=r"cannot be (loaded|read)"):
        TextEncoders(TextConfig.model_validate({"clip_g": config.clip_g, key: str(tmp_path / key)}))
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"text.{key}: .* has no {Path(file).name}"):
        fingerprints(TextConfig.model_validate({"clip_g": config.clip_g, key: str(tmp_path / key)}))


@pytest.mark.parametrize(
    ("file", "weight"),
    [
        ("t5/model.safetensors", "shared.weight"),
        ("clip_l/model.safetensors", "text_projection.weight"),
        ("clip_g/open_clip_model.safetensors", "text_projection"),
    ],
)
def test_missing_weights_are_not_filled_at_random(config: TextConfig, tmp_path: Path, file: str, weight: str) -> None:
    shutil.copytree(Path(str(config.t5)).parent, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / file)
    del state[weight]
    save_file(state, tmp_path / file, metadata={"format": "pt"})
    key = file.split("/")[0]
    with pytest.raises(UserError, match=f"text.{key}: .* cannot be loaded: .*{weight}"):
        TextEncoders(TextConfig.model_validate({"clip_g": config.clip_g, key: str(tmp_path / key)}))


def test_unequal_widths_are_refused(config: TextConfig, tmp_path: Path) -> None:
    shutil.copytree(str(config.clip_l), tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "projection_dim": 32}))
    state = load_file(tmp_path / "model.safetensors")
    state["text_projection.weight"] = state["text_projection.weight"][:32].contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="hidden states have 48 channels, the projection 32"):
        TextEncoders(TextConfig(clip_l=str(tmp_path)))
