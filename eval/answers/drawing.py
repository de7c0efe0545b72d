"""Suites that make pictures of what items say, and suites that ask where a picture is to come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mllm.eval.baselines import derangement
from mllm.eval.scoring import OWN

from mllm.assembly import Assembly
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.processes import progress
from mllm.prompts.pieces import answer_text
from mllm.readout.decision import HEAD, LABELS, decided, states_at

BASELINES = {"draw": ("shuffled",), "decide": LABELS}  # another item's picture; always the same


def drawings(
    model: Assembly, items: Sequence[Item], place: Path | None, baselines: Sequence[str], batch_size: int
) -> dict[str, list[str]]:
    """Return the paths of pictures that a model makes of what items say; ``shuffled`` has other items' pictures.

    Raises:
        MLLMError: there is no place for the pictures, or the model makes none.
    """
    if place is None:
        raise MLLMError("This suite makes pictures, and no place is given for them: out=FOLDER.")
    (place / "images").mkdir(parents=True, exist_ok=True)
    own = []
    with progress() as bar:
        task = bar.add_task(OWN, total=None, note="")
        for start in bar.track(range(0, len(items), batch_size), task_id=task):
            for number, part in enumerate(model.draw(_prompts(model, items[start : start + batch_size])), start):
                own.append(str(place / "images" / f"{number}.png"))
                part.image.save(own[-1])
    found = {OWN: own}
    if "shuffled" in baselines:
        found["shuffled"] = [own[other] for other in derangement(items)]
    return found


def decisions(
    model: Assembly, items: Sequence[Item], baselines: Sequence[str], batch_size: int
) -> dict[str, list[str]]:
    """Return a model's decisions about what items say; a baseline always decides the same."""
    if HEAD not in model.heads:
        raise MLLMError("This suite asks a decision head, and the model has none. Add heads: [{type: decision}].")
    own: list[str] = []
    with progress() as bar:
        task = bar.add_task(OWN, total=None, note="")
        for start in bar.track(range(0, len(items), batch_size), task_id=task):
            own += decided(model, states_at(model, _prompts(model, items[start : start + batch_size]), None))
    return {OWN: own, **{name: [name] * len(items) for name in baselines}}


def _prompts(model: Assembly, items: Sequence[Item]) -> list[list[str]]:
    """Return what items say, their question or else their first caption, behind the caption prompt."""
    return [[model.spec.prompt.caption + answer_text(item.question or item.answers[0])] for item in items]
