"""Draw the curves of runs, without any server: `python -m tracking.plots RUN_DIR ...`."""

import argparse
import base64
import html
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from errors import UserError, exits_cleanly
from tracking.files import escaped, matching
from tracking.metrics_tail import JsonLines

_FORMATS = (".png", ".svg", ".pdf", ".html")
_SMOOTHED_OVER = 1 / 50  # of a run's steps


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run: {name: (steps [points], values [points])}, evaluations under their task's name."""

    label: str
    training: dict[str, tuple[np.ndarray, np.ndarray]]
    evaluations: dict[str, tuple[np.ndarray, np.ndarray]]


def read_run(folder: str) -> Curves:
    """The curves of the run in a model_path; UserError where there is none."""
    lines = JsonLines(os.path.join(folder, "metrics.jsonl")).read()
    if not lines:
        raise UserError(f"{folder!r} holds no metrics.jsonl with metrics; give the model_path of a training run")
    training = {name: _series(lines, "step", name) for name in ("loss", "lr")}
    evaluated = []
    for path in matching(os.path.join(escaped(folder), "eval_*.jsonl")):
        evaluated += JsonLines(path).read()
    evaluations = {}
    for task in sorted({str(line.get("task")) for line in evaluated}):
        steps, values = _series([line for line in evaluated if str(line.get("task")) == task], "global_step", "loss")
        if len(steps):
            steps, first = np.unique(steps, return_index=True)
            evaluations[task] = (steps, values[first])
    return Curves(folder, training, evaluations)


def _series(lines: Sequence[dict], step: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line[step], line[name]) for line in lines if line.get(name) is not None and step in line]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def smoothed(values: np.ndarray) -> np.ndarray:
    """[steps] -> [steps]: means over the last fiftieth of all steps, or what there is of it."""
    window = max(1, round(len(values) * _SMOOTHED_OVER))
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(runs: Sequence[Curves]) -> Figure:
    """Loss and learning rate by step, a colour for each run; evaluations are dots."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        steps, values = run.training["loss"]
        loss.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        loss.plot(steps, smoothed(values), color=color, label=run.label)
        for task, points in run.evaluations.items():
            loss.plot(*points, color=color, marker="o", linestyle="none", label=f"{run.label}: {task}")
        rate.plot(*run.training["lr"], color=color)
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    return figure


def save(figure: Figure, path: str) -> None:
    """Write a picture, or a page that holds it; UserError where it can't be written."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _FORMATS:
        raise UserError(f"--output {path!r} has no known ending; use one of {', '.join(_FORMATS)}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png" if suffix == ".html" else suffix[1:], dpi=150)
    content = picture.getvalue()
    if suffix == ".html":
        labels = html.escape(", ".join(figure.axes[0].get_legend_handles_labels()[1]))
        image = base64.b64encode(content).decode()
        content = (
            f'<!DOCTYPE html><meta charset="utf-8"><title>{labels}</title><img style="max-width: 100%" '
            f'alt="loss and learning rate of {labels}" src="data:image/png;base64,{image}">\n'
        ).encode()
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            file.write(content)
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise UserError(f"--output {path!r} cannot be written ({error.strerror}); choose another file") from error


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the runs that `argv` names."""
    parser = argparse.ArgumentParser(prog="tracking.plots", description="Draw loss and learning rate of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="model_path of a run, local or gs://")
    parser.add_argument("--output", default="runs/curves.png", metavar="FILE", help="default runs/curves.png; or .html")
    args = parser.parse_args(argv)
    save(draw([read_run(folder) for folder in args.runs]), args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
