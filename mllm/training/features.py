"""Compute the features of a recipe's images in a pass of its own, before anything is trained: `mllm features`.

Every process takes a share of the images. What is computed is in the feature cache while the pass runs, so one that was
interrupted continues where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from accelerate.utils import gather_object

from mllm.build import build_encoder, join
from mllm.config import loading
from mllm.config.parts import AssemblySpec
from mllm.config.recipe import Stage
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.data.skipping import Skipped
from mllm.data.sources import Source, read_all
from mllm.devices import DeviceName, choose_device, use_device
from mllm.encoders.feature_store import FeatureStore, open_store
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.model import Model
from mllm.processes import processes, progress
from mllm.training.batches import training_sources
from mllm.training.signals import Signals

BATCH = 64  # images that are requested together, while the next ones are opened
WIDTH = 1024  # of a connector that is built without its language model: the number of its tokens is the same
NOTHING = (  # what keeps a stage's features from being computed before it, and why
    (lambda stage: stage.encoder is None, "there is no encoder"),
    (lambda stage: stage.trains("encoder"), "the encoder trains"),
    (lambda stage: stage.assembly.trains("encoder"), "the encoder is trained by a stage before"),
    (lambda stage: "encoder" in (stage.init.parts or ()), "the encoder is another run's"),
    (lambda stage: stage.train and stage.data.augment, "data.augment changes images in every step"),
    (lambda stage: stage.feature_cache.mode == "off", "cache is off"),
    (lambda stage: stage.fit and stage.fit.targets == "tokens", "its fit reads no images"),
)


@dataclass
class Pass:
    """What a pass over one stage's images came to, of all processes together.

    Attributes:
        stage: the stage's name.
        present: images whose features were there already.
        computed: images whose features were computed.
        skipped: images that could not be read.
        full: whether the cache's limit was reached, so that images are left out.
        note: why the stage has no features to compute; empty: it has.
    """

    stage: str
    present: int = 0
    computed: int = 0
    skipped: int = 0
    full: bool = False
    note: str = ""

    def __str__(self) -> str:
        """Return a line for the user."""
        if self.note:
            return f"{self.stage}: nothing to compute: {self.note}."
        skipped = f", {self.skipped:,} could not be read" if self.skipped else ""
        full = "; the rest is beyond the limit: see cache.limit, or set cache=on" if self.full else ""
        return f"{self.stage}: features of {self.computed:,} images computed, of {self.present:,} there{skipped}{full}."

    def gathered(self) -> Pass:
        """Return the sum over all processes."""
        parts: list[Pass] = gather_object([self])
        counts = {name: sum(getattr(part, name) for part in parts) for name in ("present", "computed", "skipped")}
        return replace(self, **counts, full=any(part.full for part in parts))


def make_features(
    recipe: str,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    device: DeviceName | None = None,
    command: Sequence[str] = (),
) -> list[Pass]:
    """Compute the features of a recipe's training and validation images, and return what each stage's pass came to.

    Args:
        recipe: a recipe's name, or a path to a YAML file.
        overrides: dotted.
        device: where this process computes; see `mllm.train`.
        command: that continues an interrupted pass, for its message.

    Raises:
        MLLMError: a recipe, part or data set that is wrong, or more unreadable images than ``data.skip`` allows.
        Interrupted: a signal stopped it; what was computed is on disk.
    """
    config = loading.load(recipe, overrides)
    processes()
    use_device(device)
    passes, done = [], list[Any]()
    for stage in config.stages:
        reason = next((reason for applies, reason in NOTHING if applies(stage)), "")
        same = (stage.assembly.encoder, stage.cache, stage.data.train, stage.data.val, stage.fit is None)
        if not reason and same in done:
            reason = "its images are those of a stage before"
        done.append(same)
        passes.append(Pass(stage.name, note=reason) if reason else _pass(stage, command))
    return passes


def _pass(stage: Stage, command: Sequence[str]) -> Pass:
    """Compute the features of one stage's images."""
    model = _encoding(stage.assembly)
    if not model.encoder.cacheable:
        return Pass(stage.name, note="the encoder's features are not cached")
    sources = training_sources(stage)
    if stage.fit is None and stage.data.val:
        sources += read_all(stage.data.val, skip=stage.data.skip)
    store = open_store(model, stage.feature_cache)
    work = _Work(stage, model, store, sources)
    with Signals() as signals, progress() as bar, signals.deferred():
        task = bar.add_task(stage.name, total=work.size, note="")
        try:
            for number in work.batches():
                bar.update(task, advance=number, note=f"{work.result.computed:,} computed")
                if signals.received or store.full:
                    break
        finally:
            store.flush()
        if signals.received:
            raise signals.stopped(f"after {work.result.computed} images of stage {stage.name} were encoded", command)
    return replace(work.result, full=store.full).gathered()


