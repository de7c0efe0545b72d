"""Check a recipe's data before it is trained on: unreadable images, items without a target, leaks."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.config import loading
from mllm.config.data import DataSpec
from mllm.config.recipe import Recipe, Stage
from mllm.config.suites import SuiteSpec
from mllm.data.files import some
from mllm.data.items import Item, pieces_of
from mllm.data.report import Report
from mllm.data.sources import Source, read_source
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.evaluation import suite_items
from mllm.media.images import ImageSource
from mllm.media.texts import TextSource
from mllm.model import Model
from mllm.planning.needs import planned_needs
from mllm.planning.paper import meta_model
from mllm.prompts.batch import IGNORED, encode
from mllm.prompts.length import length_of, with_short_answers
from mllm.prompts.pieces import Piece, text_of, without_images

PLACEHOLDER = "<image>"  # other frameworks' marker of an image; here it would be read as text

Track = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass
class SourceReport:
    """The content of one source, and what is wrong with it."""

    name: str  # "align: train 1, coco-captions"
    role: str  # train, val or suite
    items: int = 0
    answers: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens of each example, images included
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out as the recipe asks for
    hashes: set[str] = field(default_factory=set, repr=False)  # of the images' pixels

    @property
    def images(self) -> int:
        """Return the number of different images."""
        return len(self.hashes)

    def histogram(self, bins: int = 8) -> list[tuple[int, int, int]]:
        """Return the distribution of the lengths: from, to (inclusive), number of examples."""
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
) -> tuple[list[SourceReport], list[str]]:
    """Read all data of a recipe, open every image, and count every example's tokens.

    Args:
        recipe: a name or a path.
        overrides: dotted.
        track: wraps the items of a source, to show progress.
        data: the folder of the files of ``eval.suites``, as `mllm.evaluate` takes it.

    Returns:
        A report for each source, and the leaks between sources: images that are trained on and validated or evaluated
        on. Images are compared by their pixels, whatever their files are called.

    Raises:
        MLLMError: the recipe does not fit (see `mllm.planning.check`), or a reader refuses its files.
    """
    config = loading.load(recipe, overrides)
    with planned_needs(config):
        return _inspected(config, track, data)


def _inspected(config: Recipe, track: Track, data: str | Path | None) -> tuple[list[SourceReport], list[str]]:
    reports: dict[str, SourceReport] = {}
    for stage in config.stages:
        model = meta_model(stage)
        for role, specs in (("train", stage.data.train), ("val", stage.data.val)):
            for number, spec in enumerate(specs, start=1):
                seed = stage.seed if role == "train" else 0
                limits = f"{stage.data.max_length} {stage.data.answer_length}"
                key = f"{role} {spec!r} {seed} {stage.prompt!r} {limits}"  # stages often share data
                if key not in reports:
                    report = SourceReport(f"{stage.name}: {role} {number}, {spec.format}", role)
                    reports[key] = _source(report, read_source(spec, seed=seed, skip=1.0), stage, model, track)
    suites = [_suite(suite, suite.data or data, config.eval.limit, track) for suite in config.eval.suites]
    return list(reports.values()), _leaks([*reports.values(), *suites])


def _source(report: SourceReport, source: Source, stage: Stage, model: Model, track: Track) -> SourceReport:
    """Fill in a source's report."""
    wrong: dict[str, list[str]] = defaultdict(list)
    opened: dict[ImageSource, str] = {}
    ids: Counter[str] = Counter()
    report.items = len(source.items)
    for index in track(range(len(source.items))):
        try:
            item = source.items[index]
        except MLLMError as error:
            wrong["items cannot be read"].append(str(error))
            continue
        ids[item.id] += 1
        report.answers += len(item.answers)
        wrong["images cannot be read"] += _open(item, opened)
        examples = _examples(item, source.spec, stage, model)
        if not examples:
            wrong["items have no answer, so there is nothing to learn from them"].append(item.id)
            continue
        if any(PLACEHOLDER in text for pieces in examples for text in _texts(pieces)):
            wrong[f"items contain the text {PLACEHOLDER!r}, which is read as text here"].append(item.id)
        if model.generates_text and model.lm.tokenizer is not None:
            _measure(report, wrong, item, examples, stage, model)
    wrong["ids belong to several items"] = [key for key, count in ids.items() if count > 1]
    report.problems = _bad_rows(report.name, source.report, stage.data.skip)
    report.problems += [f"{report.name}: {len(names)} {what}: {some(names)}" for what, names in wrong.items() if names]
    report.notes = [f"{report.name}: {line}" for line in source.report.lines(apart=("bad rows",))]
    report.hashes = {key for key in opened.values() if key}
    if (source.spec.shots or source.spec.concatenate) and report.lengths:
        report.lengths = _combined(source, stage, model)
    return report


