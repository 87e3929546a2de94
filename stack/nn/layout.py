"""How the tokens of a batch lie in memory, so that no caption's padding is ever computed.

Every sample has the same number of image tokens and a number of text tokens of its own. Captions of one length stand
as a batch [B, L, D]; captions of different lengths in one row, [1, T, D], sample after sample. Image tokens are
always a batch [B, N, D]. In attention the text of each sample is followed by its image: [B, L + N, D], or one row of
T + B·N tokens. So a packed row looks like a batch of one, and layers need not know which of the two they have.

B batch · L text tokens of each sample, T of all · N image tokens of each sample · S text and image tokens · D width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stack.nn.rope import Rotation


class Packing(NamedTuple):
    """Captions of different lengths in one row."""

    starts: Tensor
    """Where the samples begin in the joint row, and its end: int32 [B + 1] on the CPU, where the lengths are known."""
    offsets: Tensor
    """The same on the device."""
    longest: int
    """Tokens of the longest sample."""
    sample_of_T: Tensor
    """The sample of each text token."""
    sample_of_S: Tensor
    """The sample of each token of the joint row."""
    block_mask: Any = None
    """FlexAttention's form of it, where that is the backend."""


class Layout(NamedTuple):
    """`packing` is None where all captions have one length."""

    num_image: int
    packing: Packing | None
    backend: str
    """Which implementation `stack.nn.attention.attend` takes."""

    @classmethod
    def of(cls, lengths: Sequence[int], num_image: int, device: torch.device, backend: str) -> Layout:
        """For captions of `lengths` tokens, each followed by `num_image` image tokens."""
        if len(set(lengths)) == 1:
            return cls(num_image, None, backend)
        text_B = torch.tensor(lengths)
        starts = F.pad((text_B + num_image).cumsum(0), (1, 0)).int()
        samples_B = torch.arange(len(lengths))
        sample_of_T = samples_B.repeat_interleave(text_B).to(device, non_blocking=True)
        sample_of_S = samples_B.repeat_interleave(text_B + num_image).to(device, non_blocking=True)
        packing = Packing(
            starts,
            starts.to(device, non_blocking=True),
            max(lengths) + num_image,
            sample_of_T,
            sample_of_S,
            document_mask(sample_of_S) if backend == "flex" else None,
        )
        return cls(num_image, packing, backend)

    def image(self) -> Layout:
        """Of the image tokens alone."""
        return Layout(self.num_image, None, self.backend)

    def text_rows(self, text_TD: Tensor, batch: int) -> Tensor:
        """Text tokens [T, D], sample after sample, in the form that layers take: [B, L, D] or [1, T, D]."""
        return text_TD.unflatten(0, (batch, -1)) if self.packing is None else text_TD[None]

    def for_text(self, vec_BD: Tensor) -> Tensor:
        """A vector for each sample, to be broadcast over its text tokens: [B, 1, D] or [1, T, D]."""
        return vec_BD[:, None] if self.packing is None else _Spread.apply(vec_BD, self.packing.sample_of_T)

    def for_joint(self, vec_BD: Tensor) -> Tensor:
        """The same for text and image tokens: [B, 1, D] or [1, S, D]."""
        return vec_BD[:, None] if self.packing is None else _Spread.apply(vec_BD, self.packing.sample_of_S)

    def joint_rotation(self, image: Rotation, num_text: int, batch: int) -> Rotation:
        """Of text and image tokens, from that of an image [N, E/2]; text is not turned."""
        if self.packing is None:
            batch = 1
        still = image.cos.new_zeros(1, num_text, image.cos.shape[-1])
        cos, sin = (table.expand(batch, -1, -1) for table in image)
        return Rotation(self.merge(still + 1, cos), self.merge(still, sin))

    def merge(self, txt: Tensor, img: Tensor) -> Tensor:
        """Text [B, L, …] or [1, T, …] and image [B, N, …] → [B, L + N, …] or [1, T + B·N, …]."""
        if self.packing is None:
            return torch.cat([txt, img], dim=1)
        return interleave(txt, img, self.packing.starts)

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `merge`."""
        if self.packing is None:
            return joint[:, : -self.num_image], joint[:, -self.num_image :]
        return separate(joint, self.packing.starts, self.num_image)


def document_mask(sample_of_S: Tensor, block: int = 128) -> Any:
    """FlexAttention's `BlockMask` of a row of samples, from its block borders: the S × S mask is never made."""
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens = len(sample_of_S)
    first = sample_of_S[::block]
    last = sample_of_S[(torch.arange(len(first), device=first.device) * block + block - 1).clamp(max=num_tokens - 1)]
    meets = (first[:, None] <= last) & (last[:, None] >= first)
    alone = first == last
    alone[-1] &= num_tokens % block == 0
    full = meets & alone[:, None] & alone
    blocks: list[Tensor] = []
    for chosen in (meets & ~full, full):
        order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        blocks += [chosen.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]]
    count, order, full_count, full_order = blocks
    return BlockMask.from_kv_blocks(
        count,
        order,
        full_count,
        full_order,
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, q, k: sample_of_S[q] == sample_of_S[k],
        seq_lengths=(num_tokens, num_tokens),
    )


