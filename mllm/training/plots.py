"""Plot a training log: the loss of every stage, one after another, with the validation points."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mllm.errors import MLLMError
from mllm.system import parse_json, read_regular

BLUE, ORANGE, GREY = "#2b6c8f", "#c8702a", "#8a8f96"


@dataclass
class Curve:
    """The losses of one stage, by the step inside the stage; a step logged again (after a resume) counts once."""

    train: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The stage's length, as far as it was logged."""
        return max([0, *self.train, *self.validation])


def loss_plot(log: Path, out: Path, notes: Sequence[str] = ()) -> None:
    """Draw a training log as a PNG.

    Args:
        log: JSON lines, ``{"stage", "step", "loss"}`` in training and ``{"stage", "step", "val_loss"}`` in validation;
            ``step`` counts inside the stage, and rows with neither loss are passed over.
        out: the PNG to write.
        notes: lines below the plot, such as the data of the two losses where they differ.

    Raises:
        MLLMError: the log is missing or has a line that cannot be read.
    """
    loss_figure(read_log(log), notes).savefig(
        out, format="png", bbox_inches="tight"
    )  # by Agg: no window system, no global state


def read_log(log: Path) -> dict[str, Curve]:
    """Return stage -> its curve, in the order the stages ran. Errors are those of ``loss_plot``."""
    if not os.path.isfile(log):
        raise MLLMError(f"No training log at {log}. Expected a file of JSON lines: give the log that training wrote.")
    curves: dict[str, Curve] = {}
    for number, line in enumerate(read_regular(log).decode("utf-8", errors="replace").splitlines(), start=1):
        try:
            row = parse_json(line)
            for key, name in (("loss", "train"), ("val_loss", "validation")):
                if key in row:
                    curve = curves.setdefault(row["stage"], Curve())
                    getattr(curve, name)[int(row["step"])] = float(row[key])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise MLLMError(
                f"Line {number} of {log} is {line[:80]!r}. Expected one JSON object with a stage, a step and a loss: "
                "remove the line, or train again."
            ) from error
    return curves


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Return, at each value, the exponentially weighted mean of the values up to it.

    A value weighs ``1 - 2 / (span + 1)`` times the one after it. The weights are normalised, so the first means are not
    drawn towards zero; what is not finite is left out.
    """
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    means = []
    for value in values:
        finite = math.isfinite(value)
        total = decay * total + (value if finite else 0.0)
        weight = decay * weight + finite
        means.append(total / weight if weight else math.nan)
    return means


def loss_figure(curves: dict[str, Curve], notes: Sequence[str] = ()) -> Figure:
    """Return the drawing of ``curves``; the x axis is the running total of steps over the stages."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    start = 0
    for name, curve in curves.items():
        _draw_stage(axes, curve, start)
        if start:
            axes.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
        axes.text(  # the name stands above its stage, whatever the losses are
            start + curve.steps / 2, 1.02, name, transform=axes.get_xaxis_transform(),
            ha="center", va="bottom", fontsize=9, color=GREY, parse_math=False,
        )  # fmt: skip
        start += curve.steps
    below = "\n".join(textwrap.fill(note, 150) for note in notes)
    figure.text(0.01, -0.01, below, fontsize=7, color=GREY, va="top", parse_math=False)
    axes.set(xlabel="step", ylabel="loss", xlim=(0, max(start, 1)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.6)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # every stage has the same labels
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=9)
    return figure


def _draw_stage(axes: Axes, curve: Curve, start: int) -> None:
    """Draw one stage's losses from ``start`` on."""
    steps = sorted(curve.train)
    losses = [curve.train[step] for step in steps]
    places = [start + step for step in steps]
    if steps:
        axes.plot(places, losses, color=BLUE, alpha=0.3, linewidth=0.8, label="training")
        axes.plot(places, smoothed(losses, max(5.0, len(losses) / 20)), color=BLUE, label="training, smoothed")
    if curve.validation:
        steps = sorted(curve.validation)
        axes.plot(
            [start + step for step in steps], [curve.validation[step] for step in steps], clip_on=False, zorder=3,
            color=ORANGE, linewidth=0.8, marker="o", markersize=4, label="validation",
        )  # fmt: skip
