"""What differs between pre-training, autoencoder training and distillation: an Objective. The loop is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

from stack.flow.noise import Draws


@dataclass
class Losses:
    total: Tensor
    """The micro-batch's mean loss, to be differentiated (scalar)."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Further scalars to log."""
    flop: int | None = None
    """Floating-point operations of the forward and backward pass, where they are known."""
    by_time: tuple[Tensor, Tensor] | None = None
    """Each sample's loss and timestep [B], where there is one."""


class Batch(Protocol):
    """One rank's micro-batch; `step` and `positions` name its samples in the batch plan."""

    step: int
    positions: list[int]
    keys: list[str]

    def to(self, device: torch.device) -> Any: ...


class Objective(Protocol):
    network: nn.Module
    """What is trained. `loss` gets it back wrapped by the engine, `validate` and `preview` with averaged weights."""

    def loss(self, network: nn.Module, batch: Any, draws: Draws) -> Losses:
        """All randomness comes from `draws`, a function of (seed, step, position)."""

    def validate(self, network: nn.Module, batch: Any, draws: Draws) -> Tensor:
        """The loss of each sample [B] at a level that depends on its position alone."""

    def preview(self, network: nn.Module, limit: int | None = None) -> Image:
        """A picture that shows a person what has been learnt (the sample grid, reconstructions).

        limit: the number of images, to try the settings; all if None.
        """

    def metadata(self) -> dict[str, Any]:
        """What a reader of the snapshot needs beside the weights."""
