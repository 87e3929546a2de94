"""DiT: "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), in diffusers' blocks, for images with labels.

B batch · C channels · H W height, width · D width
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from stack.config import Config, UserError
from stack.nn.embed import Embedder, timestep_embedding

TIMESTEP_SIZE = 256

# fmt: off
PRESETS: dict[str, dict[str, int]] = {  # the paper's table 1; its "XL/2" is preset xl with patch_size 2
    "s":  {"depth": 12, "width":  384, "num_heads":  6},
    "b":  {"depth": 12, "width":  768, "num_heads": 12},
    "l":  {"depth": 24, "width": 1024, "num_heads": 16},
    "xl": {"depth": 28, "width": 1152, "num_heads": 16},
}
# fmt: on


class DiTConfig(Config):
    """The network. A `preset` gives a row of values; keys that are written out win over it."""

    kind: Literal["dit"] = "dit"
    preset: Literal["s", "b", "l", "xl"] | None = None
    depth: PositiveInt
    width: PositiveInt
    num_heads: PositiveInt
    patch_size: PositiveInt = 2

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return {**PRESETS.get(str(values.get("preset")), {}), **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_sizes(self) -> DiTConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        if self.width % 4:
            raise ValueError(f"sin-cos positions need a width divisible by 4, got {self.width}")
        return self


class _Given(nn.Module):
    """Stands where each of diffusers' blocks has embeddings of its own: DiT computes them once for all blocks."""

    def forward(self, conditioning_BD: Tensor, *_: Any, **__: Any) -> Tensor:
        return conditioning_BD


class DiT(nn.Module):
    """(x [B, C, H, W], t [B] in 0…1, label [B]) → [B, C, H, W]; the label `num_classes` stands for none.

    channels, side: of the images, all of one size and square. Its weights are drawn from torch's generator. Raises
    UserError where `side` does not divide into patches.
    """

    def __init__(self, config: DiTConfig, channels: int, side: int, num_classes: int) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__()
        if side % config.patch_size:
            raise UserError(
                f"images of {side}×{side} do not divide into objective.model.patch_size={config.patch_size}"
            )
        self.config = config
        self.time_in = Embedder(TIMESTEP_SIZE, config.width)
        self.label_in = nn.Embedding(num_classes + 1, config.width)
        transformer: Any = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.width // config.num_heads,
            in_channels=channels,
            num_layers=config.depth,
            sample_size=side,
            patch_size=config.patch_size,
            num_embeds_ada_norm=1,
            norm_eps=1e-6,
        )
        self.transformer = transformer
        for block in transformer.transformer_blocks:
            block.norm1.emb = _Given()
        self._init_weights()

    def forward(self, x_BCHW: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        dtype = self.label_in.weight.dtype
        conditioning_BD = self.time_in(timestep_embedding(t_B, TIMESTEP_SIZE).to(dtype)) + self.label_in(label_B)
        return self.transformer(x_BCHW.to(dtype), timestep=conditioning_BD, return_dict=False)[0]

    def _init_weights(self) -> None:
        """As in the paper, §3.2, and its code.

        | parameters                                       | values         |
        |--------------------------------------------------|----------------|
        | biases, all modulation, the last layer           | 0              |
        | embedders of time and label                      | N(0, .02²)     |
        | other linear layers, patches                     | Xavier-uniform |

        So the network starts as 0 and each block as the identity.
        """
        blocks = self.transformer.transformer_blocks
        zero = {block.norm1.linear for block in blocks} | {self.transformer.proj_out_1, self.transformer.proj_out_2}
        embedders = {self.time_in.inner, self.time_in.outer, self.label_in}
        for module in self.modules():
            if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                continue
            if not isinstance(module, nn.Embedding):
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            if module in zero:
                nn.init.zeros_(module.weight)
            elif module in embedders:
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
