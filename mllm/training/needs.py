"""Find the runs that a recipe stands on (``needs``), and which of them are not there yet.

A need is the name of another recipe. Its run is the folder of that name that the recipe refers to: as ``init.from``, or
as an argument of a part or of a suite: ``runs/emoji-decoder``, or the model of a stage in it. If overrides name another
run instead, it is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.config import loading
from mllm.config.recipe import Recipe
from mllm.errors import MLLMError
from mllm.saving import STAGES, is_saved


@dataclass(frozen=True)
class Need:
    """A run that a recipe stands on.

    Attributes:
        recipe: the name or path of the recipe that trains it.
        folder: of the run.
        started: whether it was interrupted, and is to be continued.
    """

    recipe: str
    folder: Path
    started: bool

    @property
    def note(self) -> str:
        """Return a sentence for the user of a recipe that stands on it."""
        return f"{self.folder} is not there yet: the recipe {self.recipe} is trained first."


def missing(config: Recipe) -> list[Need]:
    """Return the runs that a recipe stands on and that are not finished, each after those that it stands on itself.

    Raises:
        MLLMError: a recipe that does not exist, or recipes that need each other in a circle.
    """
    return list(dict.fromkeys(_missing(config, (config.name,))))


def _missing(config: Recipe, above: tuple[str, ...]) -> Iterator[Need]:
    """Yield a recipe's needs, where ``above`` are the names of the recipes that need it, and its own."""
    paths = sorted({_run_of(path) for path in paths_in(config)})
    for name in config.needs:
        needed = _needed(name, config.name)
        if needed.name in above:
            raise MLLMError(f"'needs' goes in a circle: {' -> '.join((*above, needed.name))}. Remove one of them.")
        further = list(_missing(needed, (*above, needed.name)))  # also of a finished run: a circle is always found
        for folder in paths:
            if folder.name == needed.name and not is_saved(folder):
                yield from further
                yield Need(name, folder, started=(folder / "recipe.yaml").is_file())


def paths_in(config: Recipe) -> set[Path]:
    """Return every value of a recipe that may be the path of a run."""
    values = config.model_dump(mode="json", by_alias=True, exclude={"needs"})
    return {Path(text) for text in _texts(values) if "/" in text}


def _run_of(folder: Path) -> Path:
    """Return the run that a folder is, or whose stage's model it is: ``RUN/stages/NAME``."""
    return folder.parents[1] if folder.parent.name == STAGES else folder


def _needed(name: str, by: str) -> Recipe:
    try:
        return loading.load(name)
    except MLLMError as error:
        raise MLLMError(f"The recipe {by} needs {name!r}: {error}") from None


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a plain value."""
    if isinstance(value, str):
        yield value
    for member in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(member)
