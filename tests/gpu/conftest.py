"""Shared by the tests on one GPU: tiny parts, a recipe, and the figures that are written down.

    scripts/test-gpu pack     on a machine with a package index: lays wheels into .whl/
    scripts/test-gpu          on the machine with the GPU (80 GB), in a copy of the repository with .whl/

Figures and outcomes are written to ``$OUT`` (gpu.json, gpu.txt). Each test has its own time limit, and is skipped once
all have run for ``BUDGET`` seconds (330). ``SMOKE=1`` runs everything on a CPU with tiny sizes: it shows that the tests
themselves work.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

SMOKE = os.environ.get("SMOKE") == "1"
BUDGET = float(os.environ.get("BUDGET", "330"))
OUT = Path(os.environ.get("OUT") or Path(tempfile.gettempdir()) / "mllm-gpu")
STARTED = time.monotonic()
RECORDS: dict[str, dict[str, Any]] = {}

RECIPE = """
name: gpu
encoder: {{model: {encoder}, layer: -2{encoder_options}}}
lm: {{model: {lm}{lm_options}}}
connector: {{type: mlp}}
adapters: {adapters}
prompt: {{template: "{{images}}\\n{{prompt}}", caption: "Describe:", question: "USER: {{question}} ASSISTANT:"}}
data: {{train: {{format: llava, path: {parts}/rows.json, images: {parts}/images, task: captions}}}}
cache: "off"
stages:
  - name: align
    train: {train}
    steps: {steps}
    batch_size: {batch_size}
    checkpoint_every: {checkpoint_every}
    optim:
      {{name: {optimizer}, warmup: 2, schedule: constant, precision: {precision}, checkpointing: {checkpointing},
      compile: {compile}}}
"""


@pytest.fixture(scope="session")
def smoke() -> bool:
    """Whether everything is tiny, and on a CPU."""
    return SMOKE


@pytest.fixture(scope="session")
def device() -> str:
    """The device that is tested."""
    return "cpu" if SMOKE else "cuda"


@pytest.fixture(scope="session")
def synchronize() -> Callable[[], None]:
    """Return a function that waits until the device has done what it was given."""
    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip, before anything is made, where there is no device or no time."""
    if not SMOKE and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device (SMOKE=1 runs the tests on a CPU, with tiny sizes)")
    if time.monotonic() - STARTED > BUDGET:
        pytest.skip(f"no time left: BUDGET is {BUDGET:.0f} s")


@pytest.fixture(autouse=True)
def _return_memory() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a test measures, by name; it is written down whether the test passes or not."""
    measured: dict[str, Any] = _record(request.node)["figures"]
    return measured


def _record(item: pytest.Item) -> dict[str, Any]:
    return RECORDS.setdefault(item.nodeid.rpartition("/")[2], {"outcome": "", "seconds": 0.0, "figures": {}})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write an outcome down as soon as it is known: the next test may take the machine with it."""
    report = yield
    if item.get_closest_marker("gpu") and (report.when == "call" or report.outcome != "passed"):
        message = str(call.excinfo.value).partition("\n")[0][:300] if call.excinfo else ""
        _record(item).update(outcome=_outcome(report), seconds=round(report.duration, 1), message=message)
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "gpu.json").write_text(json.dumps({**_about(), "tests": RECORDS}, indent=1, default=str))
    return report


def _outcome(report: pytest.TestReport) -> str:
    if not hasattr(report, "wasxfail"):
        return report.outcome
    return f"{'failed' if report.skipped else 'passed'}, a failure is expected ({report.wasxfail})"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table, and write it down."""
    if RECORDS:
        (OUT / "gpu.txt").write_text(_table())
        terminalreporter.write_line(_table())
        terminalreporter.write_line(f"Written to {OUT}: gpu.json, gpu.txt")


def _about() -> dict[str, str]:
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "transformers": transformers.__version__, "gpu": name, "smoke": str(SMOKE)}


def _table() -> str:
    lines = [f"{name}: {value}" for name, value in _about().items()]
    for test, record in RECORDS.items():
        lines.append(f"{record['seconds']:6.1f} s  {test}: {record['outcome']} {record.get('message', '')}".rstrip())
        lines += [f"            {name}: {value}" for name, value in record["figures"].items()]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Workplace:
    """A folder with parts, data, recipes and runs.

    Attributes:
        parts: of tiny parts and data: ``clip`` and ``lm``.
        folder: of recipes and runs.
    """

    parts: Path
    folder: Path

    def recipe(self, name: str, **settings: Any) -> str:
        """Write a recipe of one stage, and return its path."""
        usual: dict[str, Any] = {
            "encoder": self.parts / "clip",
            "encoder_options": ", dtype: float32",
            "optimizer": "adamw",
            "lm": self.parts / "lm",
            "lm_options": "",
            "adapters": "[]",
            "train": "{connector: 1.0e-3}",
            "steps": 10,
            "batch_size": 8,
            "checkpoint_every": 1000,
            "precision": "float32",
            "checkpointing": "false",
            "compile": "false",
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(RECIPE.format(**{**usual, "parts": self.parts, **settings}))
        return str(path)

    def train(self, name: str, **settings: Any) -> list[float]:
        """Train a recipe, with accelerate as in a process of its own, and return the losses of its steps."""
        from accelerate.state import AcceleratorState

        from mllm.training.train import train

        AcceleratorState._reset_state(reset_partial_state=True)
        train(self.recipe(name, **settings), out=self.folder / name)
        return self.losses(name)

    def losses(self, name: str) -> list[float]:
        """Return the losses that a run has logged."""
        rows = [json.loads(line) for line in (self.folder / name / "log.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Parts and data, made here: nothing is transferred."""
    from mllm.testing import ENCODER_FAMILIES, tiny_lm

    parts = tmp_path_factory.mktemp("parts")
    tiny_lm(parts / "lm", context=512)
    ENCODER_FAMILIES["clip"](parts / "clip")
    _write_data(parts)
    return Workplace(parts, tmp_path_factory.mktemp("runs"))


def _write_data(folder: Path) -> None:
    """Write 64 JPEGs of 640 x 480, about as large as photographs are, with captions."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir()
    draw, rows = np.random.default_rng(0), []
    for index in range(64):
        noise = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        noise.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "images" / f"{index}.jpg", quality=88)
        answer = f"a thing of number {index} {'x' * (index % 7)}"
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))


@pytest.fixture(scope="session")
def trained(workplace: Workplace) -> Path:
    """A run of ten steps in float32 on the device."""
    workplace.train("float32")
    return workplace.folder / "float32"
