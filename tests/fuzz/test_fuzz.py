"""A short share of every fuzzer but the server's: the named cases that are quick, and some random ones."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest

from tests.fuzz.harness import judge
from tests.fuzz.kinds import KINDS

COUNTS = {"images": 150, "recipes": 10, "data": 300, "folders": 6, "features": 40, "commands": 6, "disk": 4}
NAMED = {"images": 60, "recipes": 30, "data": 400, "folders": 4, "features": 20, "commands": 12, "disk": 2}
SECONDS = 1.5  # after which a kind ends


def test_every_kind_has_a_share() -> None:
    assert COUNTS.keys() == NAMED.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_right_result_or_one_message(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "fuzz").mkdir()
    fuzzer, chance = KINDS[kind](tmp_path / "fuzz"), random.Random(f"short/{kind}")
    named = list(fuzzer.named().items())
    chosen = chance.sample(named, min(NAMED[kind], len(named)))
    drawn = (fuzzer.draw(random.Random(f"short/{kind}/{number}")) for number in range(COUNTS[kind]))
    problems, until = {}, time.monotonic() + SECONDS
    cases = itertools.chain(itertools.islice(drawn, COUNTS[kind] // 2), chosen, drawn)
    for judged, (label, act) in enumerate(cases):
        if time.monotonic() > until and judged > 5:
            break
        outcome = judge(act)
        if outcome not in ("right", "refused"):
            problems[label[:300]] = outcome
    assert problems == {}


def test_the_judge_notices_what_is_wrong() -> None:
    def fail() -> None:
        raise AssertionError("other pixels")

    def crash() -> None:
        raise KeyError("x")

    assert judge(fail).startswith("wrong: other pixels")
    assert judge(crash).startswith("KeyError")
    assert judge(lambda: None) == "right"
