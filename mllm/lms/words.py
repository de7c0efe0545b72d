"""Express visual tokens in the words of a language model: cosines with its input embeddings, and their mean.

A connector with a `Vocabulary` returns expected word embeddings, as AlignVLM (arXiv:2502.01341): the mean of the words'
embeddings, weighted by the softmax of the cosines over a temperature. The objective `word-alignment` is the
cross-entropy of the same softmax, so it needs no pass through the language model.

Shapes: N visual tokens, W words, K words of a caption, D_lm the width of the embeddings.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from mllm.errors import MLLMError
from mllm.lms.vocabulary import MAX_LOGITS
from mllm.slots import LanguageModel

NEUTRAL = "."  # the word of visual tokens that have nothing to add
PLANNED = 1000  # words of captions, where these are not read
_WHOLE: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()  # of each tokenizer, found once
Source = Literal["language", "data", "all"]


class Vocabulary(nn.Module):
    """The words that visual tokens are compared with, and the learned temperature of the comparison.

    Args:
        lm: the language model, whose table of input embeddings is used; it is not copied.
        words: ``language``: the language model's whole words, and the tokens of the captions that the connector is
            trained on; ``data``: the tokens of these captions alone; ``all``: every token that is not a special one; or
            a list of words. The neutral word is always among them.
        temperature: divides the cosines; the initial value.
        output: ``words``: expected word embeddings; ``tokens``: the visual tokens, unchanged.

    Attributes:
        included: ``(V,)``, 1 for each token of the table that is a word here; saved with the trained tensors.
        log_scale: the logarithm of 1 / temperature; trained.
        neutral: the id of the neutral word.

    Raises:
        MLLMError: a language model without a tokenizer, a temperature that is not positive, or an unknown source.
    """

    included: Tensor

    def __init__(
        self,
        lm: Any,
        *,
        words: Source | Sequence[str] = "language",
        temperature: float = 0.05,
        output: Literal["words", "tokens"] = "words",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise MLLMError(f"A vocabulary's temperature is {temperature}: expected a number above 0.")
        self._lm = (lm,)  # not a submodule: the table is the language model's
        self._fixed = not isinstance(words, str)
        self.output = output
        rows = int(lm.model.get_input_embeddings().weight.shape[0])
        self.register_buffer("included", torch.zeros(rows, dtype=torch.uint8))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self._ids: list[int] = []
        if lm.tokenizer is None:  # planned without its files
            self.neutral, self._ids = 0, list(range(rows))
            return
        if words == "data" and self.included.is_meta:  # planned: the captions are not read
            self._ids = list(range(min(rows, PLANNED)))
        self.neutral = token_ids(lm, NEUTRAL)[-1]
        self.include([self.neutral, *_initial(lm, words)])

    @property
    def lm(self) -> Any:
        """Return the language model."""
        return self._lm[0]

    @property
    def ids(self) -> Tensor:
        """Return the ids ``(W,)`` of the words, in ascending order.

        Raises:
            MLLMError: there are no words yet.
        """
        if len(self._ids) < 2 and not self.included.is_meta:
            raise MLLMError(
                "connector.vocabulary has no words: with words: data they are those of the captions that the connector "
                "is trained on. Train it with the objective word-alignment, or set vocabulary.words: language."
            )
        return torch.tensor(self._ids, device=self.included.device)

    def include(self, tokens: Iterable[int]) -> None:
        """Add tokens to the words, except those that the table has no row for."""
        self._ids = sorted({*self._ids, *(token for token in tokens if token < len(self.included))})
        if not self.included.is_meta:
            self.included[self._ids] = 1

    def include_captions(self, captions: Iterable[str]) -> None:
        """Add the tokens of captions, unless the words are a fixed list."""
        if not self._fixed and self.lm.tokenizer is not None:
            self.include({token for caption in captions for token in token_ids(self.lm, caption)})

    def _load_from_state_dict(self, *args: Any) -> None:
        """Take over the words of a state that is loaded."""
        super()._load_from_state_dict(*args)
        if not self.included.is_meta:
            self._ids = self.included.nonzero().flatten().tolist()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the expected word embeddings ``(..., D_lm)`` of visual tokens ``(..., D_lm)``."""
        if self.output == "tokens":
            return tokens
        directions, lengths = self._table(self.ids)

        def expected(rows: Tensor, scale: Tensor) -> Tensor:
            return (scale * rows @ directions.T).softmax(-1) * lengths @ directions

        return self._in_chunks(expected, tokens, len(directions)).view_as(tokens)

    def losses(self, tokens: Tensor, targets: Tensor, negatives: int | None = None) -> Tensor:
        """Return the cross-entropy ``(N,)`` of visual tokens ``(N, D_lm)`` and their words.

        Args:
            tokens: before they are replaced by words.
            targets: ids ``(N,)``, each of them one of the words.
            negatives: so many words are drawn at random, besides the targets of all tokens; the logits of the drawn
                ones are raised by log(words not drawn for, per word drawn), so that the sum over the softmax's
                denominator is an unbiased estimate of that over all words. None: all words.
        """
        ids, correction = self._drawn(targets, negatives)
        directions, _ = self._table(ids)
        positions = torch.searchsorted(ids, targets)

        def loss(rows: Tensor, scale: Tensor, right: Tensor) -> Tensor:
            return cross_entropy(scale * rows @ directions.T + correction, right, reduction="none")

        return self._in_chunks(loss, tokens, len(directions), positions)

    def logits(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Return the logits ``(..., K)`` of visual tokens ``(..., D_lm)`` for words ``(K,)``: cosine / temperature."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.log_scale.exp() * normalize(tokens.float(), dim=-1) @ self._table(ids)[0].T

    @torch.no_grad()
    def nearest(self, tokens: Tensor) -> Tensor:
        """Return the id ``(...)`` of the nearest word of each visual token ``(..., D_lm)``."""
        ids = self.ids
        directions, _ = self._table(ids)
        best = self._in_chunks(lambda rows, _: (rows @ directions.T).argmax(-1), tokens, len(ids))
        return ids[best].view(tokens.shape[:-1])

    def text(self, token: int) -> str:
        """Return a word's text as it follows another word: with a space before it, or without if it is a part."""
        return str(self.lm.decode([token, token])[len(self.lm.decode([token])) :])

    def _table(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalized embeddings ``(W, D_lm)`` of words, and their lengths ``(W,)``, in float32."""
        embeds = self.lm.embed(ids).float()
        lengths = embeds.norm(dim=-1)
        return embeds / lengths.clamp(min=1e-12)[:, None], lengths

    def _drawn(self, targets: Tensor, negatives: int | None) -> tuple[Tensor, Tensor]:
        """Return the ids ``(W,)`` that a loss compares with, and what is added to their logits ``(W,)``.

        They are drawn by torch's global generator, whose state a resumed run restores.
        """
        ids = self.ids
        if negatives is not None:
            others = ids[~torch.isin(ids, targets)]
            if negatives < len(others):
                drawn = others[torch.randperm(len(others))[:negatives].to(ids.device)]
                kept = torch.cat([targets.unique(), drawn]).sort().values
                share = math.log(len(others) / negatives)
                return kept, torch.isin(kept, drawn).float() * share
        return ids, torch.zeros(len(ids), device=ids.device)

    def _in_chunks(self, compute: Callable[..., Tensor], tokens: Tensor, words: int, *others: Tensor) -> Tensor:
        """Return a function's results of normalized tokens and the scale, a bounded number of logits at once.

        Several chunks are recomputed in backward, one by one.
        """
        with torch.autocast(tokens.device.type, enabled=False):  # cosines differ by less than bfloat16's precision
            rows, scale = normalize(tokens.float().flatten(0, -2), dim=-1), self.log_scale.exp()
            size = max(1, MAX_LOGITS // max(1, words))
            if len(rows) <= size:
                return compute(rows, scale, *others)
            chunks = zip(*(tensor.split(size) for tensor in (rows, *others)), strict=True)
            parts = [checkpoint(compute, part, scale, *rest, use_reentrant=False) for part, *rest in chunks]
            return torch.cat(parts)


def bind(connector: nn.Module, lm: Any, **options: Any) -> None:
    """Give a connector a vocabulary, in whose words it returns its output; its own parameters keep their names.

    Args:
        connector: it is hooked, not changed: ``connector.forward`` still returns its own output.
        lm: the language model.
        options: of the `Vocabulary`.

    Raises:
        MLLMError: there is no language model, or one that generates no text.
    """
    if not isinstance(lm, LanguageModel):
        raise MLLMError("connector.vocabulary needs a language model that generates text. Give lm, or leave it out.")
    connector.vocabulary = Vocabulary(lm, **options)
    connector.register_forward_hook(_in_words)


def _in_words(connector: Any, _: Any, tokens: Tensor) -> Tensor:
    in_words: Tensor = connector.vocabulary(tokens)
    return in_words


def token_ids(lm: Any, text: str) -> list[int]:
    """Return the ids of a text as it follows other words, without tokens of white space alone."""
    return [token for token in lm.tokenize(f" {text.strip()}") if lm.decode([token]).strip()]


def ordered_words(lm: Any, text: str, length: int) -> list[int]:
    """Return the ids of a text's first tokens, with the neutral word after its end: always ``length`` of them."""
    neutral = token_ids(lm, NEUTRAL)[-1]
    return (token_ids(lm, text) + [neutral] * length)[:length]


def whole_words(lm: Any) -> list[int]:
    """Return the ids of the tokens that are whole words: letters or digits alone, which follow a space as one token.

    A token that is only ever a part of a word is none of them: ``tokenize`` gives its text, after a space, other ids.
    """
    if lm.tokenizer not in _WHOLE:
        _WHOLE[lm.tokenizer] = _whole_words(lm)
    return _WHOLE[lm.tokenizer]


def _whole_words(lm: Any) -> list[int]:
    texts = {token: lm.decode([token]).strip() for token in range(len(lm.tokenizer))}
    candidates = {token: text for token, text in texts.items() if text.isalnum()}
    encoded = lm.tokenizer([f" {text}" for text in candidates.values()], add_special_tokens=False).input_ids
    return [
        token
        for token, ids in zip(candidates, encoded, strict=True)
        if [one for one in ids if one == token or texts.get(one)] == [token]
    ]


def _initial(lm: Any, words: Source | Sequence[str]) -> list[int]:
    """Return the ids of the words that a vocabulary has before it is trained."""
    if not isinstance(words, str):
        return [token for word in words for token in token_ids(lm, word)]
    if words == "language":
        return whole_words(lm)
    if words == "all":
        special = set(lm.tokenizer.all_special_ids)
        return [token for token in range(len(lm.tokenizer)) if token not in special]
    return []
