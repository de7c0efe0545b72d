"""Speed and memory at real shapes: LLaVA's stages and decoding, with CLIP-L/336 and an 8B decoder in bfloat16."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import mllm
from mllm.testing import tiny_image

pytestmark = pytest.mark.gpu

bench: Any = import_module("mllm.eval.bench.gpu")
real: Any = import_module("mllm.eval.bench.shapes_8b")

LM_PARAMETERS = 8.03e9


@pytest.fixture
def seconds(synchronize) -> Callable[[Callable[[], Any]], float]:
    """Return a function that runs another, and returns the seconds until the device has done its work."""

    def measured(run: Callable[[], Any]) -> float:
        synchronize()
        start = time.monotonic()
        run()
        synchronize()
        return time.monotonic() - start

    return measured


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, smoke: bool, device: str) -> Any:
    """The configurations and images of the bench; tiny ones where SMOKE is set."""
    folder: Path = tmp_path_factory.mktemp("bench")
    shapes = (real.TINY_VISION, real.TINY_TEXT) if smoke else (real.VISION, real.TEXT)
    return real.Place(folder, *shapes, device).write(16 if smoke else 256)


@pytest.mark.timeout(300)
def test_llavas_stages_next_to_a_plain_loop(place, smoke, figures):
    for row in bench.measure(place, steps=4 if smoke else 12, compiled=not smoke):
        other = "" if row.alternative is None else f", the alternative {row.alternative:.4g} ({row.ratio:.2f}x)"
        figures[row.name] = f"{row.ours:.4g} {row.unit}{other}"
        assert row.ours > 0


@pytest.fixture(scope="module")
def big(place: Any, device: str) -> Any:
    """A model of real shapes on the device."""
    with real.drawn_on(device):
        model = mllm.assemble(
            {"model": str(place.folder / "vision"), "layer": -2, "init": "random"},
            {"model": str(place.folder / "text"), "init": "random", "dtype": "bfloat16"},
            "mlp",
            device=device,
        )
    return model


@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 0}], ids=["greedy", "sampled"])
def test_decoding(big, seconds, figures, smoke, rows, decoding):
    new = 8 if smoke else 64
    prompts = [[tiny_image(index), "Describe this."] for index in range(rows)]
    options = {**decoding, "min_new_tokens": new, "max_new_tokens": new}
    big.generate(prompts, **{**options, "min_new_tokens": 2, "max_new_tokens": 2})
    answers: list[Any] = []
    took = seconds(lambda: answers.extend(big.generate(prompts, **options)))
    assert len(answers) == rows
    figures["tokens/s"] = round(rows * new / took)


def test_hashing(figures, seconds):
    data = os.urandom(2**24 if os.environ.get("SMOKE") == "1" else 2**28)
    digests: list[str] = []
    rate = len(data) / seconds(lambda: digests.append(hashlib.sha256(data).hexdigest())) / 1e9
    assert len(digests[0]) == 64
    figures["GB/s of SHA-256"] = round(rate, 2)
    figures["seconds for the weights of the 8B decoder"] = round(2 * LM_PARAMETERS / 1e9 / rate)
