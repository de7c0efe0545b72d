"""Look a recipe's data through before it is trained on: unreadable pictures, items that teach nothing, leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mllm import recipe as recipes
from mllm.check import on_paper
from mllm.data.items import Item, pieces_of, question_text
from mllm.data.loading import read
from mllm.data.reading import some
from mllm.errors import MLLMError
from mllm.images import ImageSource
from mllm.prompt import encode
from mllm.spec import DataSpec, PromptSpec

PLACEHOLDER = "<image>"  # as other frameworks mark an image's place; here it would be read as words

Track = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass
class Found:
    """What one source holds, and what is wrong with it."""

    name: str  # "align: train 1, coco-captions"
    role: str  # train or val
    items: int
    answers: int
    pictures: int  # distinct ones
    lengths: tuple[int, int, int] | None  # positions of an example, image included: shortest, median, longest
    problems: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set, repr=False)  # of the pictures' content


def inspect(
    recipe: str, overrides: Mapping[str, Any] | Sequence[str] = (), track: Track = iter
) -> tuple[list[Found], list[str]]:
    """Read all data of a recipe, open every picture, and count every example's positions.

    Args:
        recipe: a name or a path.
        overrides: dotted.
        track: wraps the items of a source, to show progress.

    Returns:
        What each source holds, and what is wrong between sources: pictures that are trained on and validated on.

    Raises:
        MLLMError: the recipe does not fit (see `mllm.check`), or a reader finds something wrong.
    """
    config = recipes.load(recipe, overrides)
    found: dict[str, Found] = {}
    for stage in config.stages:
        model = on_paper(stage, config)
        for role, specs in (("train", stage.data.train), ("val", stage.data.val)):
            for number, spec in enumerate(specs, start=1):
                key = f"{role} {spec!r} {stage.prompt!r}"  # stages mostly share their data
                if key not in found:
                    name = f"{stage.name}: {role} {number}, {spec.format}"
                    found[key] = _source(name, role, spec, stage.prompt, model, track)
    return list(found.values()), _shared(list(found.values()))


def _source(name: str, role: str, spec: DataSpec, prompt: PromptSpec, model: Any, track: Track) -> Found:
    items = read(spec)
    keys: dict[ImageSource, str] = {}
    lengths: list[int] = []
    wrong: dict[str, list[str]] = {"pictures cannot be read": []}
    silent, marked, long = [], [], []
    for item in track(items):
        for image in item.images:
            if image not in keys:
                try:
                    image.open()
                    keys[image] = image.key()
                except MLLMError as error:
                    keys[image] = ""
                    wrong["pictures cannot be read"].append(str(error))
        answers = [answer for answer in item.answers if answer.strip()]
        if item.messages:
            answers = [""]  # one example, whatever its turns
        if not answers:
            silent.append(item.id)
            continue
        if any(PLACEHOLDER in text for text in (*answers, question_text(item, prompt))):
            marked.append(item.id)
        if model.lm.tokenizer is not None:
            own = [_length(item, answer, prompt, model) for answer in answers]
            lengths += own
            if model.lm.context is not None and max(own) >= model.lm.context:
                long.append(item.id)
    twice = [key for key, count in Counter(item.id for item in items).items() if count > 1]
    wrong |= {
        "items have no answer, so there is nothing to learn from them": silent,
        f"items hold the text {PLACEHOLDER!r}, which is read as words here": marked,
        f"items do not fit into the language model's {model.lm.context} positions": long,
        "ids stand for several items": twice,
    }
    return Found(
        name,
        role,
        items=len(items),
        answers=sum(len(item.answers) for item in items),
        pictures=len({key for key in keys.values() if key}),
        lengths=(min(lengths), round(median(lengths)), max(lengths)) if lengths else None,
        problems=[f"{name}: {len(names)} {what}: {some(names)}" for what, names in wrong.items() if names],
        keys={key for key in keys.values() if key},
    )


def _length(item: Item, answer: str, prompt: PromptSpec, model: Any) -> int:
    """Return the positions of an example: its tokens, visual ones included, and the end."""
    return len(
        encode(pieces_of(item, prompt, answer, model.lm), lm=model.lm, num_visual=model.connector.num_tokens).ids
    )


def _shared(found: Sequence[Found]) -> list[str]:
    """Return what is trained on and validated on."""
    trained = set().union(*(source.keys for source in found if source.role == "train"))
    leaks = [(source, len(source.keys & trained)) for source in found if source.role == "val"]
    told = "{name}: {count} of {all} pictures are trained on, too."
    return [told.format(name=source.name, count=count, all=len(source.keys)) for source, count in leaks if count]
