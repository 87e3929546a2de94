"""The report of a demo: one self-contained HTML file with its pictures, curves, tables and timings."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from stack.files import publish
from stack.log import metrics_of
from stack.train import snapshot

MAX_SHEETS = 8


def embed(path: Path) -> str:
    """A PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def curves(run: Path) -> str:
    """Training and validation loss of a run over steps, as SVG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {"loss": [], "val_loss": []}
    for line in metrics_of(run):
        for name, points in curves.items():
            if line.get(name) is not None:
                points.append((line["step"], line[name]))
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("val_loss", "validation (averaged weights)", "o-")):
        if curves[name]:
            axes.plot(*zip(*curves[name], strict=True), style, label=label, linewidth=1.2, markersize=4)
    values = [value for points in curves.values() for _, value in points]
    if values:
        ordered = sorted(values)
        axes.set_ylim(0.95 * ordered[0], 1.1 * ordered[int(0.97 * (len(ordered) - 1))])
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def sheets(run: Path) -> list[tuple[int, str]]:
    """(step, picture) of up to MAX_SHEETS sample sheets, spread evenly over the run, the last one always among them."""
    steps = [step for step in snapshot.steps(run) if (run / "samples" / f"{step:08d}.png").exists()]
    count = min(MAX_SHEETS, len(steps))
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)})
    return [(step, embed(run / "samples" / f"{step:08d}.png")) for step in chosen]


def write(out: Path, autoencoder: Path, run: Path, summary: dict[str, Any], commands: dict[str, str]) -> None:
    """Write `out` from the two runs' folders, the demo's summary and the command of each stage."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    evaluation = [(path.stem.partition("-")[2], embed(path)) for path in sorted((run / "eval").glob("*/*.png"))]
    html = environment.get_template("report.html").render(
        name=run.parent.name,
        summary=summary,
        commands=commands,
        samples=sheets(run),
        reconstructions=sheets(autoencoder)[-1:],
        run_curves=curves(run),
        autoencoder_curves=curves(autoencoder),
        evaluation=evaluation,
        grid=embed(run.parent / "samples.png"),
    )
    with publish(out) as temporary:
        temporary.write_text(html, encoding="utf-8")
