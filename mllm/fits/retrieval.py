"""The closed-form start of a retrieval head: what captions' states and pictures' features have in common.

Canonical correlations, scaled by how strong they are, as in Gong et al. (arXiv:1212.4522, eq. 6 with p = 1). The sums
are accumulated as the rows stream by, so memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal

from torch import Tensor

from mllm.capabilities import RetrievalHead
from mllm.errors import MLLMError
from mllm.fits.base import Fit, Material
from mllm.fits.regression import Correlation, Maps, put
from mllm.model import Model
from mllm.prompts.pieces import answer_text
from mllm.readout.states import read_texts
from mllm.readout.tokens import image_tokens
from mllm.slots import Encoder, LanguageModel


class RetrievalFit(Fit):
    """Sets the head's two maps; its scale stays. Of each picture's captions one is drawn.

    Args:
        solver: ``correlation``; there is no other.
        strength: see `Correlation.solve`.
        chunk: pictures at once.

    Raises:
        MLLMError: another solver.
    """

    measure = "correlation"
    needs = (LanguageModel, Encoder, RetrievalHead)

    def __init__(self, *, part: str, solver: Literal["correlation"], strength: float = 0.01, chunk: int = 64) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)
        if solver != "correlation":
            raise MLLMError(f"stages.fit of heads.retrieval has solver {solver!r}: expected correlation.")

    def sums(self, model: Model) -> Correlation:
        """Return the sums, empty."""
        head = self.part(model)
        return Correlation(head.text.in_features, head.image.in_features)

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield captions' states ``(N, D_lm)`` at the head's token, and pictures' mean features ``(N, D_vis)``."""
        which = image_tokens(model).index(self.part(model).tokens[0])
        for part, seen in data.seen(self.chunk):
            texts = [answer_text(Random(f"{data.seed}/{item.id}").choice(item.answers)) for item in part]
            yield read_texts(model, texts)[0][:, which], seen.float().mean(1)

    def solve(self, model: Model, sums: Correlation) -> Maps:
        """Return the maps."""
        return sums.solve(self.part(model).dim, self.strength)

    def put(self, model: Model, sums: Correlation, solution: Maps) -> float:
        """Set the maps, and return the mean of the correlations, as they are scaled."""
        head = self.part(model)
        put(head.text, solution.x.T, solution.x_bias)
        put(head.image, solution.y.T, solution.y_bias)
        return float(solution.correlations.mean())
