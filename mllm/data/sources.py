"""Read the data entries of a recipe as sources of items, check them and compute their fingerprints."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from mllm.config.data import DataSpec
from mllm.data.as_text import as_text, in_texts
from mllm.data.hashing import hash_of
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.data.reading import Reading
from mllm.data.report import Report
from mllm.errors import MLLMError
from mllm.media.images import Black
from mllm.registry import lookup


@dataclass(frozen=True)
class Source:
    """The items of one data entry of a recipe, which may be `Lazy`, and what was left out when they were read."""

    spec: DataSpec
    items: Sequence[Item]
    report: Report = field(default_factory=Report)


def answers_of(sources: Sequence[Source], most: int = 50_000) -> Iterator[str]:
    """Yield the answers of the items of sources that can be read; of more than ``most`` items, those of every n-th."""
    for source in sources:
        for index in range(0, len(source.items), 1 + len(source.items) // most):
            with contextlib.suppress(MLLMError):
                yield from source.items[index].answers


def reader(spec: DataSpec) -> Callable[[], Sequence[Item]]:
    """Return the reader of one source, bound to its arguments.

    Raises:
        MLLMError: an unknown reader, or arguments that it does not accept.
    """
    function, reading, options = _bound(spec)
    return partial(reading.run, function, options)


def _bound(spec: DataSpec, skip: float = 0.0) -> tuple[Callable[..., Sequence[Item]], Reading, dict[str, Any]]:
    """Return a source's reader, the policy on its rows, and the reader's arguments, ``missing`` apart."""
    function = lookup("readers", spec.format)
    parameters = inspect.signature(function).parameters
    options = spec.options()
    missing = options.pop("missing", "raise")
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise MLLMError(
            f"data: the reader {spec.format!r} does not accept these arguments: {error}. "
            f"It accepts: {', '.join(parameters)}{'' if 'missing' in parameters else ', missing'}."
        ) from None
    _check_types(function, options, spec.format)
    if "missing" in parameters and not hasattr(function, "body"):  # of another package, which treats it itself
        options["missing"] = missing
    return function, Reading(skip=skip, missing=missing, images=spec.see == "image"), options


def _check_types(function: Callable[..., Any], options: Mapping[str, Any], name: str) -> None:
    """Compare the values of a reader's arguments with its annotations, as far as these can be checked.

    Raises:
        MLLMError: a value is of another type.
    """
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # of another package
        return
    for key, value in options.items():
        try:
            TypeAdapter(hints[key], config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise MLLMError(f"data: the reader {name!r} has {key}={value!r}: {reason}. Correct it.") from None
        except (KeyError, PydanticUserError):  # without an annotation, or with one that pydantic does not know
            continue


def read(spec: DataSpec, *, seed: int = 0) -> Sequence[Item]:
    """Return the items of one source, as `read_source` does; the first bad row is an error."""
    return _logged(read_source(spec, seed=seed)).items


def read_source(
    spec: DataSpec, *, seed: int = 0, skip: float = 0.0, check: Callable[[Item], None] | None = None
) -> Source:
    """Read one source, or a random ``fraction`` of its items.

    The subset depends on the seed alone, and a smaller fraction gives a subset of a larger one.

    Args:
        spec: the source.
        seed: of the subset.
        skip: the share of the rows that may be bad: they are left out.
        check: raises an `MLLMError` for an item that is no use; lazy items are checked when they are read.

    Raises:
        MLLMError: an unknown reader or argument, no items, too many bad rows, missing images, or an error of the
            reader.
    """
    function, reading, options = _bound(spec, skip)
    items = reading.run(function, options, None if spec.unlabeled else check)
    if spec.blank:
        items = _changed(items, _blank, "black")
    if spec.answer is not None:
        items = _changed(items, partial(_with_answer, spec.answer), f"answer {spec.answer}")
    if spec.unlabeled:
        items = _changed(items, _without_answers, "unlabeled")
    if spec.see == "text":  # a lazy item's caption is chosen with its answer (`mllm.data.stream`)
        items = _changed(items, as_text, "see text") if isinstance(items, Lazy) else in_texts(items)
    if spec.fraction < 1:
        order = list(range(len(items)))
        random.Random(f"{seed}/fraction").shuffle(order)
        indices = sorted(order[: math.ceil(spec.fraction * len(items))])
        items = items.part(indices) if isinstance(items, Lazy) else [items[index] for index in indices]
    return Source(spec, items, reading.report)


def _logged(source: Source) -> Source:
    """Log what was left out of a source, and return it."""
    if left_out := source.report.lines():
        _log_once(f"{source.report.label}: {'; '.join(left_out)}.")
    return source


@cache
def _log_once(text: str) -> None:
    """Log a warning, once for each text, though training, validation and planning read a source one after another."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("mllm").warning(text)


