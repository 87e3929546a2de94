"""Against diffusers' models and its own converters of the authors' files, on small random configurations."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stack.config import UserError
from stack.models.convert import diffusers_config, load, save
from stack.models.mmdit import MMDiT, MMDiTConfig

ROOT = Path(__file__).parents[2]
# Head sizes of 64 and 32 are those by which the authors' files tell SD3's and FLUX's number of heads.
KINDS: dict[str, dict[str, Any]] = {
    "sd3-medium": {"width": 128, "num_heads": 2, "qk_norm": False, "depth": 3},
    "sd3.5-large": {"qk_norm": True, "depth": 3},
    "sd3.5-wide": {"qk_norm": True, "position_table_size": 16, "position_base_size": 48},  # steps of three radians
    "sd3.5-medium": {"qk_norm": True, "depth": 3, "image_attention": 2, "position_table_size": 24},
    "flux-dev": {"preset": "flux-test", "guidance_embedding": True},
    "flux-schnell": {"preset": "flux-test"},
}


def config_of(kind: str) -> MMDiTConfig:
    return MMDiTConfig(**{"preset": "mmdit-test", **KINDS[kind]})


def randomised(config: MMDiTConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> MMDiT:
    model = MMDiT(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


class Float64(TorchFunctionMode):
    """diffusers rounds the root mean square of SD3 and FLUX's angles to float32, even in float64: here it does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float or (func is Tensor.to and torch.float32 in args):
            return args[0].double()
        return func(*args, **(kwargs or {}))


def in_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with Float64():
            return forward(*args, **kwargs)

    return run


