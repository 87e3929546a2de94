"""T5 over captions: our encoders, and the pipelines' way, each caption padded to 256 tokens and no mask."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import members, shards_of
from peers import Pass
from torch import Tensor

from stack.data.schema import to_float8
from stack.text import tokenizer
from stack.text.encoders import TextConfig, TextEncoders, write_untrained_encoders

MAX_TOKENS = 256
BATCH = 64
LONG_TOKENS = 35  # tokens of a caption as large sets have them


def read_captions(source: Path) -> list[str]:
    return [data.decode() for shard in shards_of(source) for data in members(shard, ".txt")]


def token_lengths(captions: Sequence[str]) -> list[int]:
    pieces = tokenizer.load(tokenizer.CAPTION_TOKENIZER)
    return [len(pieces.encode(caption).ids) for caption in captions]


def some_captions(captions: Sequence[str], count: int) -> list[str]:
    return random.Random(0).sample(list(captions), count)


def long_captions(captions: Sequence[str], count: int) -> list[str]:
    """Captions one behind the other until they have between half of and one and a half times `LONG_TOKENS` tokens."""
    pieces, draws = tokenizer.load(tokenizer.CAPTION_TOKENIZER), random.Random(0)
    results = []
    for _ in range(count):
        wanted, caption = draws.randint(LONG_TOKENS // 2 + 1, LONG_TOKENS * 3 // 2), ""
        while len(pieces.encode(caption).ids) < wanted:
            caption = f"{caption}, {draws.choice(captions)}" if caption else draws.choice(captions)
        results.append(caption)
    return results


class T5:
    """Random weights of T5-small's sizes, in `folder`, loaded once for both sides."""

    def __init__(self, folder: Path):
        import transformers

        config = write_untrained_encoders(folder, seed=0)
        assert config.t5 is not None
        sizes = transformers.T5Config(
            vocab_size=tokenizer.load(tokenizer.CAPTION_TOKENIZER).get_vocab_size(),
            d_model=512,
            d_kv=64,
            num_heads=8,
            d_ff=2048,
            num_layers=6,
            use_cache=False,
        )
        torch.manual_seed(0)
        model = transformers.T5EncoderModel(sizes)
        model.save_pretrained(config.t5)
        text = TextConfig(t5=config.t5, clip_l=config.clip_l, t5_max_tokens=MAX_TOKENS, batch_size=BATCH)
        self._encoders = TextEncoders(text)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(config.t5)
        self._model: Any = transformers.T5EncoderModel.from_pretrained(config.t5).eval()

    def ours(self, captions: Sequence[str]) -> list[Tensor]:
        """With the small CLIP that a configuration must have, which the other side is spared."""
        encoded = [text.t5 for text in self._encoders.encode(captions)]
        return [t5 for t5 in encoded if t5 is not None]

    @torch.inference_mode()
    def padded(self, captions: Sequence[str], masked: bool = False) -> list[Tensor]:
        """As diffusers' `_get_t5_prompt_embeds`, [256, D] each; `masked` is what it leaves out."""
        results: list[Tensor] = []
        for start in range(0, len(captions), BATCH):
            inputs = self._tokenizer(
                captions[start : start + BATCH],
                padding="max_length",
                max_length=MAX_TOKENS,
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            mask = inputs.attention_mask if masked else None
            results += self._model(inputs.input_ids, attention_mask=mask)[0].unbind()
        return results

    def largest_difference(self, captions: Sequence[str]) -> float:
        """Between ours and the true tokens of captions padded and masked."""
        pairs = zip(self.ours(captions), self.padded(captions, masked=True), strict=True)
        return max(float((ours - padded[: len(ours)]).abs().max()) for ours, padded in pairs)

    def float8_error(self, captions: Sequence[str]) -> float:
        """Root mean square of what float8 loses, relative to the embeddings' own."""
        exact_LD = torch.cat(self.ours(captions)).float()
        stored_LD, scale_L = to_float8(exact_LD)
        return float((stored_LD.float() * scale_L[:, None] - exact_LD).norm() / exact_LD.norm())


def timed(encode: Callable[[Sequence[str]], list[Tensor]], captions: Sequence[str]) -> Callable[[], Pass]:
    def once() -> Pass:
        wall, processor = time.perf_counter(), time.process_time()
        encode(captions)
        return Pass(time.perf_counter() - wall, time.process_time() - processor)

    return once
