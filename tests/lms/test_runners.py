"""Runners that wrap others: what is set or asked of them is that of the innermost one, unless they say otherwise."""

from __future__ import annotations

from typing import Any

import pytest

import mllm
from mllm.lms.runners.cached import CachedRunner
from mllm.lms.runners.cross_attending import CrossAttendingRunner
from mllm.lms.runners.prefixed import PrefixedRunner
from mllm.lms.runners.unpadded import UnpaddedRunner
from mllm.testing import LM_FAMILIES

PROMPT: dict[str, Any] = {"type": "prompt", "positions": 2}
SECOND = {**PROMPT, "positions": 3}
GATED: dict[str, Any] = {"type": "gated", "every": 1, "heads": 2, "head_dim": 8}


def runner(tiny_parts: tuple[str, str], family: str, adapters: list[Any], tmp_path: Any) -> Any:
    return mllm.assemble(tiny_parts[0], LM_FAMILIES[family](tmp_path / "lm"), adapters=adapters).lm.runner


@pytest.mark.parametrize("adapters", [[PROMPT], [PROMPT, SECOND], [GATED]])
def test_a_model_is_declared_separable_through_wrappers(tiny_parts, tmp_path, monkeypatch, adapters):
    monkeypatch.setattr("mllm.lms.vocabulary.separable", lambda _: pytest.fail("it was probed"))
    outer = runner(tiny_parts, "llama", adapters, tmp_path)
    outer.separable = True
    while outer is not None:
        assert outer.separable
        outer = outer.inner


def test_wrappers_ask_the_runner_inside(tiny_parts, tmp_path):
    outer = runner(tiny_parts, "mistral", [GATED], tmp_path)
    assert isinstance(outer, CrossAttendingRunner) and isinstance(outer.inner, CachedRunner)
    assert outer.window == outer.inner.window is not None
    assert outer.continues_cache and outer.selects_logits and outer.whole_batches and not outer.takes_block_masks


def test_a_prefix_before_a_sliding_window_runs_without_padding(tiny_parts, tmp_path):
    outer = runner(tiny_parts, "mistral", [PROMPT, SECOND], tmp_path)
    assert isinstance(outer, PrefixedRunner) and isinstance(outer.inner, PrefixedRunner)
    assert isinstance(outer.inner.inner, UnpaddedRunner)
    assert not outer.whole_batches and outer.window is None and not outer.continues_cache


def test_packed_rows_have_no_prefix_for_each_prompt(tiny_parts, tmp_path):
    lm = mllm.assemble(tiny_parts[0], LM_FAMILIES["llama"](tmp_path / "lm"), adapters=[PROMPT]).lm
    assert not lm.can_pack()
