"""MM-DiT: "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (SD3, arXiv 2403.03206), §4.

Text and image tokens each have weights of their own and meet in attention; the timestep and the pooled text modulate
both. img, txt and vec are the three streams of numbers.

B batch · C channels · H W height, width · N image tokens · L text tokens · S = L+N all tokens · D width · A heads ·
E head size
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from stack.config import Config
from stack.models import presets
from stack.nn.attention import attend
from stack.nn.embed import (
    Embedder,
    patchify,
    sincos_positions,
    table_coordinates,
    timestep_embedding,
    unpatchify,
)
from stack.nn.linear import Linear
from stack.nn.modulation import AdaLN, Modulation, ShiftScaleGate, modulate
from stack.nn.norms import RMSNorm, layer_norm
from stack.nn.rope import Rotation, axial_ids, rotate, rotation

TIMESTEP_SIZE = 256


class MMDiTConfig(Config):
    """The network. A `preset` (see presets.py) gives a row of values; keys that are written out win over it."""

    preset: str | None = None
    depth: PositiveInt
    width: PositiveInt
    num_heads: PositiveInt
    patch_size: PositiveInt = 2
    in_channels: PositiveInt = 16
    context_dim: PositiveInt = 4096
    pooled_dim: PositiveInt = 2048
    mlp_ratio: PositiveInt = 4
    qk_norm: bool = False
    positions: Literal["sincos", "rope"] = "sincos"
    position_table_size: PositiveInt = 192
    """Largest side of an image, in patches (sin-cos only)."""
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
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"sincos positions need a width divisible by 4, got {self.width}")
        if self.positions == "rope" and self.head_size % 4:
            raise ValueError(f"rope needs heads of a size divisible by 4, got {self.head_size}")
        return self

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads


class QKV(NamedTuple):
    """Queries, keys and values, [B, A, tokens, E] each."""

    q: Tensor
    k: Tensor
    v: Tensor


class Projection(nn.Module):
    """Tokens → normalised, modulated → queries, keys and values of each head; QK-RMSNorm if asked."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.linear = Linear(config.width, 3 * config.width)
        self.norm_q = RMSNorm(config.head_size) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(config.head_size) if config.qk_norm else nn.Identity()

    def forward(self, x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> QKV:
        fused = self.linear(modulate(layer_norm(x_BND), shift_B1D, scale_B1D))
        q, k, v = rearrange(fused, "B N (K A E) -> K B A N E", K=3, A=self.num_heads)
        return QKV(self.norm_q(q), self.norm_k(k), v)


class Source(nn.Module):
    """The text half of the last block: it feeds attention and is not read again."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.modulation = AdaLN(config.width)
        self.qkv = Projection(config)


class Stream(nn.Module):
    """One half of a joint block, of image or of text: all of its weights."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.modulation = Modulation(config.width)
        self.qkv = Projection(config)
        self.out = Linear(config.width, config.width)
        self.mlp = nn.Sequential(
            Linear(config.width, hidden), nn.GELU(approximate="tanh"), Linear(hidden, config.width)
        )

    def update(self, x_BND: Tensor, attended_BND: Tensor, attn: ShiftScaleGate, mlp: ShiftScaleGate) -> Tensor:
        x_BND = x_BND + attn.gate_B1D * self.out(attended_BND)
        return x_BND + mlp.gate_B1D * self.mlp(modulate(layer_norm(x_BND), mlp.shift_B1D, mlp.scale_B1D))


def joint_attention(txt: QKV, img: QKV, positions: Rotation | None, mask_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over text tokens followed by image tokens; the results for text [B, L, D] and image [B, N, D]."""
    q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt, img, strict=True))
    if positions is not None:
        q, k = rotate(q, positions), rotate(k, positions)
    attended_BSD = rearrange(attend(q, k, v, mask_BS), "B A S E -> B S (A E)")
    num_text, num_image = txt.q.shape[2], img.q.shape[2]
    txt_BLD, img_BND = attended_BSD.split([num_text, num_image], dim=1)
    return txt_BLD, img_BND


class JointBlock(nn.Module):
    """SD3, figure 2b."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.img = Stream(config)
        self.txt = Stream(config)

    def forward(
        self, img_BND: Tensor, txt_BLD: Tensor, vec_BD: Tensor, positions: Rotation | None, mask_BS: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        img_attn, img_mlp = self.img.modulation(vec_BD)
        txt_attn, txt_mlp = self.txt.modulation(vec_BD)
        txt_attended_BLD, img_attended_BND = joint_attention(
            self.txt.qkv(txt_BLD, txt_attn.shift_B1D, txt_attn.scale_B1D),
            self.img.qkv(img_BND, img_attn.shift_B1D, img_attn.scale_B1D),
            positions,
            mask_BS,
        )
        return (
            self.img.update(img_BND, img_attended_BND, img_attn, img_mlp),
            self.txt.update(txt_BLD, txt_attended_BLD, txt_attn, txt_mlp),
        )


class LastJointBlock(nn.Module):
    """The last block, whose text is only a source of keys and values."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.img = Stream(config)
        self.txt = Source(config)

    def forward(
        self, img_BND: Tensor, txt_BLD: Tensor, vec_BD: Tensor, positions: Rotation | None, mask_BS: Tensor | None
    ) -> Tensor:
        img_attn, img_mlp = self.img.modulation(vec_BD)
        _, attended_BND = joint_attention(
            self.txt.qkv(txt_BLD, *self.txt.modulation(vec_BD)),
            self.img.qkv(img_BND, img_attn.shift_B1D, img_attn.scale_B1D),
            positions,
            mask_BS,
        )
        return self.img.update(img_BND, attended_BND, img_attn, img_mlp)


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then a linear layer from tokens to patches."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.modulation = AdaLN(width)
        self.linear = Linear(width, out_features)

    def forward(self, img_BND: Tensor, vec_BD: Tensor) -> Tensor:
        shift, scale = self.modulation(vec_BD)
        return self.linear(modulate(layer_norm(img_BND), shift, scale))


class MMDiT(nn.Module):
    """Predicts the velocity ε − x_0 of rectified flow. Weights mean nothing until `init_weights` or a load."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        patch_features = config.patch_size**2 * config.in_channels
        self.img_in = Linear(patch_features, config.width)
        self.txt_in = Linear(config.context_dim, config.width)
        self.time_in = Embedder(TIMESTEP_SIZE, config.width)
        self.pooled_in = Embedder(config.pooled_dim, config.width)
        self.blocks = nn.ModuleList(JointBlock(config) for _ in range(config.depth - 1))
        self.last_block = LastJointBlock(config)
        self.final = FinalLayer(config.width, patch_features)

    def forward(
        self,
        latent_BCHW: Tensor,
        t_B: Tensor,
        context_BLD: Tensor,
        pooled_BD: Tensor,
        context_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """The velocity at time `t_B`, 0 (data) … 1 (noise), in the shape of the latent and the dtype of the weights.

        `context_BLD` has `context_dim` channels and `pooled_BD` `pooled_dim`. `context_mask_BL` is True at real text
        tokens; None means that all are. Raises ValueError when the latent's sides do not divide into patches or
        exceed the position table.
        """
        config, dtype = self.config, self.img_in.weight.dtype
        height, width = self._grid(latent_BCHW)

        img_BND = self.img_in(patchify(latent_BCHW.to(dtype), config.patch_size))
        txt_BLD = self.txt_in(context_BLD.to(dtype))
        vec_BD = self.time_in(timestep_embedding(t_B, TIMESTEP_SIZE).to(dtype)) + self.pooled_in(pooled_BD.to(dtype))

        positions = None
        if config.positions == "sincos":
            img_BND = img_BND + self._position_table(height, width, img_BND.device).to(dtype)
        else:
            ids_SK = axial_ids(txt_BLD.shape[1], height, width, img_BND.device)
            positions = rotation(ids_SK, (config.head_size // 2, config.head_size // 2))
        mask_BS = None if context_mask_BL is None else F.pad(context_mask_BL, (0, img_BND.shape[1]), value=True)

        for block in self.blocks:
            img_BND, txt_BLD = block(img_BND, txt_BLD, vec_BD, positions, mask_BS)
        img_BND = self.last_block(img_BND, txt_BLD, vec_BD, positions, mask_BS)
        return unpatchify(self.final(img_BND, vec_BD), height, width, config.patch_size)

    def _grid(self, latent_BCHW: Tensor) -> tuple[int, int]:
        H, W = latent_BCHW.shape[-2:]
        patch = self.config.patch_size
        if H % patch or W % patch:
            raise ValueError(f"a latent of {H}×{W} does not divide into patches of {patch}×{patch}")
        return H // patch, W // patch

    def _position_table(self, height: int, width: int, device: torch.device) -> Tensor:
        c = self.config
        rows, columns = (
            table_coordinates(side, c.position_table_size, c.position_base_size, c.position_origin, device)
            for side in (height, width)
        )
        return sincos_positions(rows, columns, c.width)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """DiT's initialisation (arXiv 2212.09748, §3.2), whatever the parameters held before.

        Xavier-uniform for linear layers, N(0, .02²) for the embedders of time and pooled text, zero for biases, for
        all modulation and for the last layer: the network starts as velocity 0 and each block as the identity.
        """
        generator = torch.Generator(self.img_in.weight.device).manual_seed(seed)
        embedders = {*self.time_in.modules(), *self.pooled_in.modules()}
        zero = {self.final.linear, *(m.linear for m in self.modules() if isinstance(m, AdaLN | Modulation))}
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Linear):
                nn.init.zeros_(module.bias)
                if module in zero:
                    nn.init.zeros_(module.weight)
                elif module in embedders:
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight, generator=generator)