class _Spread(torch.autograd.Function):
    """Row `sample_of[i]` of vec for each i. The gradient is a matrix product: deterministic on a GPU, unlike adding
    to indices."""

    @staticmethod
    def forward(ctx: Any, vec_BD: Tensor, sample_of: Tensor) -> Tensor:
        ctx.save_for_backward(sample_of)
        ctx.batch = len(vec_BD)
        return vec_BD.index_select(0, sample_of)[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (sample_of,) = ctx.saved_tensors
        members = sample_of[None] == torch.arange(ctx.batch, device=sample_of.device)[:, None]
        return members.to(grad.dtype) @ grad[0], None


# Custom operators, so that a compiled model does not depend on the lengths.


@torch.library.custom_op("mmdit::interleave", mutates_args=())
def interleave(txt: Tensor, img: Tensor, starts: Tensor) -> Tensor:
    """Text [1, T, …] and images [B, N, …] → [1, S, …], each sample's text before its image."""
    lengths = (starts.diff() - img.shape[1]).tolist()
    return torch.cat([piece for pair in zip(txt.split(lengths, 1), img.split(1), strict=True) for piece in pair], 1)


@torch.library.custom_op("mmdit::separate", mutates_args=())
def separate(joint: Tensor, starts: Tensor, num_image: int) -> tuple[Tensor, Tensor]:
    """The inverse of `interleave`."""
    samples = joint.split(starts.diff().tolist(), 1)
    return (
        torch.cat([sample[:, :-num_image] for sample in samples], 1),
        torch.cat([sample[:, -num_image:] for sample in samples]),
    )


@interleave.register_fake
def _(txt: Tensor, img: Tensor, starts: Tensor) -> Tensor:
    return txt.new_empty(1, txt.shape[1] + img.shape[0] * img.shape[1], *txt.shape[2:])


@separate.register_fake
def _(joint: Tensor, starts: Tensor, num_image: int) -> tuple[Tensor, Tensor]:
    batch = starts.shape[0] - 1
    rest = joint.shape[2:]
    num_text = joint.shape[1] - batch * num_image
    return joint.new_empty(1, num_text, *rest), joint.new_empty(batch, num_image, *rest)


def _interleave_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, img, starts = inputs
    ctx.save_for_backward(starts)
    ctx.num_image = img.shape[1]


def _interleave_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *separate(grad, ctx.saved_tensors[0], ctx.num_image), None


def _separate_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])


def _separate_backward(ctx: Any, grad_txt: Tensor, grad_img: Tensor) -> tuple[Tensor, None, None]:
    return interleave(grad_txt, grad_img, ctx.saved_tensors[0]), None, None


interleave.register_autograd(_interleave_backward, setup_context=_interleave_context)
separate.register_autograd(_separate_backward, setup_context=_separate_context)