def _bad_rows(name: str, report: Report, skip: float) -> list[str]:
    """Return how many rows of a source are bad, with the first of them, and whether training stops because of them."""
    if not report.bad:
        return []
    stops = f"; more than data.skip={skip} allows" if report.bad > skip * report.rows else ""
    return [f"{name}: {report.bad} of {report.rows} rows are bad{stops}: {some(report.reasons)}"]


def _open(item: Item, opened: dict[ImageSource, str]) -> list[str]:
    """Open an item's images, hash the pixels of each, and return the errors of those that fail."""
    errors = []
    for source in item.images:
        if source not in opened and not isinstance(source, TextSource):
            opened[source] = ""
            try:
                image = source.open()
                opened[source] = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
            except MLLMError as error:
                errors.append(str(error))
    return errors


def _examples(item: Item, spec: DataSpec, stage: Stage, model: Model) -> list[list[Piece]]:
    """Return all examples that may be made of an item of a source: one for each answer."""
    prompt, limit = spec.prompt_over(stage.prompt), stage.data.answer_length
    answers = [answer for answer in item.answers if answer.strip()]
    if not answers and (item.messages or item.document):
        examples = [pieces_of(item, prompt, lm=model.lm)]
    else:
        examples = [pieces_of(item, prompt, answer, model.lm) for answer in answers]
    return examples if limit is None else [with_short_answers(pieces, limit, model.lm) for pieces in examples]


def _texts(pieces: Sequence[Piece]) -> list[str]:
    return [text_of(piece) for piece in without_images(pieces)]


def _measure(
    report: SourceReport,
    wrong: dict[str, list[str]],
    item: Item,
    examples: list[list[Piece]],
    stage: Stage,
    model: Model,
) -> None:
    """Note how long an item's examples are, and whether they have a target."""
    try:
        encoded = [encode(pieces, lm=model.lm, num_visual=model.counts) for pieces in examples]
    except MLLMError as error:  # of an image whose tiles cannot be counted
        if str(error) not in wrong["images cannot be read"]:
            wrong["images cannot be cut into tiles"].append(str(error))
        return
    report.lengths += [len(one.ids) for one in encoded]
    longest, limit = max(len(one.ids) for one in encoded), stage.data.max_length
    if model.lm.context is not None and longest >= model.lm.context:
        wrong[f"items do not fit into the language model's context of {model.lm.context} tokens"].append(item.id)
    if report.role == "train" and limit is not None and longest > limit:
        what = "lose text" if stage.data.truncate == "text" else "are left out"
        wrong[f"items {what}: they are longer than data.max_length, {limit} tokens"].append(item.id)
    ends = {IGNORED, *model.lm.text.ends}
    if any(set(one.labels) <= ends for one in encoded):
        wrong["items have no token to learn but the end of the sequence"].append(item.id)


def _combined(source: Source, stage: Stage, model: Model) -> list[int]:
    """Return the lengths of as many examples as there are items, with the examples that precede them."""
    stream = Stream([source], stage.prompt, seed=0, lm=model.lm)
    lengths = []
    for pieces in stream.take(len(source.items)):
        with contextlib.suppress(MLLMError):  # of an image that was noted
            lengths.append(length_of(pieces, model.lm, model.counts))
    return lengths


def _suite(suite: SuiteSpec, data: str | Path | None, limit: int | None, track: Track) -> SourceReport:
    items = suite_items(suite.suite, data, suite.overrides)[:limit]
    opened: dict[ImageSource, str] = {}
    for item in track(items):
        _open(item, opened)
    return SourceReport(f"suite {suite.label}", "suite", len(items), hashes={key for key in opened.values() if key})


def _leaks(reports: Sequence[SourceReport]) -> list[str]:
    """Return which sources are validated or evaluated on and share images with the training data."""
    trained = set().union(*(report.hashes for report in reports if report.role == "train"))
    shared = [(report, len(report.hashes & trained)) for report in reports if report.role != "train"]
    return [f"{each.name}: {count} of {each.images} images are trained on, too." for each, count in shared if count]
