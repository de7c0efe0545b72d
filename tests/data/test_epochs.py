"""Epochs: as many steps as it takes the stream to read the data so often, on average of the sources."""

from __future__ import annotations

import pytest

from mllm.config.data import DataSpec
from mllm.config.prompt import PromptSpec
from mllm.config.recipe import OptimSpec, Stage
from mllm.data.epochs import examples_of_epoch, steps_of, with_steps
from mllm.data.items import Item
from mllm.data.sources import Source
from mllm.data.stream import Stream


def source(size: int, weight: float = 1.0, name: str = "a") -> Source:
    items = [Item(id=f"{name}{index}", images=(), question="q", answers=(f"{name}{index}",)) for index in range(size)]
    return Source(DataSpec(format="table", weight=weight), items)


def stage(epochs: float | None, batch_size: int, accumulate: int = 1, steps: int | None = None) -> Stage:
    optim = OptimSpec(accumulate=accumulate)
    return Stage(name="s", train={"connector": 1e-3}, epochs=epochs, steps=steps, batch_size=batch_size, optim=optim)


def read(sources: list[Source], number: int) -> set[str]:
    """Return the examples that the stream draws."""
    stream = Stream(sources, PromptSpec(), seed=3)
    return {str(pieces[-1].text) for pieces in stream.take(number)}


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 1), (4, 1), (4, 3), (7, 1), (20, 1), (64, 1)])
def test_in_the_steps_of_an_epoch_every_example_is_read_and_in_one_less_not(batch: int, accumulate: int) -> None:
    sources = [source(20)]
    steps = steps_of(stage(1, batch, accumulate), sources)
    assert steps is not None and len(read(sources, steps * batch * accumulate)) == 20
    assert len(read(sources, (steps - 1) * batch * accumulate or 1)) < 20


def test_an_epoch_of_a_mixture_ends_when_the_slowest_source_has_been_read_on_average() -> None:
    sources = [source(30, weight=0.1, name="a"), source(40, weight=0.3, name="b")]

    def drawn(seed: int) -> int:
        """Return after how many examples the stream has read both sources."""
        seen: set[str] = set()
        for number, pieces in enumerate(Stream(sources, PromptSpec(), seed=seed), start=1):
            seen.add(str(pieces[-1].text))
            if len(seen) == 70:
                return number
        raise AssertionError

    mean = sum(drawn(seed) for seed in range(60)) / 60
    assert float(examples_of_epoch(sources)) == pytest.approx(mean, rel=0.06)


def test_weights_and_epochs_are_taken_as_they_are_written() -> None:
    """In floating point, 3 x 0.1 of ten examples is more than three."""
    assert examples_of_epoch([source(10, 0.1), source(10, 0.2)]) == 30
    assert steps_of(stage(0.3, 1), [source(10)]) == 3
    assert steps_of(stage(1e-6, 32), [source(10)]) == 1


def test_steps_that_are_given_stay() -> None:
    given, counted = stage(None, 4, steps=9), stage(2, 4)
    assert with_steps(given, [source(10)]).steps == 9
    resolved = with_steps(counted, [source(10)])
    assert (resolved.steps, resolved.epochs, counted.steps) == (5, 2, None)