def _encoding(spec: AssemblySpec) -> Model:
    """Return the parts of a model that its features depend on: the encoder, and a connector that bounds its tiles."""
    encoder = build_encoder(spec, device=choose_device())
    connector = spec.connector if encoder.tiling is not None else None
    if connector is not None:
        connector = connector.model_copy(update={"vocabulary": None, "width": WIDTH})
    without: dict[str, Any] = {
        "lm": None,
        "decoder": None,
        "scorer": None,
        "adapters": [],
        "heads": [],
        "tokens": [],
        "trained": [],
    }
    return join(spec.model_copy(update={**without, "connector": connector}), encoder=encoder, lm=None)


class _Work:
    """The images of one process, which are encoded batch by batch."""

    def __init__(self, stage: Stage, model: Model, store: FeatureStore, sources: Sequence[Source]) -> None:
        self._model, self._store, self._whole = model, store, stage.fit is not None
        self.result = Pass(stage.name)
        self._skipped = Skipped(stage.data.skip, sum(len(source.items) for source in sources), self._log)
        own = slice(processes().process_index, None, processes().num_processes)
        listed = [item for source in sources if not isinstance(source.items, Lazy) for item in source.items]
        self._images = list(dict.fromkeys(image for item in listed for image in images_in(item)))[own]
        self._lazy = [source.items for source in sources if isinstance(source.items, Lazy)]
        self._indices = [range(len(items))[own] for items in self._lazy]
        self.size = len(self._images) + sum(map(len, self._indices))

    def batches(self) -> Iterator[int]:
        """Compute the features of one batch after another; yield the number of its images."""
        images = self._readable()
        batch = list(islice(images, BATCH))
        self._store.expect(batch)
        while batch:
            following = list(islice(images, BATCH))
            self._store.expect(following)
            self._compute(batch)
            yield len(batch)
            batch = following

    def _readable(self) -> Iterator[Any]:
        """Yield the images of this process; items that are read now and cannot be are skipped."""
        yield from self._images
        for items, indices in zip(self._lazy, self._indices, strict=True):
            for index in indices:
                try:
                    images = images_in(items[index])
                except MLLMError as error:
                    self._skipped.note(str(error))
                    continue
                yield from images

    def _compute(self, batch: Sequence[Any]) -> None:
        """Compute the features of images that are not cached; unreadable ones are sought on failure."""
        try:
            missing = self._encode(batch)
        except MLLMError:
            batch = [image for image in batch if self._opens(image)]
            missing = self._encode(batch)
        self.result.computed += missing
        self.result.present += len(batch) - missing

    def _encode(self, batch: Sequence[Any]) -> int:
        """Compute the features that are missing, and return of how many images."""
        missing = self._store.missing(batch, whole=self._whole)
        if missing:
            (self._store.whole if self._whole else self._store)(missing)
        return len(missing)

    def _opens(self, image: Any) -> bool:
        """Whether an image can be read; one that cannot is skipped, and an error where there are too many of them."""
        try:
            if self._store.missing([image], whole=self._whole):
                self._model.encoder.open(image)
        except MLLMError as error:
            self._skipped.note(str(error))
            return False
        return True

    def _log(self, skipped: str) -> None:
        self.result.skipped += 1
        logging.getLogger("mllm").warning("Skipped: %s", skipped)


def images_in(item: Item) -> list[ImageSource]:
    """Return the images of an item, of its document and of its solved examples."""
    document = [piece for piece in item.document if not isinstance(piece, str)]
    return [*item.images, *document, *(image for shot in item.shots for image in images_in(shot))]
