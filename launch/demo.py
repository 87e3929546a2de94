"""`mmdit demo`: every stage in turn, each the command that a user would type."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from launch.arguments import LOCATION, PATH
from launch.budget import CALIBRATION_STEPS, Need, Plan, Time, plan, plan_again, shortfalls, step_time

CONFIGS = Path(os.path.relpath(Path(__file__).parents[1] / "configs"))
DEFAULT_MINUTES = 19.5
AUTOENCODER_SHARE, AUTOENCODER_MOST = 0.22, 0.5
"""Shares of the time budget: the autoencoder's usual one, and its largest if the usual one is too short."""
NEEDS = {
    "autoencoder": Need(1500, "its pictures lack colours and edges, and so do all samples"),
    "train": Need(1000, "the samples show little of their prompts"),
}
RESERVE_SECONDS = {"scenes": 60.0, "shards": 30.0}
"""Kept back for what follows training: samples, evaluation, export, report."""
NUM_SCENES = 96
NUM_PROMPTS = 16

SCENE_PROMPTS = [
    f"a {size}{colour} {kind} {place}"
    for size, colour, kind, place in (
        ("", "red", "circle", "at the left"), ("large ", "green", "square", "in the centre"),
        ("", "cyan", "triangle", "at the top"), ("small ", "yellow", "star", "at the right"),
        ("", "purple", "triangle", "at the bottom"), ("", "red", "circle", "in the centre"),
        ("", "blue", "star", "at the right"), ("", "green", "triangle", "at the right"),
        ("", "yellow", "triangle", "at the bottom"), ("", "purple", "square", "in the centre"),
    )
] + [
    "a red circle to the left of a blue square", "a yellow star above a green circle",
    "a cyan square below a red triangle", "a purple square to the right of a yellow circle",
    "a small red star at the left on a black background", "a grey background with a large cyan circle in the centre",
]  # fmt: skip


class Demo:
    """Runs stages once each. A stage was finished before if it and all stages above were the same commands with equal
    configurations; what another one left is removed, and what the same one left half done it goes on with."""

    def __init__(self, out: Path):
        self.out = out
        self.path = out / "stages.json"
        self.done = self._read()
        self.chain = ""
        self.notes: list[str] = []
        """What a training lacked."""

    def _read(self) -> dict[str, Any]:
        from stack.config import UserError

        try:
            done = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            done = None
        if not isinstance(done, dict) or not all(isinstance(record, dict) for record in done.values()):
            raise UserError(f"{self.path}: damaged; remove it, and all stages are done again")
        return done

    def stage(self, name: str, arguments: list[str], output: Path, content: str = "") -> None:
        """Run `mmdit ARGUMENTS`, which makes `output`, or skip it. Exits with its exit code where it fails.

        content: what stands in the files that the command reads, beside what earlier stages made.
        """
        command = shlex.join(["mmdit", *arguments])
        self.chain = self._mark(command, content)
        known = self.done.get(name, {})
        if known.get("chain") != self.chain:
            shutil.rmtree(output, ignore_errors=True)
            known = {"seconds": 0.0, "peak_rss_gb": 0.0}
        elif known["finished"]:
            click.echo(f"{name}: finished before, skipped", err=True)
            return
        click.echo(f"{name}: {command}", err=True)
        self.done[name] = {**known, "chain": self.chain, "command": command, "finished": False}
        self._save()
        outcome = run(arguments)
        self.done[name] |= {
            "finished": outcome.code == 0,
            "seconds": known["seconds"] + outcome.seconds,
            "peak_rss_gb": max(known["peak_rss_gb"], outcome.peak_rss_gb),
        }
        self._save()
        outcome.exit_unless_done()

    def value(self, name: str, content: str, measure: Callable[[], Any]) -> Any:
        """What is measured once for `content` and kept, so that running again goes on with the same."""
        values = self.done.setdefault("values", {})
        mark = self._mark(name, content)
        if values.get(name, {}).get("mark") != mark:
            values[name] = {"mark": mark, "value": measure()}
            self._save()
        return values[name]["value"]

    def keep(self, name: str, value: Any) -> None:
        """Put `value` in the place of the one that was measured."""
        self.done["values"][name]["value"] = value
        self._save()

    def _mark(self, *parts: str) -> str:
        return hashlib.sha256("\n".join((self.chain, *parts)).encode()).hexdigest()

    def _save(self) -> None:
        from stack.files import publish

        with publish(self.path) as temporary:
            temporary.write_text(json.dumps(self.done, indent=1), encoding="utf-8")


