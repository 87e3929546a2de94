"""A model card: what was trained, on what, how captions went in, and code that draws."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from stack.flow.guidance import GuidanceConfig
from stack.models.keys import Family
from stack.models.mmdit import MMDiT
from stack.text.conditioning import EMPTY_CLIP_TOKENS, EMPTY_T5_TOKENS
from stack.text.encoders import CLIP_TOKENS, NAMES, TextConfig
from stack.train.sampler import SamplerConfig
from stack.train.snapshot import Snapshot
from stack.train.text_to_image import PreviewConfig

TITLES = {"t5": "T5", "clip_l": "CLIP-L", "clip_g": "CLIP-bigG"}
PIPELINES: dict[Family, str] = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}


class Subject(NamedTuple):
    """What is exported: a snapshot, and what is known of it."""

    run: Path
    snap: Snapshot
    network: MMDiT
    text: TextConfig
    samples: int | None
    """How many were trained on; None where the run's configuration is gone."""

    @property
    def family(self) -> Family:
        return "flux" if self.network.config.rope_axes else "sd3"

    @property
    def name(self) -> str:
        return self.run.resolve().name

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def size(self) -> tuple[int, int]:
        size: tuple[int, int] = self.snap.part(PreviewConfig, "sampling").size
        return size

    @property
    def sampling(self) -> SamplerConfig:
        sampling = self.snap.part(PreviewConfig, "sampling")
        return SamplerConfig(**sampling.model_dump(include=set(SamplerConfig.model_fields)))

    @property
    def encoders(self) -> list[str]:
        return [name for name in NAMES if getattr(self.text, name) is not None]


def summary(subject: Subject) -> str:
    """One sentence on the network and its training."""
    config = subject.network.config
    kind = "FLUX.1's form" if subject.family == "flux" else "SD3's form"
    single = f" and {config.single_depth} single-stream" if config.single_depth else ""
    trained = f" ({subject.samples:,} samples)" if subject.samples is not None else ""
    return (
        f"A text-to-image MM-DiT of {kind} with {subject.num_parameters:,} parameters ({config.depth} double-stream"
        f"{single} blocks of width {config.width}), trained on rectified flow for {subject.snap.step:,} steps"
        f"{trained}; the weights are the exponential moving average of that step."
    )


def captions(subject: Subject) -> str:
    """How captions went in while it was trained."""
    text = subject.text
    most = {"t5": text.t5_max_tokens, "clip_l": CLIP_TOKENS, "clip_g": CLIP_TOKENS}
    lengths = [f"{TITLES[name]} (at most {most[name]} tokens)" for name in subject.encoders]
    padded = "padded to these lengths, T5 without a mask" if text.pad == "full" else "without padding"
    tokens = "CLIP's tokens stand before T5's" if text.clip_tokens else "CLIP gives the pooled vector alone"
    pooled = "projected" if text.clip_projection else "the EOT state before the projection"
    return (
        f"Captions went into {', '.join(lengths)}, {padded} (`pad: {text.pad}`). In the context, {tokens}; the pooled "
        f"vector is {pooled}. What classifier-free guidance leaves out is zeros. Texts were cleaned before as "
        "open_clip does (`ftfy.fix_text`, HTML entities, white space), which the pipeline leaves to its caller."
    )


def differences(subject: Subject) -> list[str]:
    """Sentences on where the pipeline, left to encode a prompt, would do other than the training did."""
    text, flux = subject.text, subject.family == "flux"
    found = []
    if text.pad == "trim":
        found.append("It pads every caption, and the model has seen none padded.")
    if text.clip_tokens == flux:
        found.append(
            "Its context is T5's tokens alone, and the model's has CLIP's before them."
            if flux
            else "It puts CLIP's tokens before T5's, and the model's context is T5's alone."
        )
    if text.clip_projection == flux:
        wrong, right = ("before", "after") if flux else ("after", "before")
        found.append(f"It takes CLIP's pooled vector {wrong} the projection, and the model's is of {right} it.")
    return found


def write(subject: Subject, out: Path) -> None:
    """README.md, and preview.png where the run drew one at this step."""
    snap, sampling = subject.snap, subject.sampling
    preview, picture = subject.run / "samples" / f"{snap.step:08d}.png", ""
    if preview.is_file():
        shutil.copyfile(preview, out / "preview.png")
        picture = "\n![Samples of the training run at this step](preview.png)\n"
    sources = {"autoencoder": snap.metadata["autoencoder"], **{n: getattr(subject.text, n) for n in subject.encoders}}
    rows = [(name, source, snap.metadata["encoders"][name]) for name, source in sources.items()]
    encoders = "\n".join(f"| {name} | {_shown(source)} | `{sha256}` |" for name, source, sha256 in rows)
    own = "" if sampling.solver == "euler" else f" The run itself draws with the solver {sampling.solver}, not Euler's."
    if sampling.guidance != GuidanceConfig(scale=sampling.guidance.scale):
        own += " Its guidance has more than a scale, which the pipeline leaves out."
    text = f"""\
---
library_name: diffusers
pipeline_tag: text-to-image
---

# {subject.name}, step {snap.step:,}

{summary(subject)}
{picture}
## Use

{_how(subject)}

```python
{snippet(subject)}```

The time grid is {sampling.steps} even steps, moved by the scheduler's shift of {sampling.shift}.{own}

## Captions and encoders

{captions(subject)}

| part | source | sha256 |
|---|---|---|
{encoders}
"""
    (out / "README.md").write_text(text, encoding="utf-8")


