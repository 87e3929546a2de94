"""MM-DiT: "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (SD3, arXiv 2403.03206), §4, and
the single-stream blocks and rotary positions of FLUX.1.

Text and image tokens each have weights of their own and meet in attention; the timestep and the pooled text modulate
both. img, txt and vec are the three streams of numbers; `stack.nn.layout` says how text tokens lie in memory.

B batch · C channels · H W height, width · N image tokens · L text tokens of each sample, T of all · D width ·
A heads · E head size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stack.config import Config
from stack.models import presets
from stack.nn.attention import Backend, attend, choose
from stack.nn.embed import (
    Embedder,
    patchify,
    sincos_positions,
    table_coordinates,
    timestep_embedding,
    unpatchify,
)
from stack.nn.kernels.gated_residual import gated_residual
from stack.nn.kernels.modulated_norm import modulated_norm
from stack.nn.layout import Layout
from stack.nn.linear import Linear
from stack.nn.modulation import Modulation, triples
from stack.nn.norms import RMSNorm
from stack.nn.rope import Rotation, grid_ids, rotate, rotation

TIMESTEP_SIZE = 256


class MMDiTConfig(Config):
    """The network. A `preset` (see presets.py) gives a row of values; keys that are written out win over it."""

    kind: Literal["mmdit"] = "mmdit"
    preset: str | None = None
    depth: PositiveInt
    """Double-stream blocks: text and image have weights of their own (SD3)."""
    single_depth: NonNegativeInt = 0
    """Single-stream blocks after them: text and image share their weights (FLUX)."""
    width: PositiveInt
    num_heads: PositiveInt
    patch_size: PositiveInt = 2
    in_channels: PositiveInt = 16
    context_dim: PositiveInt = 4096
    pooled_dim: PositiveInt = 2048
    mlp_ratio: PositiveInt = 4
    qk_norm: bool = False
    image_attention: NonNegativeInt = 0
    """First blocks in which image tokens also attend among themselves (SD3.5-medium: 13)."""
    guidance_embedding: bool = False
    """Whether the guidance scale is an input, as of a model distilled from a guided one (FLUX.1-dev)."""
    rope_axes: tuple[PositiveInt, ...] = ()
    """Rotary positions: channels of a head for each axis, the last two of which are row and column (FLUX). Without
    them, positions are added from a sin-cos table (SD3)."""
    position_table_size: PositiveInt = 192
    """Largest side of an image, in patches, that the table holds."""
    position_base_size: PositiveFloat = 64
    """What the table's side measures in coordinates, see `table_coordinates`."""
    position_origin: float = 0.0
    """Coordinate of the table's first patch."""

    @classmethod
    def from_preset(cls, preset: str, **keys: Any) -> MMDiTConfig:
        """The row `preset` of presets.py, with `keys` over it."""
        return cls.model_validate({"preset": preset, **keys})

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return presets.resolve(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_sizes(self) -> MMDiTConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        if not self.rope_axes and self.width % 4:
            raise ValueError(f"sin-cos positions need a width divisible by 4, got {self.width}")
        axes = self.rope_axes
        if axes and (len(axes) < 2 or sum(axes) != self.head_size or any(axis % 2 for axis in axes)):
            raise ValueError(
                f"rope_axes must be two or more even numbers that add up to the head's {self.head_size}, got {axes}"
            )
        if self.image_attention > self.depth:
            raise ValueError(f"image_attention is {self.image_attention}, the depth {self.depth}")
        return self

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads


class QKV(NamedTuple):
    """Queries, keys and values, [B, tokens, A, E] each."""

    q: Tensor
    k: Tensor
    v: Tensor


class Heads(nn.Module):
    """Splits a projection into heads; QK-RMSNorm and rotary positions where the model has them."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.norm_q = RMSNorm(config.head_size) if config.qk_norm else None
        self.norm_k = RMSNorm(config.head_size) if config.qk_norm else None

    def forward(self, q_BND: Tensor, k_BND: Tensor, v_BND: Tensor, rotation: Rotation | None) -> QKV:
        q, k, v = (x_BND.unflatten(-1, (-1, self.head_size)) for x_BND in (q_BND, k_BND, v_BND))
        if self.norm_q is not None and self.norm_k is not None:
            return QKV(self.norm_q(q, rotation), self.norm_k(k, rotation), v)
        return QKV(q, k, v) if rotation is None else QKV(rotate(q, rotation), rotate(k, rotation), v)


class Projection(nn.Module):
    """Tokens → queries, keys and values of each head."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.linear = Linear(config.width, 3 * config.width)
        self.heads = Heads(config)

    def forward(self, x_BND: Tensor, rotation: Rotation | None) -> QKV:
        return self.heads(*self.linear(x_BND).chunk(3, dim=-1), rotation)


class ImageAttention(nn.Module):
    """Attention of image tokens among themselves (SD3.5-medium)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.qkv = Projection(config)
        self.out = Linear(config.width, config.width)

    def forward(self, x_BND: Tensor, layout: Layout, rotation: Rotation | None) -> Tensor:
        q, k, v = self.qkv(x_BND, rotation)
        return self.out(attend(q, k, v, layout.image()).flatten(-2))


class Stream(nn.Module):
    """One half of a double-stream block, of image or of text."""

    def __init__(self, config: MMDiTConfig, image_attention: bool = False) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.modulation = Modulation(width, 9 if image_attention else 6)
        self.qkv = Projection(config)
        self.out = Linear(width, width)
        self.image_attention = ImageAttention(config) if image_attention else None
        self.mlp = nn.Sequential(Linear(width, hidden), nn.GELU("tanh"), Linear(hidden, width))

    def project(self, x_BND: Tensor, vectors: Tensor, rotation: Rotation | None) -> QKV:
        attn, *_ = triples(vectors, x_BND.shape[-1])
        return self.qkv(modulated_norm(x_BND, attn.shift, attn.scale), rotation)

    def update(
        self, x_BND: Tensor, attended_BND: Tensor, vectors: Tensor, layout: Layout, rotation: Rotation | None
    ) -> Tensor:
        attn, mlp, *rest = triples(vectors, x_BND.shape[-1])
        y_BND = gated_residual(x_BND, attn.gate, self.out(attended_BND))
        if self.image_attention is not None:
            (image,) = rest
            among_BND = self.image_attention(modulated_norm(x_BND, image.shift, image.scale), layout, rotation)
            y_BND = gated_residual(y_BND, image.gate, among_BND)
        return gated_residual(y_BND, mlp.gate, self.mlp(modulated_norm(y_BND, mlp.shift, mlp.scale)))


class LastText(nn.Module):
    """The text half of the last block, where no single-stream block follows: attention uses it, nothing reads it."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.modulation = Modulation(config.width, 2)
        self.qkv = Projection(config)

    def project(self, x_BND: Tensor, vectors: Tensor, rotation: Rotation | None) -> QKV:
        return self.qkv(modulated_norm(x_BND, *vectors.chunk(2, dim=-1)), rotation)

    def update(self, x_BND: Tensor, *_: Any) -> Tensor:
        return x_BND


class Block(nn.Module):
    """One of the network's blocks; `recompute` are the arguments of `checkpoint`, see stack.models.compute.

    Each kind has a `forward` of its own, since that is what compilations are kept by.
    """

    recompute: dict[str, Any] | None = None

    def _keeping(self, run: Callable[..., Any], *args: Any) -> Any:
        if self.recompute is None or not torch.is_grad_enabled():
            return run(*args)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **self.recompute)


