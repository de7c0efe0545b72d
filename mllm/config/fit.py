"""Define the keys of how a stage gets trained tensors: from another run, by a closed form, or by a loss."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from mllm.config.base import PartSpec, Spec


class InitSpec(Spec):
    """Trained parts taken from another run."""

    model_config = ConfigDict(populate_by_name=True)
    source: str | None = Field(default=None, alias="from")  # a run, or a saved model
    parts: list[str] = []  # paths in it (connector, connector.qformer, heads.retrieval); none: all trained parts


class FitSpec(Spec):
    """A closed-form fit of one part, without a gradient. Defaults are those of the part's fit, in ``fits/``."""

    part: str = "connector"  # or a head's path, heads.NAME
    solver: Literal["ridge", "least-squares", "procrustes", "correlation"] | None = None
    targets: (
        Literal["caption-words", "content-words", "words-in-order", "texts", "tokens", "sentences", "guide"] | None
    ) = None
    guide: str | None = None  # of targets: guide, its name; null: the only guide that embeds images
    strength: float | None = Field(default=None, gt=0)  # of the ridge, as a share of the features' mean variance
    stop_words: bool | None = None  # false: caption-words leave function words out
    standardize: bool | None = None  # features by the images' moments, embeddings by the vocabulary's; no intercept

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out keys that a run of before did not have, so that it is resumed unchanged."""
        values: dict[str, Any] = write(self)
        later = ("stop_words", "standardize", "guide")
        return {key: value for key, value in values.items() if key not in later or value is not None}

    def options(self) -> dict[str, Any]:
        """Return the arguments of the fit that are given."""
        return self.model_dump(exclude={"part"}, exclude_none=True)


class ObjectiveSpec(PartSpec):
    """A loss by its registry name, and its weight in the stage's sum."""

    weight: float = Field(default=1.0, ge=0)