def diffusers_model(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers

    name = json.loads((folder / "config.json").read_text())["_class_name"]
    theirs = getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    if dtype == torch.float64:
        wide = [m for m in theirs.modules() if type(m).__name__ in ("RMSNorm", "FluxPosEmbed")]
        wide += list(theirs.transformer_blocks) + list(getattr(theirs, "single_transformer_blocks", []))
        for module in wide:
            module.forward = in_float64(module.forward)
    return theirs.requires_grad_()


def run_ours(model: MMDiT, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    guidance = (torch.full_like(t, 3.5),) if model.config.guidance_embedding else ()
    return model(latent, t, context.flatten(0, 1), [context.shape[1]] * len(context), pooled, *guidance)


def run_theirs(theirs: Any, config: MMDiTConfig, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    if not config.rope_axes:
        (velocity,) = theirs(latent, context, pooled, 1000 * t, return_dict=False)
        return velocity
    B, C, H, W = latent.shape
    packed = latent.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, C * 4)
    rows, columns = torch.meshgrid(torch.arange(H // 2), torch.arange(W // 2), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    guidance = torch.full_like(t, 3.5) if config.guidance_embedding else None
    (velocity,) = theirs(packed, context, pooled, t, ids, torch.zeros(context.shape[1], 3), guidance, return_dict=False)
    return velocity.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_diffusers(kind: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    config = config_of(kind)
    ours = randomised(config, dtype)
    save(ours, tmp_path, "diffusers")
    theirs = diffusers_model(tmp_path, dtype)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    inputs = (normal(2, config.in_channels, 8, 12), torch.tensor([0.125, 0.75], dtype=dtype),
              normal(2, 7, config.context_dim), normal(2, config.pooled_dim))  # fmt: skip
    velocity, expected = run_ours(ours, *inputs), run_theirs(theirs, config, *inputs)
    assert velocity.shape == inputs[0].shape
    assert relative(velocity, expected) < tolerance

    weights = normal(*velocity.shape).detach()
    wanted = [inputs[0], inputs[2], inputs[3]]
    (velocity * weights).sum().backward()
    gradients = [x.grad for x in wanted]
    for x in wanted:
        x.grad = None
    (expected * weights).sum().backward()
    for gradient, x in zip(gradients, wanted, strict=True):
        assert relative(gradient, x.grad) < tolerance
    # The gradients of all weights: they are a model's weights as well, and go the same way into diffusers' names.
    for parameter in ours.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    save(ours, tmp_path / "gradients", "diffusers")
    converted = load_file(tmp_path / "gradients" / "diffusion_pytorch_model.safetensors")
    scale = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for name, parameter in theirs.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (converted[name] - gradient).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, layout: Any, tmp_path: Path) -> None:
    model = randomised(config_of(kind), torch.bfloat16)
    save(model, tmp_path / "one", layout)
    again, config = load(tmp_path / "one")
    assert config.model_dump(exclude={"preset"}) == model.config.model_dump(exclude={"preset"})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    save(again, tmp_path / "two", layout)
    files = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()] or [Path()]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_diffusers_wrote_goes_there_and_back(kind: str, tmp_path: Path) -> None:
    import diffusers

    values = diffusers_config(config_of(kind))
    torch.manual_seed(0)
    theirs = getattr(diffusers, values["_class_name"])(**{k: v for k, v in values.items() if k[0] != "_"})
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="300kB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model, _ = load(tmp_path / "theirs")
    save(model, tmp_path / "ours", "diffusers", shard_bytes=300_000)
    index = json.loads((tmp_path / "ours" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.numel() * x.itemsize for x in theirs.state_dict().values())
    before, after = (
        {name: x for file in (tmp_path / folder).glob("*.safetensors") for name, x in load_file(file).items()}
        for folder in ("theirs", "ours")
    )
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_a_folder_holds_one_model(tmp_path: Path) -> None:
    """Written to again, it has nothing left of what it held, in whatever number of files either is."""
    one, two = randomised(config_of("flux-dev")), randomised(config_of("flux-schnell"), seed=1)
    variant = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    variant.touch()
    for model, shard_bytes in ((one, 300_000), (two, 10**9), (one, 300_000), (two, 500_000)):
        save(model, tmp_path, "diffusers", shard_bytes=shard_bytes)
        for read in (load(tmp_path)[0], diffusers_model(tmp_path, torch.float32)):
            weights = [p for name, p in read.named_parameters() if name in ("txt_in.weight", "context_embedder.weight")]
            assert torch.equal(weights[0], model.txt_in.weight)
        index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        names = {"diffusion_pytorch_model.safetensors"}
        if index.exists():
            names = {index.name, *json.loads(index.read_text())["weight_map"].values()}
        assert {path.name for path in tmp_path.iterdir()} == names | {"config.json", variant.name}


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_one_copy_of_a_model_is_held(layout: Any, tmp_path: Path) -> None:
    """While it is written and read in another dtype."""

    def most(step: str) -> Any:
        arguments = [sys.executable, __file__, step, str(tmp_path), layout]
        done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    grown, weights, largest = most("save")
    assert weights > 20 * largest
    assert grown < 4 * largest
    grown, *_ = most("load")
    assert (
        grown < weights + weights // 2 + 4 * largest
    )  # beside the model, the file, whose pages count while it is read


def grow(step: str, folder: Path, layout: Any) -> None:
    """Prints by how many bytes the most that the process ever held grows in `step`, those of the weights in float32,
    and of the largest of them. The step is done on a small model first, which pays for imports."""

    def most() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        assert found is not None
        return int(found[1]) * 1024

    large = MMDiTConfig.from_preset("flux-test", width=512, num_heads=16, depth=2, single_depth=6, context_dim=64)
    sizes, before = [0], 0
    for name, config in (("small", config_of("flux-dev")), ("large", large)):
        if step == "save":
            model = randomised(config)
            sizes, before = [p.nbytes for p in model.parameters()], most()
            save(model, folder / name, layout, torch.bfloat16)
        else:
            before = most()
            load(folder / name, torch.float32)
    print(json.dumps([most() - before, sum(sizes), max(sizes)]))


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_the_authors_names_as_we_do(kind: str, tmp_path: Path) -> None:
    from diffusers.loaders import single_file_utils

    model = randomised(config_of(kind))
    save(model, tmp_path / "one.safetensors", "original")
    save(model, tmp_path / "folder", "diffusers")
    name = f"convert_{'flux' if model.config.rope_axes else 'sd3'}_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name)).replace("3072", str(model.config.width))
    converters = dict(vars(single_file_utils))
    exec(source, converters)  # FLUX.1's width is written into it
    theirs = converters[name](load_file(tmp_path / "one.safetensors"))
    ours = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, expected in ours.items():
        assert theirs[name].equal(expected), name


def test_a_pipelines_folder_is_read_too(tmp_path: Path) -> None:
    model = randomised(config_of("flux-dev"))
    save(model, tmp_path / "transformer", "diffusers")
    (tmp_path / "model_index.json").write_text("{}")
    assert torch.equal(load(tmp_path)[0].img_in.weight, model.img_in.weight)
    assert load(tmp_path, torch.bfloat16)[0].img_in.weight.dtype == torch.bfloat16


def spoilt(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], kind: str = "sd3-medium") -> Path:
    path = tmp_path / "one.safetensors"
    save(randomised(config_of(kind)), path, "original")
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    return path


PREFIX = "model.diffusion_model."


def test_strict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tensor 'model.diffusion_model.final_layer.linear.bias' is missing"):
        load(spoilt(tmp_path, lambda w: w.pop(f"{PREFIX}final_layer.linear.bias")))
    with pytest.raises(UserError, match=r"1 tensors that the model has no place for, first .*final_layer.extra"):
        load(spoilt(tmp_path, lambda w: w.update({f"{PREFIX}final_layer.extra": torch.zeros(1)})))
    with pytest.raises(UserError, match=r"final_layer.linear.weight gives \(16, 100\), expected \(16, 128\)"):
        load(spoilt(tmp_path, lambda w: w.update({f"{PREFIX}final_layer.linear.weight": torch.zeros(16, 100)})))
    with pytest.raises(UserError, match=r"pos_embed is not the sin-cos table of 16 patches"):
        load(spoilt(tmp_path, lambda w: w[f"{PREFIX}pos_embed"][0, 7:].mul_(-1)))
    beside = spoilt(tmp_path, lambda w: w.update({"first_stage_model.x": torch.zeros(1)}))
    assert load(beside)[1].depth == 3


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights"):
        load(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match=r"x.safetensors: cannot be read as safetensors"):
        load(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"neither SD3 nor FLUX.1"):
        load(tmp_path / "y.safetensors")
    save(randomised(config_of("sd3-medium")), tmp_path / "folder", "diffusers")
    description = tmp_path / "folder" / "config.json"
    values = json.loads(description.read_text())
    for change, message in (
        ({"_class_name": "UNet2DModel"}, "UNet2DModel is not one of SD3Transformer2DModel"),
        ({"out_channels": 8}, "out_channels is 8"),
        ({"dual_attention_layers": [1]}, r"dual_attention_layers is \[1\]"),
        ({"qk_norm": "layer_norm"}, "qk_norm is layer_norm"),
    ):
        description.write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=message):
            load(tmp_path / "folder")
    for text in ("{", "[]", json.dumps({**values, "attention_head_dim": "many"})):
        description.write_text(text)
        with pytest.raises(UserError, match="cannot be understood as a model"):
            load(tmp_path / "folder")
    description.write_text("{}")
    with pytest.raises(UserError, match="None is not one of"):
        load(tmp_path / "folder")


@pytest.mark.parametrize(
    ("preset", "keys", "layout", "message"),
    [
        ("mmdit-test", {"mlp_ratio": 2}, "diffusers", "has mlp_ratio=4 always, this model 2"),
        ("mmdit-test", {"qk_norm": False}, "original", "has num_heads=1 always, this model 2"),
        ("mmdit-test", {"position_origin": 1.0}, "diffusers", "has position_origin=0 always"),
        ("mmdit-test", {"position_base_size": 16.5}, "diffusers", "position_base_size=16 always, this model 16.5"),
        ("mmdit-test", {"position_base_size": 16.4}, "original", "position_base_size=16 always, this model 16.4"),
        ("mmdit-test", {"position_base_size": 4096}, "original", "position_base_size=.* always, this model 4096"),
        ("flux-test", {"qk_norm": False}, "diffusers", "has qk_norm=True always"),
        ("flux-test", {"rope_axes": (16, 16)}, "original", r"has rope_axes=\(4, 14, 14\) always"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    preset: str, keys: dict[str, Any], layout: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        save(randomised(MMDiTConfig(preset=preset, **keys)), tmp_path / "x", layout)


if __name__ == "__main__":
    grow(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
