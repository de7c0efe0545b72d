"""Compare images by the encoder's own features: similar examples, and the answer of the nearest training image.

A captioner that does not beat the caption of the nearest training image has not learned to caption.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from mllm.assembly import Assembly
from mllm.config.loading import load
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.data.sources import read_source
from mllm.encoders.feature_store import open_store
from mllm.media.images import ImageSource

NEAREST = "nearest"
LIMIT = 5000  # training images at most, drawn by a seed
_BATCH = 32


def mean_features(items: Sequence[Item], model: Assembly) -> Tensor:
    """Return the mean features ``(N, D_vis)`` of each item's last image, of length 1."""
    numbers: dict[ImageSource, int] = {}
    rows = [numbers.setdefault(item.images[-1], len(numbers)) for item in items]
    distinct, features = list(numbers), open_store(model, "auto").whole
    means = [
        features(distinct[start : start + _BATCH]).float().mean(dim=1) for start in range(0, len(distinct), _BATCH)
    ]
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)[rows].cpu()


def training_items(model: Assembly) -> list[Item]:
    """Return the captions and questions about images that the run of a model was trained on, at most 5,000.

    Raises:
        MLLMError: the run's data is no longer there.
    """
    recipe = Path(model.source) / "recipe.yaml"
    if not model.source or not recipe.is_file():
        return []
    stages = load(str(recipe)).stages
    specs = {spec.model_dump_json(): (spec, stage.data.skip) for stage in stages for spec in stage.data.train}
    items: list[Item] = []
    for spec, skip in specs.values():
        source = read_source(spec, skip=skip).items
        order = Random(0).sample(range(len(source)), min(LIMIT, len(source)))
        chosen = (source[index] for index in (order if isinstance(source, Lazy) else sorted(order)))
        items += [item for item in chosen if item.images and item.answers]
    return items if len(items) <= LIMIT else Random(0).sample(items, LIMIT)


def nearest_answers(model: Assembly, items: Sequence[Item], training: Sequence[Item]) -> list[str]:
    """Return for each item the answer of the training item with the most similar image.

    For a caption it is that item's first caption. For a question it is the most frequent answer to the same question,
    or, where no training item has that question, to any; an item without an image, or of a kind that was not trained,
    has the answer ``""``. A training item with the item's own image is left out.
    """
    by_question: dict[str | None, list[int]] = defaultdict(list)
    for number, item in enumerate(training):
        by_question[item.question].append(number)
    asked = [number for number, item in enumerate(training) if item.question is not None]
    shown = [number for number, item in enumerate(items) if item.images]
    answers = [""] * len(items)
    if not shown or not training:
        return answers
    queries, keys = mean_features([items[number] for number in shown], model), mean_features(training, model)
    with_image: dict[ImageSource, list[int]] = defaultdict(list)
    for number, item in enumerate(training):
        for image in item.images:
            with_image[image].append(number)
    for query, number in zip(queries, shown, strict=True):
        item = items[number]
        same = by_question.get(item.question) or (asked if item.question is not None else [])
        if own := {index for image in item.images for index in with_image.get(image, ())}:
            same = [index for index in same if index not in own]
        if same:
            best = training[same[int((keys @ query)[same].argmax())]]
            answers[number] = best.answers[0] if item.question is None else Counter(best.answers).most_common(1)[0][0]
    return answers
