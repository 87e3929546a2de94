"""Which noise goes with which data.

Shapes: x_0 and ε are [B, …].
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stack.config import Config, UserError
from stack.flow.noise import Draws


class CouplingConfig(Config):
    """independent: noise of its own for each sample.

    The next two go by distance alone: with labels or captions, noise is then no longer independent of those.

    immiscible: of `candidates` draws the one nearest to the sample (arXiv 2505.18521, §3, the cheap form of immiscible
    diffusion's assignment). A function of the sample alone, but the noise that is trained on is no longer exactly
    normal: with more candidates it moves towards the data.

    optimal_transport: within the global batch the assignment of least Σ‖x_0 − ε‖² (minibatch OT-CFM, arXiv 2302.00482,
    §3.2.5). It needs the whole batch in one place: one rank, no accumulation.

    paired: what stands at t = 1 is data, too, one for each sample; a flow from images to images (rectified flow between
    two distributions, arXiv 2209.03003). It leads from the one distribution to the other; where the lines of two pairs
    cross, it turns from the one to the other, and does not end at the start's own partner.
    """

    kind: Literal["independent", "immiscible", "optimal_transport", "paired"] = "independent"
    candidates: int = Field(default=4, ge=2)
    """Of immiscible."""

    def noise(self, x0: Tensor, draws: Draws, batch_size: int | None) -> Tensor:
        """ε [B, …] for the samples x_0 [B, …] of `draws`, in float32 on the device of x_0.

        batch_size: the global one; None in validation, where optimal_transport leaves each sample its own noise.
        Raises UserError where optimal_transport does not see the whole batch, ValueError for paired.
        """
        if self.kind == "paired":
            raise ValueError("coupling.kind=paired draws no noise: at t = 1 stands the second image of each sample")
        shape = tuple(x0.shape[1:])
        if self.kind == "immiscible":
            streams = [f"noise{i or ''}" for i in range(self.candidates)]
            drawn_NB = torch.stack([draws.normal(stream, shape) for stream in streams]).to(x0.device)
            nearest_B = (drawn_NB - x0).square().flatten(2).sum(2).argmin(0)
            return drawn_NB[nearest_B, torch.arange(len(x0), device=x0.device)]
        eps = draws.normal("noise", shape).to(x0.device)
        if self.kind == "optimal_transport" and batch_size is not None:
            if len(x0) != batch_size:
                raise UserError(
                    f"objective.coupling.kind=optimal_transport pairs the whole batch of {batch_size}, and a rank has "
                    f"{len(x0)} of it at once: train on one rank with parallel.accumulate=1, or take kind=immiscible"
                )
            return eps[assignment(x0, eps)]
        return eps


def assignment(x0: Tensor, eps: Tensor) -> Tensor:
    """The permutation of ε [B, …] of least Σ‖x_0 − ε‖² (arXiv 2302.00482, §3.2.5), int64 [B]: row i of x_0 [B, …] goes
    with row `assignment[i]` of ε."""
    from scipy.optimize import linear_sum_assignment

    cost_BB = torch.cdist(x0.flatten(1).double(), eps.flatten(1).double()).square()
    return torch.from_numpy(linear_sum_assignment(cost_BB.cpu().numpy())[1]).to(x0.device)