def _shown(source: str) -> str:
    """A hub id, or the last part of a local path."""
    return Path(source).name if Path(source).is_dir() else source


def _how(subject: Subject) -> str:
    pipeline, differs = PIPELINES[subject.family], differences(subject)
    if not differs:
        return (
            f"`{pipeline}` encodes a prompt as this model was trained, given the length below; the zeros take the "
            "place of a negative prompt."
        )
    listed = "\n".join(f"- {difference}" for difference in differs)
    return (
        f"**`{pipeline}` does not encode a prompt as this model was trained.**\n\n{listed}\n\n"
        "So hand it embeddings, as here."
    )


def _empty_tokens(subject: Subject) -> int:
    """How many tokens of zeros guidance's empty caption has, where it is not as many as the prompt."""
    text = subject.text
    if text.pad == "full" or subject.sampling.guidance.scale == 1:
        return 0
    return EMPTY_CLIP_TOKENS * text.clip_tokens + EMPTY_T5_TOKENS * (text.t5 is not None)


def snippet(subject: Subject) -> str:
    """Code that draws an image as the run does. Tests run it."""
    pipeline, sampling, (width, height) = PIPELINES[subject.family], subject.sampling, subject.size
    flux, empty = subject.family == "flux", _empty_tokens(subject)
    # diffusers wants an absent encoder said twice: in model_index.json and here.
    absent = ", text_encoder_3=None, tokenizer_3=None" if not flux and subject.text.t5 is None else ""
    arguments = ["prompt_embeds=embeds", "pooled_prompt_embeds=pooled"]
    if sampling.guidance.scale != 1 and not empty:
        arguments.append("negative_prompt_embeds=torch.zeros_like(embeds)")
        arguments.append("negative_pooled_prompt_embeds=torch.zeros_like(pooled)")
    arguments.append(f"{'true_cfg_scale' if flux else 'guidance_scale'}={1.0 if empty else sampling.guidance.scale}")
    if subject.network.config.guidance_embedding:
        arguments.append(f"guidance_scale={sampling.embedded_guidance}")
    given = ",\n    ".join(arguments)
    return f"""\
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(".", dtype=torch.float32{absent})  # this folder; its parts differ in dtype
prompt = "a red circle"
{_own_encoding(subject) if differences(subject) else _pipelines_encoding(subject)}\
{_own_guidance(subject) if empty else ""}
steps = {sampling.steps}
image = pipe(
    {given},
    num_inference_steps=steps,
    sigmas=[1 - i / steps for i in range(steps)],
    height={height},
    width={width},
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("image.png")
"""


def _own_guidance(subject: Subject) -> str:
    count = _empty_tokens(subject)
    tokens = f"{count} token{'s' * (count > 1)}"
    ids = f'    inputs["txt_ids"] = inputs["txt_ids"][:{count}]\n' if subject.family == "flux" else ""
    return f"""\

predict = pipe.transformer.forward


def guided(encoder_hidden_states, pooled_projections, **inputs):
    # An empty caption was {tokens} of zeros in training; the pipeline's guidance takes as many as the prompt has.
    (full,) = predict(encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections, **inputs)
    embeds, pooled = torch.zeros_like(encoder_hidden_states[:, :{count}]), torch.zeros_like(pooled_projections)
{ids}    (empty,) = predict(encoder_hidden_states=embeds, pooled_projections=pooled, **inputs)
    return (empty + {subject.sampling.guidance.scale} * (full - empty),)


pipe.transformer.forward = guided
"""


def _pipelines_encoding(subject: Subject) -> str:
    length = subject.text.t5_max_tokens if subject.text.t5 is not None else 0
    if subject.family == "flux":
        outputs, arguments = "embeds, pooled, _", "prompt"
    else:
        outputs, arguments = "embeds, _, pooled, _", "prompt, None, None, do_classifier_free_guidance=False"
    return f"""\
with torch.no_grad():
    {outputs} = pipe.encode_prompt({arguments}, max_sequence_length={length})
"""


def _own_encoding(subject: Subject) -> str:
    """A prompt as `stack.text.conditioning.join` makes a context of it."""
    text, flux = subject.text, subject.family == "flux"
    padding = repr("max_length" if text.pad == "full" else False)
    clips = ["(pipe.tokenizer, pipe.text_encoder)"] + ["(pipe.tokenizer_2, pipe.text_encoder_2)"] * (not flux)
    parts, number = [], 2 if flux else 3
    if text.clip_tokens:
        parts.append("torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)")
    if text.t5 is not None:
        ids = f"tokenize(pipe.tokenizer_{number}, {text.t5_max_tokens})"
        parts.append(f"pipe.text_encoder_{number}({ids}).last_hidden_state")
    context = ",\n        ".join(parts)
    pooled = "text_embeds" if text.clip_projection else "pooler_output"
    return f"""\


def tokenize(tokenizer, length):
    settings = dict(padding={padding}, truncation=True, max_length=length, return_tensors="pt")
    return tokenizer(prompt, **settings).input_ids


with torch.no_grad():
    encoders = [{", ".join(clips)}]
    clips = [encoder(tokenize(tokenizer, {CLIP_TOKENS}), output_hidden_states=True) for tokenizer, encoder in encoders]
    context = [
        {context},
    ]
width = pipe.transformer.config.joint_attention_dim
context = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in context]
embeds = torch.cat(context, dim=1)
pooled = torch.cat([clip.{pooled} for clip in clips], dim=-1)
"""
