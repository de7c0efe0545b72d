"""Fit the map from texts to the features of the images that they describe (`mllm.encoders.imagined`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mllm.capabilities import ImaginesFeatures, missing
from mllm.fits.base import Material, Ridge
from mllm.model import Model


class ImaginedFit(Ridge):
    """Ridge regression from the mean feature of an image's captions to the image's features, one after another."""

    def problems(self, model: Model) -> list[str]:
        """Return what the model lacks, and what to give."""
        if isinstance(model.encoder, ImaginesFeatures):
            return []
        return [f"fits {self.path}, for which it needs {missing(ImaginesFeatures)}."]

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the captions' mean features ``(N, X)`` and the images' features ``(N, P D_vis)``."""
        for items, features in data.with_features(self.chunk):
            texts = [model.encoder.read_texts(item.answers).mean(0) for item in items]
            yield torch.stack(texts), features.flatten(1)

    def project(self, model: Model) -> torch.nn.Linear:
        """Return the map."""
        project: torch.nn.Linear = model.encoder.project
        return project
