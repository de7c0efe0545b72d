"""Encoders: every family's features equal the model's own, and what is not used is not kept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mllm.testing import ENCODER_FAMILIES


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_a_tiny_model_of_each_family_is_made_at_once(family: str, tmp_path: Path) -> None:
    started = time.monotonic()
    folder = ENCODER_FAMILIES[family](tmp_path / family)
    assert time.monotonic() - started < 3, "takes 0.1 s on an idle core"
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {p.name for p in Path(folder).iterdir()}
