"""Use a model as its own scorer: by its sentence space, its retrieval head, or its matching heads."""

from __future__ import annotations

from mllm.capabilities import ContrastHead, MatchHead, ReadsText, RetrievalHead, SentenceModel
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.registry import lookup
from mllm.slots import Connector, Scorer

REQUIRED_PARTS: dict[str, tuple[type, ...]] = {
    "aligned": (Connector, SentenceModel),
    "retrieval": (RetrievalHead,),
    "matching": (ReadsText, ContrastHead, MatchHead),
}


def own_scorer(model: Model) -> Scorer:
    """Return the model as its own scorer.

    Raises:
        MLLMError: the model has no parts that compare images with texts.
    """
    for name, kinds in REQUIRED_PARTS.items():
        if model.has(*kinds):
            scorer: Scorer = lookup("scorers", name)(model=model)
            return scorer
    raise MLLMError(
        "This model has no scorer: expected a scorer in the recipe, or parts that compare images with texts. Set "
        "scorer={'type': 'dual-encoder', 'model': ...} (CLIP, ...), {'type': 'aligned', 'model': RUN} with a run of "
        "emoji-scorer, {'type': 'retrieval', 'model': RUN} with a run that has a retrieval head, or {'type': "
        "'matching', 'model': RUN} with a run that has the heads contrast and match."
    )
