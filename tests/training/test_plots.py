"""The loss plot: what is drawn where, and that a PNG comes out."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D
from PIL import Image

from mllm.config.loading import check
from mllm.errors import MLLMError
from mllm.training.plots import loss_figure, loss_plot, read_log, smoothed
from mllm.training.run import data_notes

ROWS: list[dict[str, Any]] = [
    {"stage": "fit", "seconds": 2.0},
    {"stage": "align", "step": 10, "loss": 3.0, "lr": 1e-4},
    {"stage": "align", "step": 20, "loss": 9.0},
    {"stage": "align", "step": 20, "loss": 2.0},  # again, after a resume
    {"stage": "align", "step": 25, "val_loss": 2.5},
    {"stage": "tune", "step": 10, "loss": 1.0},
    {"stage": "tune", "step": 30, "loss": 0.5},
    {"stage": "tune", "step": 30, "val_loss": 0.75},
]


def log(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> dict[str, list[Line2D]]:
    """The drawn lines by label."""
    (axes,) = loss_figure(read_log(path)).axes
    found: dict[str, list[Line2D]] = {}
    for line in axes.lines:
        found.setdefault(str(line.get_label()), []).append(line)
    return found


def test_stages_stand_one_after_another(tmp_path: Path) -> None:
    drawn = lines(log(tmp_path, ROWS))
    raw = [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in drawn["training"]]
    assert raw == [([10, 20], [3.0, 2.0]), ([35, 55], [1.0, 0.5])]  # the first stage is 25 steps long
    points = [np.asarray(line.get_xydata()).tolist() for line in drawn["validation"]]
    assert points == [[[25.0, 2.5]], [[55.0, 0.75]]]
    assert len(drawn["training, smoothed"]) == 2


def test_axes_are_named_and_the_legend_names_each_kind_once(tmp_path: Path) -> None:
    (axes,) = loss_figure(read_log(log(tmp_path, ROWS))).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert [text.get_text() for text in axes.texts] == ["align", "tune"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training", "training, smoothed", "validation"]


def test_a_validation_loss_of_other_data_is_said_below(tmp_path: Path) -> None:
    stages = [
        {"name": "same", "train": ["connector"], "steps": 1, "data": {"val": {"format": "scenes", "task": "name"}}},
        {"name": "other", "train": ["connector"], "steps": 1},
        {"name": "fit", "fit": {"part": "connector"}},
    ]
    data = {"train": {"format": "scenes", "task": "name"}, "val": {"format": "table", "path": "a/b.csv"}}
    notes = data_notes(check({"name": "x", "data": data, "stages": stages}, "x"))
    assert notes == ["other: training loss on scenes name; validation loss on table b.csv"]
    figure = loss_figure(read_log(log(tmp_path, ROWS)), notes)
    assert [text.get_text() for text in figure.texts] == notes


def test_smoothing_is_the_normalised_weighted_mean() -> None:
    values = np.random.default_rng(0).normal(size=30)
    decay = 1 - 2 / (9 + 1)
    expected = [np.average(values[: n + 1], weights=decay ** np.arange(n, -1, -1)) for n in range(30)]
    np.testing.assert_allclose(smoothed(values.tolist(), 9), expected, rtol=1e-12)
    assert smoothed([2.0, math.nan, 2.0], 5) == [2.0, 2.0, 2.0]
    assert math.isnan(smoothed([math.nan], 5)[0])


def test_a_png_is_written(tmp_path: Path) -> None:
    rows = [*ROWS, {"stage": "a $\\broken", "step": 1, "loss": math.nan}]
    loss_plot(log(tmp_path, rows), tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
    assert colours is not None and {(43, 108, 143), (200, 112, 42)} <= {colour for _, colour in colours}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No training log at .*give the log that training wrote"),
        ('{"stage": "align", "step": 1, "loss": 1}\n{"stage": "al', 'Line 2 of .*\'{"stage": "al\'.*remove the line'),
        ('{"stage": "align", "loss": 1}', "Line 1 of .*Expected one JSON object with a stage"),
    ],
)
def test_what_is_wrong_with_a_log_is_said(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "log.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MLLMError, match=message):
        loss_plot(path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
