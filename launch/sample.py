"""`mmdit sample`."""

from __future__ import annotations

from pathlib import Path

import click

from launch.arguments import PATH, SEED
from launch.sampling import options


@click.command("sample")
@click.argument("run", type=PATH)
@click.argument("prompt", required=False)
@click.option("--prompts", type=PATH, help="A text file, one prompt a line: a grid is drawn.")
@click.option("-o", "--out", type=PATH, default=Path("sample.png"), show_default=True)
@click.option(
    "--image",
    "starts",
    multiple=True,
    type=PATH,
    help="Begin with this image, cut to the first bucket, where the run leads from images; several make a grid."
    " PROMPT is then a label for all.",
)
@options
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--size", help="WIDTHxHEIGHT in pixels.")
@click.option("--step", type=int, help="Snapshot of this training step; the newest if not given.")
@click.option("--weak", type=int, help="Step of the snapshot that guidance.autoguidance leads away from.")
def command(
    run: Path,
    prompt: str | None,
    prompts: Path | None,
    out: Path,
    starts: tuple[Path, ...],
    seed: int,
    size: str | None,
    step: int | None,
    weak: int | None,
    sampling: tuple[str, ...],
) -> None:
    """Draw an image for PROMPT (or a grid for a file of prompts) with the averaged weights of RUN. Of a run that knows
    classes, a PROMPT is a label.

    What is not given is as in the run's own sample grids.
    """
    import numpy as np
    from PIL import Image

    from stack import dist
    from stack.config import UserError, load
    from stack.evaluate.sample import draw_labels, load_sampler
    from stack.files import publish
    from stack.text.prompts import check, encode, read
    from stack.train import snapshot
    from stack.train.class_to_image import ClassToImageConfig
    from stack.train.pictures import contact_sheet
    from stack.train.sampler import SamplerConfig
    from stack.train.text_to_image import PreviewConfig

    if (prompts is not None) + bool(starts or prompt is not None) != 1:
        raise UserError("give either a PROMPT, --image FILE, or both, or --prompts FILE")
    if prompts is not None:
        texts = read(prompts)
    else:
        texts = ["0" if prompt is None else prompt] * max(len(starts), 1)  # a run without classes has one label, 0
        check(texts)
    snap, worse = snapshot.read(run, step), None if weak is None else snapshot.read(run, weak)
    if snap.metadata["kind"] == "class_to_image":
        if size is not None:
            raise UserError("--size: images of labels have the size of the training's")
        if prompt is prompts is None and snap.part(ClassToImageConfig, "objective").classes:
            raise UserError(f"{run}: knows classes: give a PROMPT, the label of what is drawn")
        images = draw_labels(snap, [_label(text) for text in texts], sampling, seed, worse, starts)
    else:
        if starts:
            raise UserError(f"{run}: draws images from noise and a PROMPT: leave out --image")
        sampler, encoders = load_sampler(snap, dist.device(), worse)
        width, height = _sides(size) or snap.part(PreviewConfig, "sampling").size
        values = {key: value for key, value in snap.metadata["sampling"].items() if key != "size"}
        config = load(SamplerConfig, values, sampling)
        images = sampler.sample(encode(texts, encoders), (width, height), config, range(len(texts)), seed)
    if prompts is not None or len(images) > 1:
        picture = contact_sheet(images, [start.name for start in starts] or texts)
    else:
        picture = Image.fromarray(np.asarray(images[0]))
    with publish(out) as temporary:
        picture.save(temporary, format=Image.registered_extensions().get(out.suffix.lower(), "PNG"))
    click.echo(f"{out}: {len(texts)} image{'s' * (len(texts) > 1)}, snapshot of step {snap.step}")


def _label(text: str) -> int:
    if not text.isdecimal():  # isdigit knows ², int does not
        raise click.BadParameter(f"{text!r} is no label: this run knows classes, 0, 1, …", param_hint="PROMPT")
    return int(text)


def _sides(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"{size!r} is not of the form WIDTHxHEIGHT", param_hint="--size")
    return int(width), int(height)
