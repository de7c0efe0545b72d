"""The closed-form start of a retrieval head: what captions' states and pictures' features have in common.

Canonical correlations, scaled by how strong they are, as in Gong et al. (arXiv:1212.4522, eq. 6 with p = 1). The sums
are accumulated as the rows stream by, so memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Literal

from torch import Tensor

from mllm.errors import MLLMError
from mllm.fits.base import Fit, Material
from mllm.fits.regression import Correlation, Maps, put
from mllm.prompts.pieces import answer_text
from mllm.readout.states import read_texts
from mllm.readout.tokens import HEAD, known_tokens, token_id


class Retrieval(Fit):
    """Sets the head's two maps; its scale stays. Of each picture's captions one is drawn.

    Args:
        solver: ``correlation``; there is no other.
        strength: see `Correlation.solve`.
        chunk: pictures at once.

    Raises:
        MLLMError: another solver.
    """

    told = "correlation"

    def __init__(self, *, solver: Literal["correlation"], strength: float = 0.01, chunk: int = 64) -> None:
        super().__init__(strength=strength, chunk=chunk)
        if solver != "correlation":
            raise MLLMError(f"stages.fit of heads.retrieval has solver {solver!r}: expected correlation.")

    def problems(self, model: Any) -> list[str]:
        """Return what the model has not that this needs, and what to give."""
        try:
            token_id(model)
        except MLLMError as error:
            return [f"fits the retrieval head. {error}"]
        return []

    def sums(self, model: Any) -> Correlation:
        """Return the sums, empty."""
        head = model.heads[HEAD]
        return Correlation(head.text.in_features, head.image.in_features)

    def rows(self, model: Any, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield captions' states ``(N, D_lm)`` at the head's token, and pictures' mean features ``(N, D_vis)``."""
        which = known_tokens(model).index(model.heads[HEAD].token)
        for part, seen in data.seen(self.chunk):
            texts = [answer_text(Random(f"{data.seed}/{item.id}").choice(item.answers)) for item in part]
            yield read_texts(model, texts)[0][:, which], seen.float().mean(1)

    def solve(self, model: Any, sums: Correlation) -> Maps:
        """Return the maps."""
        return sums.solve(model.heads[HEAD].dim, self.strength)

    def put(self, model: Any, sums: Correlation, solution: Maps) -> float:
        """Set the maps, and return the mean of the correlations, as they are scaled."""
        head = model.heads[HEAD]
        put(head.text, solution.x.T, solution.x_bias)
        put(head.image, solution.y.T, solution.y_bias)
        return float(solution.correlations.mean())
