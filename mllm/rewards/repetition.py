"""Find repeated words in answers."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.guides.contracts import Samples


class Repetition:
    """The share of an answer's words that it had before; a negative weight makes it a penalty."""

    per_example = True
    reads_no_answer = True

    def __call__(self, samples: Samples) -> Tensor:
        """Return the shares ``(N,)``; 0 for an empty answer."""
        return torch.tensor([_repeated(text.lower().split()) for text in samples.texts])


def _repeated(words: list[str]) -> float:
    return 1 - len(set(words)) / len(words) if words else 0.0
