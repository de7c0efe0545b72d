"""Fit a retrieval head in closed form: canonical correlation analysis of captions' states and image features.

The directions are scaled by their correlations, as in Gong et al. (arXiv:1212.4522, eq. 6 with p = 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal

from torch import Tensor

from mllm.capabilities import RetrievalHead
from mllm.errors import MLLMError
from mllm.fits.base import ClosedForm, Material
from mllm.fits.regression import Correlation, Maps, set_linear
from mllm.model import Model
from mllm.prompts.pieces import answer_text
from mllm.readout.states import read_texts
from mllm.readout.tokens import image_tokens
from mllm.registry import Count, NonNegative
from mllm.slots import Encoder, LanguageModel


class RetrievalFit(ClosedForm):
    """Canonical correlation analysis for the head's two maps; one caption of each image is chosen at random.

    The head's ``scale`` does not change.

    Args:
        part: the head's path.
        solver: ``correlation``; there is no other.
        strength: see `Correlation.solve`.
        chunk: images that are computed at once.

    Raises:
        MLLMError: another solver.
    """

    measure = "correlation"
    needs = (LanguageModel, Encoder, RetrievalHead)

    def __init__(
        self, *, part: str, solver: Literal["correlation"], strength: NonNegative = 0.01, chunk: Count = 64
    ) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)
        if solver != "correlation":
            raise MLLMError(f"stages.fit of heads.retrieval has solver {solver!r}: expected correlation. Set that.")

    def sums(self, model: Model) -> Correlation:
        """Return empty sums."""
        head = self.part(model)
        return Correlation(head.text.in_features, head.image.in_features)

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield captions' states ``(N, D_lm)`` at the head's token, and images' mean features ``(N, D_vis)``."""
        position = image_tokens(model).index(self.part(model).tokens[0])
        for items, features in data.with_features(self.chunk):
            texts = [answer_text(Random(f"{data.seed}/{item.id}").choice(item.answers)) for item in items]
            yield read_texts(model, texts)[0][:, position], features.float().mean(1)

    def solve(self, model: Model, sums: Correlation) -> Maps:
        """Return the maps."""
        return sums.solve(self.part(model).dim, self.strength)

    def quality(self, sums: Correlation, solution: Maps) -> float:
        """Return the mean correlation of the two sides' directions."""
        return float(sums.correlations(solution).mean())

    def apply(self, model: Model, solution: Maps) -> None:
        """Set the two linear maps."""
        head = self.part(model)
        set_linear(head.text, solution.x.T, solution.x_bias)
        set_linear(head.image, solution.y.T, solution.y_bias)