class DoubleBlock(Block):
    """Text and image with weights of their own, joined in attention (SD3, figure 2b)."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        last = index == config.depth - 1 and config.single_depth == 0
        self.img = Stream(config, image_attention=index < config.image_attention)
        self.txt = LastText(config) if last else Stream(config)

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self._keeping(self._run, *args)

    def _run(
        self, img_BND: Tensor, txt_BLD: Tensor, vec_BD: Tensor, layout: Layout, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        img_vectors = self.img.modulation(vec_BD)[:, None]
        txt_vectors = layout.for_text(self.txt.modulation(vec_BD))
        txt_qkv = self.txt.project(txt_BLD, txt_vectors, None)  # a text token's ids are 0: it is not turned
        img_qkv = self.img.project(img_BND, img_vectors, rotation)
        q, k, v = (layout.merge(txt, img) for txt, img in zip(txt_qkv, img_qkv, strict=True))
        txt_attended, img_attended = layout.split(attend(q, k, v, layout).flatten(-2))
        return (
            self.img.update(img_BND, img_attended, img_vectors, layout, rotation),
            self.txt.update(txt_BLD, txt_attended, txt_vectors, layout, None),
        )


class SingleBlock(Block):
    """Text and image in one stream; attention and MLP side by side, between one linear layer in and one out (FLUX)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.sizes = (width, width, width, hidden)
        self.modulation = Modulation(width, 3)
        self.inner = Linear(width, 3 * width + hidden)
        self.heads = Heads(config)
        self.outer = Linear(width + hidden, width)

    def forward(self, *args: Any) -> Tensor:
        return self._keeping(self._run, *args)

    def _run(self, x_BSD: Tensor, vec_BD: Tensor, layout: Layout, rotation: Rotation | None) -> Tensor:
        shift, scale, gate = layout.for_joint(self.modulation(vec_BD)).chunk(3, dim=-1)
        *qkv, hidden = self.inner(modulated_norm(x_BSD, shift, scale)).split(self.sizes, dim=-1)
        q, k, v = self.heads(*qkv, rotation)
        attended = attend(q, k, v, layout).flatten(-2)
        both = torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1)
        return gated_residual(x_BSD, gate, self.outer(both))


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then a linear layer from tokens to patches."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.linear = Linear(width, out_features)

    def forward(self, img_BND: Tensor, vec_BD: Tensor) -> Tensor:
        shift, scale = self.modulation(vec_BD)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(img_BND, shift, scale))


