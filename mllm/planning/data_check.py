"""Look a recipe's data through before it is trained on: unreadable pictures, items that teach nothing, leaks."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.config import loading as recipes
from mllm.config.recipe import Stage
from mllm.data.files import some
from mllm.data.items import Item, pieces_of
from mllm.data.sources import Source, read
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.evaluation import suite_items
from mllm.media.images import ImageSource
from mllm.planning.paper import on_paper
from mllm.prompts.batch import IGNORED, encode
from mllm.prompts.length import length_of
from mllm.prompts.pieces import Piece, without_images

PLACEHOLDER = "<image>"  # as other frameworks mark an image's place; here it would be read as words

Track = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass
class Found:
    """What one source holds, and what is wrong with it."""

    name: str  # "align: train 1, coco-captions"
    role: str  # train, val or suite
    items: int = 0
    answers: int = 0
    lengths: list[int] = field(default_factory=list)  # positions of each example, images included
    problems: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set, repr=False)  # of the pictures' pixels

    @property
    def pictures(self) -> int:
        """Return how many different pictures there are."""
        return len(self.keys)

    def histogram(self, bins: int = 8) -> list[tuple[int, int, int]]:
        """Return the lengths' distribution: from, to (inclusive), how many examples."""
        if not self.lengths:
            return []
        least, most = min(self.lengths), max(self.lengths)
        width = (most - least) // bins + 1
        counts = Counter((length - least) // width for length in self.lengths)
        starts = [least + number * width for number in range(max(counts) + 1)]
        return [(start, start + width - 1, counts[number]) for number, start in enumerate(starts)]


def inspect(
    recipe: str,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    track: Track = iter,
    *,
    data: str | Path | None = None,
) -> tuple[list[Found], list[str]]:
    """Read all data of a recipe, open every picture, and count every example's positions.

    Args:
        recipe: a name or a path.
        overrides: dotted.
        track: wraps the items of a source, to show progress.
        data: the folder of the files of ``eval.suites``, as `mllm.evaluate` takes it.

    Returns:
        What each source holds, and what is wrong between sources: pictures that are trained on, and validated or
        evaluated on; by their pixels, whatever the files are called.

    Raises:
        MLLMError: the recipe does not fit (see `mllm.planning.check`), or a reader finds something wrong.
    """
    config = recipes.load(recipe, overrides)
    found: dict[str, Found] = {}
    for stage in config.stages:
        model = on_paper(stage, config)
        for role, specs in (("train", stage.data.train), ("val", stage.data.val)):
            for number, spec in enumerate(specs, start=1):
                key = f"{role} {spec!r} {stage.prompt!r} {stage.data.max_length}"  # stages mostly share their data
                if key not in found:
                    name = f"{stage.name}: {role} {number}, {spec.format}"
                    source = Source(spec, read(spec, seed=config.seed if role == "train" else 0))
                    found[key] = _source(Found(name, role), source, stage, model, track)
    suites = [_suite(name, data, config.eval.limit, track) for name in config.eval.suites]
    return list(found.values()), _shared([*found.values(), *suites])


def _source(found: Found, source: Source, stage: Stage, model: Any, track: Track) -> Found:
    wrong: dict[str, list[str]] = defaultdict(list)
    opened: dict[ImageSource, str] = {}
    ids: Counter[str] = Counter()
    found.items = len(source.items)
    for place in track(range(len(source.items))):
        try:
            item = source.items[place]
        except MLLMError as error:
            wrong["items cannot be read"].append(str(error))
            continue
        ids[item.id] += 1
        found.answers += len(item.answers)
        wrong["pictures cannot be read"] += _opened(item, opened)
        examples = _examples(item, stage, model)
        if not examples:
            wrong["items have no answer, so there is nothing to learn from them"].append(item.id)
            continue
        if any(PLACEHOLDER in text for pieces in examples for text in _texts(pieces)):
            wrong[f"items hold the text {PLACEHOLDER!r}, which is read as words here"].append(item.id)
        if model.generates_text and model.lm.tokenizer is not None:
            _measure(found, wrong, item, examples, stage, model)
    wrong["ids stand for several items"] = [key for key, count in ids.items() if count > 1]
    found.problems = [f"{found.name}: {len(names)} {what}: {some(names)}" for what, names in wrong.items() if names]
    found.keys = {key for key in opened.values() if key}
    if (source.spec.shots or source.spec.concatenate) and found.lengths:
        found.lengths = _together(source, stage, model)
    return found


def _opened(item: Item, opened: dict[ImageSource, str]) -> list[str]:
    """Open an item's pictures, note a hash of each one's pixels, and return what is wrong with those that fail."""
    wrong = []
    for image in item.images:
        if image not in opened:
            opened[image] = ""
            try:
                picture = image.open()
                opened[image] = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
            except MLLMError as error:
                wrong.append(str(error))
    return wrong


def _examples(item: Item, stage: Stage, model: Any) -> list[list[Piece]]:
    """Return all that may be made of an item: an example for each answer."""
    answers = [answer for answer in item.answers if answer.strip()]
    if not answers and (item.messages or item.document):
        return [pieces_of(item, stage.prompt, lm=model.lm)]
    return [pieces_of(item, stage.prompt, answer, model.lm) for answer in answers]


def _texts(pieces: Sequence[Piece]) -> list[str]:
    return [piece if isinstance(piece, str) else piece.text for piece in without_images(pieces)]


def _measure(
    found: Found, wrong: dict[str, list[str]], item: Item, examples: list[list[Piece]], stage: Stage, model: Any
) -> None:
    """Note how long an item's examples are, and whether there is anything to learn."""
    encoded = [encode(pieces, lm=model.lm, num_visual=model.tokens_per_image) for pieces in examples]
    found.lengths += [len(one.ids) for one in encoded]
    longest, limit = max(len(one.ids) for one in encoded), stage.data.max_length
    if model.lm.context is not None and longest >= model.lm.context:
        wrong[f"items do not fit into the language model's {model.lm.context} positions"].append(item.id)
    if found.role == "train" and limit is not None and longest > limit:
        what = "lose text" if stage.data.truncate == "text" else "are left out"
        wrong[f"items {what}: they take more than the {limit} positions of data.max_length"].append(item.id)
    ends = {IGNORED, model.lm.eos}
    if any(set(one.labels) <= ends for one in encoded):
        wrong["items have no token to learn but an end"].append(item.id)


def _together(source: Source, stage: Stage, model: Any) -> list[int]:
    """Return the lengths of as many examples as there are items, with what stands before them."""
    stream = Stream([source], stage.prompt, seed=0, lm=model.lm)
    return [length_of(pieces, model.lm, model.tokens_per_image) for pieces in stream.take(len(source.items))]


def _suite(name: str, data: str | Path | None, limit: int | None, track: Track) -> Found:
    items = suite_items(name, data)[:limit]
    opened: dict[ImageSource, str] = {}
    for item in track(items):
        _opened(item, opened)
    return Found(f"suite {name}", "suite", items=len(items), keys={key for key in opened.values() if key})


def _shared(found: Sequence[Found]) -> list[str]:
    """Return what is trained on, and validated or evaluated on."""
    trained = set().union(*(source.keys for source in found if source.role == "train"))
    leaks = [(source, len(source.keys & trained)) for source in found if source.role != "train"]
    told = "{name}: {count} of {all} pictures are trained on, too."
    return [told.format(name=source.name, count=count, all=len(source.keys)) for source, count in leaks if count]
