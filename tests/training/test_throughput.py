"""What is measured of a step: its tokens, padding, images and FLOPs; in the run, and in trackers that are called so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType
from torch.utils.flop_counter import FlopCounterMode

import mllm
from mllm.build import build
from mllm.config.loading import load
from mllm.data.sources import read_all
from mllm.data.stream import Stream
from mllm.objectives.build import objectives_of
from mllm.prompts.batch import collate
from mllm.prompts.pieces import images_of
from mllm.testing import tiny_image
from mllm.training import setup, throughput
from mllm.training.throughput import peak_flops

PEAK = 1e9
STEPS, BATCH = 3, 4


class Watched(tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker as W&B's: it is started with a project and options."""

    name = "wandb"
    requires_logging_directory = False
    started: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    config: ClassVar[dict[str, Any]] = {}
    rows: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.started.append((project, options))

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append({"step": step, **values})


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_parts) -> Path:
    """Return a run whose second stage is tracked, on a device whose peak is known; rows differ in length."""
    folder = tmp_path_factory.mktemp("throughput")
    rows = []
    for index in range(8):
        tiny_image(index).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": "word " * (1 + index)})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(f"""
name: measured
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{train: {{format: table, path: {folder}/train.json}}}}
optim: {{schedule: constant, warmup: 0, checkpointing: true}}
cache: off
stages:
  - {{name: packed, train: [connector], steps: {STEPS}, batch_size: {BATCH}, data: {{pack: 64}}}}
  - {{name: align, train: [connector], steps: {STEPS}, batch_size: {BATCH}, track: [wandb, tensorboard]}}
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Watched)
        for module in (tracking, setup):
            patch.setattr(module, "get_available_trackers", lambda: [LoggerType.WANDB, LoggerType.TENSORBOARD])
        patch.setattr(throughput, "_peak_of", lambda device: PEAK)
        return mllm.train(str(folder / "recipe.yaml"), out=folder / "run").path


def rows_of(run: Path, file: str, stage: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / file).read_text().splitlines())
    return [row for row in rows if row["stage"] == stage]


@pytest.fixture(scope="module")
def batches(run) -> tuple[Any, list[Any]]:
    """Return the model and what the stage ``align`` has read."""
    stage = load(str(run / "recipe.yaml")).stages[1]
    model: Any = build(stage.assembly)
    stream = Stream(read_all(stage.data.train), stage.prompt, seed=stage.seed, lm=model.lm)
    return model, [stream.take(BATCH) for _ in range(STEPS)]


def test_padding_and_rates_are_those_of_the_rows(run, batches) -> None:
    model, read = batches
    for rows, logged, measured in zip(read, rows_of(run, "log.jsonl", "align"), rows_of(run, "speed.jsonl", "align"), strict=True):  # fmt: skip  # noqa: E501
        lengths = [len(model.encode(pieces).ids) for pieces in rows]
        tokens = sum(lengths)
        assert logged["padding"] == pytest.approx(1 - tokens / (BATCH * max(lengths)), abs=1e-6)
        assert measured["tokens_per_s"] * measured["seconds"] == pytest.approx(tokens, rel=0.01)
        assert measured["images_per_s"] * measured["seconds"] == pytest.approx(BATCH, rel=0.01)
        assert 0.01 < measured["peak_gib"] < 100


def test_padding_of_packed_rows_is_what_no_example_takes(run, batches) -> None:
    model, read = batches  # the stages have one seed, so they read the same
    for rows, logged in zip(read, rows_of(run, "log.jsonl", "packed"), strict=True):
        encoded = [model.encode(pieces) for pieces in rows]
        positions = collate(encoded, model.lm.pad, pack=64).ids.numel()
        share = 1 - sum(len(row.ids) for row in encoded) / positions
        assert logged["padding"] == pytest.approx(share, abs=1e-6)


def test_mfu_is_of_the_flops_that_torch_counts_without_what_is_recomputed(run, batches) -> None:
    model, read = batches
    stage = load(str(run / "recipe.yaml")).stages[1]
    setup.parameter_groups(model, stage)
    model.train()
    errors = []
    for rows, measured in zip(read, rows_of(run, "speed.jsonl", "align"), strict=True):
        images = [model.encoder.open(image) for pieces in rows for image in images_of(pieces)]
        encoded = [model.encode(pieces) for pieces in rows]
        batch, objectives = collate(encoded, model.lm.pad), objectives_of(stage.objectives)
        features = model.features(images)
        torch.stack(model(rows, features, batch, objectives))  # what is tried once is tried now
        with FlopCounterMode(display=False) as counter:
            torch.stack(model(rows, features, batch, objectives)).sum().backward()
        with FlopCounterMode(display=False) as encoder:
            model.features(images)
        # The counter does not know the attention of CPUs: 4 forward, 10 backward, for a pair of positions and channel.
        attention = 14 * batch.ids.numel() * batch.ids.shape[1] * 32 * 2  # two layers of width 32
        tokens = sum(len(row.ids) for row in encoded) / batch.ids.numel()
        vit = len(images) * 2 * 4 * 17**2 * 24  # two layers, 16 patches and CLS, width 24
        useful = (counter.get_total_flops() + attention) * tokens + encoder.get_total_flops() + vit
        errors.append(abs(measured["mfu"] * measured["seconds"] * PEAK / useful - 1))
    assert errors[0] < 0.01 and max(errors) < 0.15  # later steps are counted by the tokens of the first


def test_a_tracker_has_the_run_its_recipe_and_every_figure(run) -> None:
    project, options = Watched.started[0]
    assert (project, options["name"], options["group"]) == ("measured", "run/align", "run")
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert Watched.config["encoder.model"] == written["encoder"]["model"]
    assert Watched.config["stages.1.optim.checkpointing"] is True and Watched.config["stages.1.batch_size"] == BATCH
    assert Watched.config["stages.0.data.train.0.path"] == written["data"]["train"][0]["path"]
    assert (Watched.config["stage"], Watched.config["steps"], Watched.config["adapters"]) == ("align", STEPS, "[]")
    logged, measured = rows_of(run, "log.jsonl", "align"), rows_of(run, "speed.jsonl", "align")
    for row, one, two in zip(Watched.rows, logged, measured, strict=True):
        figures = {**one, **two}
        step, _ = figures.pop("step"), figures.pop("stage")
        assert row == {"step": step, **{f"align/{key}": value for key, value in figures.items()}}
    assert {"align/grad_norm", "align/padding", "align/mfu", "align/tokens_per_s", "align/peak_gib"} <= row.keys()


def test_tensorboard_reads_the_run(run) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(run / "tensorboard/align/measured"))
    events.Reload()
    losses = [event.value for event in events.Scalars("align/loss")]
    assert losses == pytest.approx([row["loss"] for row in rows_of(run, "log.jsonl", "align")])
    assert {"align/grad_norm", "align/mfu", "align/images_per_s"} <= set(events.Tags()["scalars"])
    (settings,) = (run / "tensorboard/align/measured").glob("*/hparams.yml")
    assert yaml.safe_load(settings.read_text())["stages.0.data.pack"] == 64


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A1000", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


def test_without_a_known_peak_there_is_no_mfu(run, tmp_path) -> None:
    again = mllm.train(str(run / "recipe.yaml"), {"stages.1.track": [], "stages.1.steps": 1}, out=tmp_path / "run")
    assert not any("mfu" in row for row in rows_of(again.path, "speed.jsonl", "align"))
