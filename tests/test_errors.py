"""Renamed options and methods: the former name works and warns once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from mllm.errors import MLLMError, renamed_method, renamed_options, warn_renamed


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Let every test see the first warning."""
    warn_renamed.cache_clear()
    yield
    warn_renamed.cache_clear()


def test_a_former_option_warns_once_and_is_passed_on() -> None:
    with pytest.warns(FutureWarning, match="'words' is now called 'nearest_words'"):
        assert renamed_options({"words": 1, "seed": 2}, {"words": "nearest_words"}) == {"nearest_words": 1, "seed": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renamed_options({"words": 3}, {"words": "nearest_words"}) == {"nearest_words": 3}


def test_an_option_under_both_names_is_refused() -> None:
    with pytest.warns(FutureWarning), pytest.raises(MLLMError, match="'b' is given twice"):
        renamed_options({"b": 1, "a": 2}, {"a": "b"})


def test_a_former_method_does_the_same() -> None:
    class Doubler:
        def double(self, number: int) -> int:
            return 2 * number

        twice = renamed_method("Doubler.twice", double)

    with pytest.warns(FutureWarning, match=r"Doubler\.twice\(\) is now called double\(\)"):
        assert Doubler().twice(4) == 8
