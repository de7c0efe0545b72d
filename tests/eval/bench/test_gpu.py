"""The bench of a GPU runs from end to end; a CPU shows it, with tiny shapes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

gpu: Any = import_module("mllm.eval.bench.gpu")
shapes: Any = import_module("mllm.eval.bench.shapes_8b")


@pytest.mark.slow
def test_stages_and_the_encoder_are_timed(tmp_path: Path) -> None:
    vision = {**shapes.TINY_VISION, "image_size": 56}
    place = shapes.Place(tmp_path, vision, shapes.TINY_TEXT, "cpu").write(16)
    lines: list[str] = []
    rows = gpu.measure(place, steps=3, compiled=False, progress=lines.append)
    assert [row.name for row in rows] == [
        "stage 1, batch 8",
        "stage 1, batch 16, checkpointing",
        "stage 2, LoRA r=128, batch 8",
        "the frozen encoder's features",
        "  main thread",
        "  all threads",
    ]
    assert all(row.ours > 0 for row in rows) and len(lines) == 3
    compared = [row for row in rows if row.alternative is not None]
    assert [row.ratio for row in compared] == pytest.approx([row.ours / row.alternative for row in compared])


def test_the_parameters_of_the_language_model_are_those_of_its_shape(tmp_path: Path) -> None:
    place = shapes.Place(tmp_path, shapes.TINY_VISION, shapes.TINY_TEXT, "cpu").write(1)
    width, hidden, layers, words = 64, 128, 2, 512
    attention = 2 * width * width + 2 * width * width // 2  # q, o; k and v of half as many heads
    each = attention + 3 * width * hidden + 2 * width
    assert place.parameters() == layers * each + width + words * width  # the last norm, the head
