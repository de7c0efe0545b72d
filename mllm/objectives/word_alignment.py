"""Align visual tokens with the words of captions: no pass through the language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mllm.capabilities import SpeaksWords
from mllm.errors import MLLMError
from mllm.lms.words import Vocabulary, token_ids
from mllm.model import Model
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece
from mllm.readout.states import captions
from mllm.slots import Connector, Inputs, LanguageModel


class WordAlignment:
    """The cross-entropy of each visual token and its word, over the cosines with the language model's embeddings.

    A connector with a ``vocabulary`` has the words, and learns the temperature; its visual tokens are compared before
    they are replaced by words. Another connector is compared with the language model's whole words and the captions'
    tokens at a fixed temperature.

    Args:
        order: ``sequence``: the word of visual token q is the q-th token of the caption, and a neutral word after its
            end; ``set``: the caption's distinct tokens in any order, each assigned to one visual token, the most
            similar pair first, and the neutral word to the others.
        negatives: so many words are drawn at random in each training step, besides the batch's own; None: all words.
            Validation compares with all words.
        temperature: of connectors without a vocabulary.

    Raises:
        MLLMError: an unknown order, or a number that is not positive.
    """

    needs = (LanguageModel, Connector)

    def __init__(
        self,
        *,
        order: Literal["sequence", "set"] = "sequence",
        negatives: int | None = 4096,
        temperature: float = 0.05,
    ) -> None:
        if order not in ("sequence", "set"):
            raise MLLMError(f"word-alignment has order {order!r}: expected sequence or set.")
        if negatives is not None and negatives < 1:
            raise MLLMError(f"word-alignment has negatives {negatives}: expected 1 or more, or null for all words.")
        self.order, self.negatives, self.temperature = order, negatives, temperature
        self._words: Vocabulary | None = None  # of a connector without its own

    @property
    def per_example(self) -> bool:
        """Whether examples do not influence each other: the words of a batch are negatives of all of its examples."""
        return self.negatives is None

    def read_data(self, model: Model, texts: Iterable[str]) -> None:
        """Add the tokens of the captions to the words."""
        self._vocabulary(model).include_captions(texts)

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions after an image."""
        return len(pairs(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions of the mean over visual tokens; those with words not in the table have none."""
        model, tokens, captions_of_images = inputs.model, inputs.before_words, pairs(inputs.rows)
        if tokens is None or not captions_of_images:  # text alone
            return sum((p.sum() * 0.0 for p in model.connector.parameters()), torch.zeros((), device=model.device))
        images, texts = map(list, zip(*captions_of_images, strict=True))
        tokens, vocabulary = tokens[images], self._vocabulary(model)
        targets = self._targets(vocabulary, tokens, texts).flatten()  # (N Q,)
        known = torch.isin(targets, vocabulary.ids)
        negatives = self.negatives if model.training else None
        return vocabulary.losses(tokens.flatten(0, 1)[known], targets[known], negatives).sum() / tokens.shape[1]

    def _vocabulary(self, model: Model) -> Vocabulary:
        """Return the connector's vocabulary, or else the language model's whole words at a fixed temperature."""
        if isinstance(model.connector, SpeaksWords):
            words: Vocabulary = model.connector.vocabulary
            return words
        if self._words is None:
            self._words = Vocabulary(model.lm, temperature=self.temperature).requires_grad_(False)
        return self._words.to(model.device)

    def _targets(self, vocabulary: Vocabulary, tokens: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the id ``(N, Q)`` of each visual token's word; ``tokens (N, Q, D_lm)`` of N texts."""
        words = [token_ids(vocabulary.lm, text) for text in texts]
        if self.order == "set":
            words = [list(dict.fromkeys(ids)) for ids in words]
        num = tokens.shape[1]
        padded = [(ids + [vocabulary.neutral] * num)[:num] for ids in words]
        targets = torch.tensor(padded, device=tokens.device)  # (N, Q)
        return targets if self.order == "sequence" else assigned(vocabulary, tokens.detach(), targets)


def pairs(rows: Sequence[Sequence[Piece]]) -> list[tuple[int, str]]:
    """Return each target text that follows an image, with the index of the last image before it in the batch."""
    return [(image, text) for image, text in captions(rows) if image is not None and text.strip()]


@torch.no_grad()
def assigned(vocabulary: Vocabulary, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return targets ``(N, Q)`` in the order of the visual tokens that they are assigned to.

    Of all pairs of a token and a word that are both left, the one is taken whose log-likelihood is highest above that
    of the neutral word, which the tokens left over get.

    Args:
        vocabulary: the words.
        tokens: ``(N, Q, D_lm)`` of N captions.
        targets: ids ``(N, Q)``, neutral words last.
    """
    neutral = targets.new_tensor([vocabulary.neutral])
    ids, positions = torch.cat([targets.flatten(), neutral]).unique(return_inverse=True)
    logits = vocabulary.logits(tokens, ids)  # (N, Q, K)
    words = positions[:-1].view_as(targets)[:, None].expand(-1, tokens.shape[1], -1)  # (N, token, word)
    gains = (logits - logits[..., positions[-1:]]).gather(2, words)
    gains = gains.masked_fill((targets == neutral)[:, None], -torch.inf)
    result = torch.full_like(targets, vocabulary.neutral)
    rows = torch.arange(len(targets), device=targets.device)
    for _ in range(int((targets != vocabulary.neutral).sum(1).max())):
        best, index = gains.flatten(1).max(1)
        token, word = index // targets.shape[1], index % targets.shape[1]
        some = best > -torch.inf
        result[rows[some], token[some]] = targets[rows[some], word[some]]
        gains[rows, token] = -torch.inf
        gains[rows, :, word] = -torch.inf
    return result