def _changed(items: Sequence[Item], change: Callable[[Item], Item], label: str) -> Sequence[Item]:
    """Return each item changed, lazy items when they are read; ``label`` is part of their fingerprint."""
    if not isinstance(items, Lazy):
        return [change(item) for item in items]
    return Lazy(
        len(items),
        lambda index: change(items[index]),
        fingerprint=lambda: f"{items.fingerprint()} {label}",
        shards=items.shards,
    )


def _blank(item: Item) -> Item:
    """Return an item with black images in place of its images."""
    if item.messages or item.document:
        raise MLLMError(
            f"data: the item {item.id!r} is a conversation or a document, but 'blank' is for captions and questions. "
            "Leave out 'blank'."
        )
    return replace(item, images=tuple(Black() for _ in item.images), shots=tuple(map(_blank, item.shots)))


def _with_answer(number: int, item: Item) -> Item:
    """Return an item with one of its answers alone: the one of a number, or else the one that is nearest to it."""
    last = len(item.answers) - 1
    index = max(0, min(number, last) if number >= 0 else last + 1 + number)
    return replace(item, answers=item.answers[index : index + 1])


def _without_answers(item: Item) -> Item:
    """Return an item with its images, and its question if it has one, alone."""
    if item.messages or item.document:
        raise MLLMError(
            f"data: the item {item.id!r} is a conversation or a document, but 'unlabeled: true' is for captions and "
            "questions. Leave it out."
        )
    return replace(item, answers=())


def read_all(specs: Sequence[DataSpec], *, seed: int = 0, skip: float = 0.0) -> list[Source]:
    """Return the sources of all entries, checked for training; ``skip`` is the share of bad rows of each.

    Raises:
        MLLMError: an item has no target, a source is too small or of the wrong kind for its settings, or an error of a
            reader.
    """
    sources = [_logged(read_source(spec, seed=seed, skip=skip, check=check_learnable)) for spec in specs]
    for source in sources:
        for item in _looked_at(source.items):
            check_combinable(item, source.spec)
        required = max(source.spec.shots, 1 if source.spec.concatenate else 0) + 1
        if len(source.items) < required:
            raise MLLMError(
                f"data: {source.spec.format} has {len(source.items)} items; shots and concatenate need {required}. "
                "Lower shots, or leave out concatenate."
            )
    return sources


def _looked_at(items: Sequence[Item]) -> Sequence[Item]:
    """Return all items, or of lazy ones the first, if it can be read: the others are looked at when they are drawn."""
    if not isinstance(items, Lazy):
        return items
    try:
        return items[:1]
    except MLLMError:
        return []


def check_learnable(item: Item) -> None:
    """Raise an `MLLMError` for an item without a target."""
    answered = any(answer.strip() for answer in item.answers)
    if not (answered or item.messages or any(isinstance(piece, str) for piece in item.document)):
        raise MLLMError(f"data: the item {item.id!r} has no answer, but training needs one. Use a split with answers.")


def check_combinable(item: Item, spec: DataSpec) -> None:
    """Raise an `MLLMError` for a conversation or a document in a source with shots or concatenated items."""
    if (spec.shots or spec.concatenate) and not item.answers:
        raise MLLMError(
            f"data: the item {item.id!r} is a conversation or a document, but shots and concatenate are for captions "
            "and questions. Leave them out for this source."
        )


def fingerprint(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return the fingerprint of a run's data: the size and a hash of each source.

    The hash covers the ids, all texts, the order and the images: their content if a source has at most 2,000 images,
    else their names and sizes in bytes, so that large data sets need not be read. Lazy items have a hash of the index
    of their files. Paths and modification times do not matter. Where rows or images were left out, their numbers are
    in it.
    """
    return [
        {
            "format": source.spec.format,
            "items": len(source.items),
            "sha256": source.items.fingerprint() if isinstance(source.items, Lazy) else hash_of(source.items),
        }
        | ({"left_out": left_out} if (left_out := source.report.left_out()) else {})
        for source in sources
    ]
