"""Find the scorer that a model is by itself: images and sentences in one space, a retrieval head, or matching."""

from __future__ import annotations

from mllm.capabilities import ContrastHead, MatchHead, ReadsText, RetrievalHead, SentenceModel
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.registry import lookup
from mllm.slots import Connector, Scorer

OWN: dict[str, tuple[type, ...]] = {
    "aligned": (Connector, SentenceModel),
    "retrieval": (RetrievalHead,),
    "matching": (ReadsText, ContrastHead, MatchHead),
}


def own_scorer(model: Model) -> Scorer:
    """Return the model as its own scorer.

    Raises:
        MLLMError: it has no parts that compare images with texts.
    """
    for name, kinds in OWN.items():
        if model.has(*kinds):
            scorer: Scorer = lookup("scorers", name)(model=model)
            return scorer
    raise MLLMError(
        "This needs a scorer: set scorer={'type': 'dual-encoder', 'model': ...} (CLIP, ...), "
        "{'type': 'aligned', 'model': RUN} with a run of emoji-scorer, or {'type': 'retrieval', 'model': RUN} "
        "with one of a retrieval head (of contrast and matching: 'matching')."
    )
