"""Prepare a stage in which texts stand in images' places: check the encoder, and collect texts for the connector."""

from __future__ import annotations

import random

from mllm.capabilities import CollectsTexts, EncodesTexts, ImaginesFeatures
from mllm.config.recipe import Stage
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.media.texts import TextSource
from mllm.model import Model
from mllm.training.batches import training_sources


def check_texts(stage: Stage, model: Model) -> None:
    """Check that the encoder reads what the stage's sources show, images or texts, and what the connector compares.

    Raises:
        MLLMError: it does not, its part that encodes texts is to train and cannot, or texts come before their map.
    """
    texts = [source.see == "text" for source in (*stage.data.train, *stage.data.val)]
    encoder = model.encoder if isinstance(model.encoder, EncodesTexts) else None
    if encoder is None:
        asking = "a source has 'see: text'" if any(texts) else "connector.type=nearest-texts compares with texts"
        if any(texts) or _collectors(model):
            raise MLLMError(
                f"Stage {stage.name}: {asking}, and the model has no encoder that encodes texts. Set encoder.type to "
                "dual-encoder, run, text or imagined, or leave texts out."
            )
        return
    if encoder.texts_alone and not all(texts):
        raise MLLMError(
            f"Stage {stage.name}: the encoder encodes texts alone, and a source shows images. Give it 'see: text', or "
            "choose another encoder."
        )
    if not any(texts) and not _collectors(model):
        return
    encoder.open(TextSource(""))  # refused by a run that encodes no texts
    if stage.trains("encoder") and not encoder.texts_alone:
        raise MLLMError(
            f"Stage {stage.name} trains the encoder on texts, which is possible with encoder.type=text alone. Leave "
            "the encoder out of 'train', or use that type."
        )
    here = stage.fit is not None and stage.fit.part == "encoder.project"
    earlier = "encoder.project" in stage.assembly.trained or stage.init.source is not None
    if isinstance(encoder, ImaginesFeatures) and (here or not earlier):
        raise MLLMError(
            f"Stage {stage.name}: a source has 'see: text', and the encoder's map from texts to features is not fitted "
            "yet. Fit it in a stage before, on images with captions: fit: {part: encoder.project}, data: {train: {..., "
            "see: image}}."
        )


def collect_texts(model: Model, stage: Stage, store: FeatureStore) -> None:
    """Give a connector that compares with texts the stage's captions, unless it has texts already.

    Raises:
        MLLMError: the stage has no captions.
    """
    waiting = [connector for connector in _collectors(model) if not int(connector.collected)]
    if not waiting or not stage.data.train:
        return
    items = [item for source in training_sources(stage) for item in source.items if item.question is None]
    captions = sorted({answer.strip() for item in items for answer in item.answers} - {""})
    for connector in waiting:
        chosen = random.Random(f"{stage.seed}/texts").sample(captions, min(len(captions), connector.places))
        if not chosen:
            raise MLLMError(
                f"Stage {stage.name}: connector.type=nearest-texts compares with captions, and the training data has "
                "none. Add a source of captions."
            )
        connector.collect(store([TextSource(caption) for caption in chosen]))


def _collectors(model: Model) -> list[CollectsTexts]:
    """Return the connectors that compare with texts: the model's, and those that follow it."""
    modules = [] if model.connector is None else model.connector.modules()
    return [module for module in modules if isinstance(module, CollectsTexts)]