class Outcome(NamedTuple):
    """Of a command: exit code, time, and the peak memory of all processes of this program together."""

    code: int
    seconds: float
    peak_rss_gb: float

    def exit_unless_done(self) -> None:
        if self.code:
            click.echo(f"mmdit demo: stopped; the same command goes on from here (exit code {self.code})", err=True)
            sys.exit(self.code if self.code > 0 else 1)


def run(arguments: list[str]) -> Outcome:
    """`mmdit ARGUMENTS` in a process of its own."""
    from launch.environment import MALLOC, die_with_parent

    began = time.monotonic()
    with peak_memory() as peak:
        try:
            code = subprocess.run(
                [sys.executable, "-m", "launch.cli", *arguments],
                env={**MALLOC, **os.environ},
                check=False,
                preexec_fn=die_with_parent,
            ).returncode
        except KeyboardInterrupt:
            code = 130
    return Outcome(code, time.monotonic() - began, peak[0])


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Watches the resident memory of this process and all below it; the list holds its peak in GB."""
    import psutil

    peak, over = [0.0], threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not over.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total / 1e9)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def seconds_per_step(out: Path, arguments: list[str]) -> float:
    """Time a step takes, from a short run that is thrown away."""
    scratch = out / "calibration"
    shutil.rmtree(scratch, ignore_errors=True)
    settings = (f"schedule.steps={CALIBRATION_STEPS}", "log.every=1", "log.wandb=disabled", "snapshot.every=1000000")
    run([*arguments, f"run.dir={scratch}", "checkpoint.every=1000000", *settings]).exit_unless_done()
    measured = _step_time(scratch)
    shutil.rmtree(scratch)
    return measured


def _step_time(run: Path) -> float:
    from stack.log import read_metrics

    return step_time([line["step_s"] for line in read_metrics(run) if "step_s" in line])


def train(demo: Demo, name: str, arguments: list[str], output: Path, content: str, time: Time) -> None:
    """A stage that trains for the time that it has: the steps are set by the measured time of a step. Where that was
    measured on a busy machine and the training ends early, it is done again with more steps.

    content: of the configuration, and what else decides about the steps.
    """
    need, key, parent = NEEDS[name], f"{name} plan", demo.chain
    decides = f"{shlex.join(arguments)}\n{content}"
    kept = demo.value(key, decides, lambda: (time, plan(time, seconds_per_step(demo.out, arguments), need)))
    time, chosen = Time(*kept[0]), Plan(*kept[1])  # running again later, the time is as it was
    while True:
        for sentence in shortfalls(name, chosen, 0, need):
            click.echo(sentence, err=True)
        demo.chain = parent
        demo.stage(name, [*arguments, f"run.dir={output}", f"schedule.steps={chosen.steps}"], output, content)
        used = demo.done[name]["seconds"]
        again = plan_again(chosen, used, time, _step_time(output), need)
        if again is None:
            break
        click.echo(
            f"{name}: {chosen.steps:,} steps took {used:.0f} of {chosen.seconds:.0f} s: the machine was busy when the "
            f"time of a step was measured; training again, {again.steps:,} steps",
            err=True,
        )
        chosen = again
        demo.keep(key, (time, chosen))
    demo.notes += shortfalls(name, chosen, used, need)


@click.command("demo")
@click.option(
    "--shards", type=LOCATION, help="Captioned images of your own (folder, .tar or glob) instead of drawn scenes."
)
@click.option("--out", type=PATH, default=Path("runs/demo"), show_default=True)
@click.option("--minutes", type=click.FloatRange(min=1), help="Time budget that sets the numbers of steps. Default: as"
              f" the configs say, and less where that would take over {DEFAULT_MINUTES:g} minutes.")  # fmt: skip
@click.option("--prompts", type=PATH, help="A text file of prompts to show, one a line; if not"
              " given, a fixed list, or with --shards captions of theirs.")  # fmt: skip
@click.option("--ranks", type=click.IntRange(min=1), help="Processes that train the MM-DiT. Default: 2, or one a GPU.")
def command(shards: str | None, out: Path, minutes: float | None, prompts: Path | None, ranks: int | None) -> None:
    """Draw scenes, train an autoencoder, pre-encode, train an MM-DiT, sample, evaluate, export, and write a report.

    Everything lies under OUT; stages that are finished are skipped when it is run again.
    """
    import torch

    from stack import config as configuration
    from stack.config import Config, UserError
    from stack.data.remote import CacheConfig, ShardCache
    from stack.data.shards import index_shards
    from stack.files import publish
    from stack.preencode.job import PreencodeConfig
    from stack.text.prompts import read
    from stack.train.recipe import TrainConfig

    if not CONFIGS.is_dir():
        raise UserError(f"{CONFIGS}: not found; the demo runs from a clone of the project (pip install -e .)")
    began = time.monotonic()
    ranks = ranks or min(2, torch.cuda.device_count() or 2)
    kind = "scenes" if shards is None else "shards"
    budget = 60 * (minutes or DEFAULT_MINUTES)
    shown = read(prompts) if prompts else SCENE_PROMPTS if shards is None else []
    demo = Demo(out)
    index, source = out / "index", shards or str(out / "shards")
    if shards is None:
        demo.stage("draw", ["data", "synth", source], out / "shards")
    else:
        index_shards(source, index, ShardCache(CacheConfig()))

    def content(schema: type[Config], path: Path) -> str:
        return configuration.dump(configuration.load(schema, path))

    def train_for(share: float, at_most: float, name: str, arguments: list[str], output: Path, path: Path) -> None:
        """A training of the configuration `path`; of its steps at most, unless --minutes is given."""
        planned = configuration.load(TrainConfig, path).schedule.steps
        assert isinstance(planned, int)
        described = f"in {budget:g} s\n{content(TrainConfig, path)}"
        train(demo, name, arguments, output, described, Time(share, at_most, None if minutes else planned))

    autoencoder, config = out / "autoencoder", CONFIGS / f"autoencoder/demo_{kind}.yaml"
    arguments = ["train", str(config), f"data.source={source}", f"data.index={index}"]
    seconds = AUTOENCODER_SHARE * budget, AUTOENCODER_MOST * budget
    train_for(*seconds, "autoencoder", arguments, autoencoder, config)
    codec = out / "codec"
    demo.stage("codec", ["export", str(autoencoder), "-o", str(codec), "--replace"], codec)

    folder = out / "encoders"
    demo.stage("encoders", ["data", "encoders", str(folder)], folder)
    names = [f"{name}={folder / name}" for name in ("t5", "clip_l", "clip_g")]
    config, encoded = CONFIGS / f"preencode/demo_{kind}.yaml", out / "encoded"
    arguments = ["preencode", str(config), f"source={source}", f"index={index}", f"out={encoded}"]
    arguments += [f"autoencoder={codec}", *(f"text.{name}" for name in names)]
    demo.stage("preencode", arguments, encoded, content(PreencodeConfig, config))

    model, config = out / "mmdit", out / "train.yaml"
    shown = shown or _captions(encoded)
    _write_config(config, CONFIGS / f"train/demo_{kind}.yaml", shown if shards else [])
    arguments = ["train", str(config), f"data.path={encoded}", f"objective.autoencoder={codec}"]
    arguments += [*(f"objective.text.{name}" for name in names), "--ranks", str(ranks)]
    left = budget - (time.monotonic() - began) - RESERVE_SECONDS[kind]
    train_for(left, left, "train", arguments, model, config)

    listed, lines = out / "prompts.txt", "\n".join(shown) + "\n"
    with publish(listed) as temporary:
        temporary.write_text(lines, encoding="utf-8")
    grid = out / "samples.png"
    demo.stage("sample", ["sample", str(model), "--prompts", str(listed), "--seed", "1", "-o", str(grid)], grid, lines)
    scenes = ["--scenes", str(NUM_SCENES)] if shards is None else []
    demo.stage("evaluate", ["evaluate", str(model), *scenes], model / "eval")
    exported = out / "export"
    demo.stage("export", ["export", str(model), "-o", str(exported), "--replace"], exported)
    _report(demo, autoencoder, model, ranks)


def _captions(encoded: Path) -> list[str]:
    """NUM_PROMPTS captions spread over the data set, each in one line."""
    from stack.data.shards import ShardReader, ShardSet, index_shards

    shards = ShardSet(index_shards(encoded))
    reader = ShardReader(shards.indices)
    count = min(NUM_PROMPTS, shards.num_samples)
    numbers = [i * shards.num_samples // count for i in range(count)]
    captions = [json.loads(reader.read(*shards.locate(number), "json"))["caption"] for number in numbers]
    return [" ".join(caption.split()) for caption in captions]


def _write_config(path: Path, base: Path, prompts: list[str]) -> None:
    """A configuration that adds the prompts to show, if any, to `base`."""
    import yaml

    from stack.files import publish

    preview = {"objective": {"preview": {"prompts": prompts}}} if prompts else {}
    with publish(path) as temporary:
        temporary.write_text(
            yaml.safe_dump({"base": str(base.resolve()), **preview}, allow_unicode=True), encoding="utf-8"
        )


def _report(demo: Demo, autoencoder: Path, model: Path, ranks: int) -> None:
    from stack import config as configuration
    from stack.evaluate import report
    from stack.files import publish
    from stack.log import metrics_of
    from stack.train.recipe import TrainConfig

    resolved = configuration.load(TrainConfig, model / "config.yaml")
    result = json.loads((model / "eval.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    validation = [line["val_loss"] for line in metrics_of(model) if "val_loss" in line]
    stages = {name: record for name, record in demo.done.items() if record.get("finished")}
    seconds = {name: round(record["seconds"], 1) for name, record in stages.items()}
    plans = {name: Plan(*demo.done["values"][f"{name} plan"]["value"][1]) for name in NEEDS}
    total = sum(seconds.values()) + sum(chosen.spent for chosen in plans.values())
    names = {"seen_1": "one shape, seen", "heldout_1": "one shape, held out"}
    names |= {"seen_2": "two shapes, seen", "heldout_2": "two shapes, one held out"}
    scenes = {label: result[key] for key, label in names.items() if key in result}
    summary = {
        "accuracy_seen": result.get("seen_1", {}).get("all_right"),
        "accuracy_heldout": result.get("heldout_1", {}).get("all_right"),
        "val_loss_first": validation[0],
        "val_loss_last": validation[-1],
        "seconds": {**seconds, "total": round(total, 1)},
        "peak_rss_gb": round(max(record["peak_rss_gb"] for record in stages.values()), 2),
        "ranks": ranks,
        "zero_stage": resolved.parallel.zero_stage,
        "model_parameters": _parameters(model),
        "scenes": scenes,
        "plans": {name: chosen._asdict() for name, chosen in plans.items()},
        "notes": demo.notes,
    }
    with publish(demo.out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    commands = {name: record["command"] for name, record in stages.items()}
    report.write(demo.out / "report.html", autoencoder, model, summary, commands)
    for note in demo.notes:
        click.echo(note, err=True)
    click.echo(json.dumps({key: value for key, value in summary.items() if key != "scenes"}, indent=1))
    click.echo(f"report: {(demo.out / 'report.html').resolve()}")


def _parameters(model: Path) -> int:
    from stack.train import snapshot

    return sum(weight.numel() for weight in snapshot.read(model).weights.values())