class MMDiT(nn.Module):
    """Predicts the velocity ε − x_0 of rectified flow. Weights mean nothing until `init_weights` or a load."""

    attention: Backend = "auto"

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        patch_features = config.patch_size**2 * config.in_channels
        self.img_in = Linear(patch_features, config.width)
        self.txt_in = Linear(config.context_dim, config.width)
        self.time_in = Embedder(TIMESTEP_SIZE, config.width)
        self.pooled_in = Embedder(config.pooled_dim, config.width)
        self.guidance_in = Embedder(TIMESTEP_SIZE, config.width) if config.guidance_embedding else None
        self.blocks = nn.ModuleList(DoubleBlock(config, index) for index in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_depth))
        self.final = FinalLayer(config.width, patch_features)

    def forward(
        self,
        latent_BCHW: Tensor,
        t_B: Tensor,
        context_TD: Tensor,
        lengths: Sequence[int],
        pooled_BD: Tensor,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """The velocity at time `t_B`, 0 (data) … 1 (noise), in the shape of the latent and the dtype of the weights.

        `context_TD` holds the text tokens of all samples one after another, `lengths` says how many each has; it has
        `context_dim` channels and `pooled_BD` `pooled_dim`. `guidance_B` is the scale that a model with a guidance
        embedding stands for. Raises ValueError when the latent's sides do not divide into patches or exceed the
        position table, and where the guidance is missing or has no place.
        """
        config, weight = self.config, self.img_in.weight
        height, width = self._grid(latent_BCHW)
        backend = choose(self.attention, weight.device, weight.dtype, config.head_size, torch.is_grad_enabled())
        layout = Layout.of(lengths, height * width, weight.device, backend)

        # Cloned, since a linear layer returns a view, and a compiled block takes that for another kind of input than
        # what the block before it returns.
        img_BND = self.img_in(patchify(latent_BCHW.to(weight.dtype), config.patch_size)).clone()
        txt_BLD = self.txt_in(layout.text_rows(context_TD.to(weight.dtype), len(lengths))).clone()
        vec_BD = F.silu(self._vector(t_B, pooled_BD, guidance_B))
        rotation = None
        if config.rope_axes:
            rotation = self._rotation(height, width)
        else:
            img_BND = img_BND + self._position_table(height, width).to(weight.dtype)

        for block in self.blocks:
            img_BND, txt_BLD = block(img_BND, txt_BLD, vec_BD, layout, rotation)
        if self.single_blocks:
            x_BSD = layout.merge(txt_BLD, img_BND)
            rotation = rotation and layout.joint_rotation(rotation, txt_BLD.shape[1], len(img_BND))
            for block in self.single_blocks:
                x_BSD = block(x_BSD, vec_BD, layout, rotation)
            _, img_BND = layout.split(x_BSD)
        return unpatchify(self.final(img_BND, vec_BD), height, width, config.patch_size)

    def _vector(self, t_B: Tensor, pooled_BD: Tensor, guidance_B: Tensor | None) -> Tensor:
        dtype = self.img_in.weight.dtype
        vec_BD = self.time_in(timestep_embedding(t_B, TIMESTEP_SIZE).to(dtype)) + self.pooled_in(pooled_BD.to(dtype))
        if (guidance_B is None) != (self.guidance_in is None):
            state = "needs" if guidance_B is None else "does not take"
            raise ValueError(f"a model with guidance_embedding={self.config.guidance_embedding} {state} a guidance")
        if self.guidance_in is None or guidance_B is None:
            return vec_BD
        return vec_BD + self.guidance_in(timestep_embedding(guidance_B, TIMESTEP_SIZE).to(dtype))

    def _grid(self, latent_BCHW: Tensor) -> tuple[int, int]:
        H, W = latent_BCHW.shape[-2:]
        patch = self.config.patch_size
        if H % patch or W % patch:
            raise ValueError(f"a latent of {H}×{W} does not divide into patches of {patch}×{patch}")
        return H // patch, W // patch

    def _position_table(self, height: int, width: int) -> Tensor:
        c = self.config
        rows, columns = (
            table_coordinates(
                side, c.position_table_size, c.position_base_size, c.position_origin, self.img_in.weight.device
            )
            for side in (height, width)
        )
        return sincos_positions(rows, columns, c.width)

    def _rotation(self, height: int, width: int) -> Rotation:
        axes, weight = self.config.rope_axes, self.img_in.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return rotation(grid_ids(height, width, len(axes), weight.device), axes).to(wide)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """DiT's initialisation (arXiv 2212.09748, §3.2), whatever the parameters held before; of MLPerf's FLUX.1 too.

        | parameters                                      | values        |
        |-------------------------------------------------|---------------|
        | biases, all modulation, the last layer          | 0             |
        | QK-norm                                         | 1             |
        | embedders of time, pooled text and guidance     | N(0, .02²)    |
        | other linear layers                             | Xavier-uniform|

        So the network starts as velocity 0 and each block as the identity.
        """
        generator = torch.Generator(self.img_in.weight.device).manual_seed(seed)
        embedders = {layer for module in self.modules() if isinstance(module, Embedder) for layer in module.modules()}
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Linear):
                nn.init.zeros_(module.bias)
                if isinstance(module, Modulation) or module is self.final.linear:
                    nn.init.zeros_(module.weight)
                elif module in embedders:
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
