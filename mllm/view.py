"""What was seen, kept as key-value states: one prefix, many questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.prompt import answer_text
from mllm.recipe import PromptSpec

CANDIDATES_AT_ONCE = 512


class View:
    """Images (and text) that went through the model once; questions are answered from there.

    Asking changes nothing in the view, so the order of questions does not matter.
    """

    def __init__(self, lm: Any, prompt: PromptSpec, decoding: dict[str, Any], embeds: Tensor) -> None:
        self._lm, self._prompt, self._decoding = lm, prompt, decoding
        self._embeds = embeds  # (1, T, D_lm)
        self._cache, self._next = lm.prefill(embeds)  # key-value states, and the next token's logits (V,)

    def ask(self, question: str, **decoding: Any) -> str:
        """Answer a question about what was seen, put as the recipe's ``prompt.question`` puts it."""
        return self.go_on(self._prompt.question.format(question=question), **decoding)

    def caption(self, **decoding: Any) -> str:
        """Describe what was seen, after the recipe's ``prompt.caption``."""
        return self.go_on(self._prompt.caption, **decoding)

    def go_on(self, text: str = "", **decoding: Any) -> str:
        """Write on after what was seen and ``text``; equal to `Assembly.generate` on the whole prompt.

        Args:
            text: what stands between what was seen and the answer.
            decoding: fields of `transformers.GenerationConfig` over the recipe's own.
        """
        ids = self._lm.tokenize(text)
        seen = self._embeds.shape[1]
        mask = torch.ones(1, seen + len(ids), dtype=torch.long, device=self._embeds.device)
        options = {**self._decoding, **decoding}
        if not ids:  # nothing new to start decoding from: the prefix itself is decoded from
            return self._decode(self._lm.generate(mask, options, inputs_embeds=self._embeds))
        # Only ids behind the key-value states are looked up: the places of what was seen may hold anything.
        whole = torch.tensor([[self._lm.pad] * seen + ids], device=mask.device)
        return self._decode(self._lm.generate(mask, options, cache=self._lm.fork(self._cache), input_ids=whole))

    @torch.no_grad()
    def score(self, candidates: Sequence[str], *, normalize: bool = False) -> list[float]:
        """Return the log-likelihood of each candidate as the whole answer (its end included).

        Args:
            candidates: possible answers; a space is put before each, as in training.
            normalize: divide by the number of tokens.

        Raises:
            MLLMError: no candidate, or an empty one.
        """
        if not candidates or not all(candidate.strip() for candidate in candidates):
            raise MLLMError(f"Expected candidate answers, none of them empty; got {list(candidates)!r}.")
        rows = [[*self._lm.tokenize(answer_text(candidate)), self._lm.eos] for candidate in candidates]
        scores: list[float] = []
        for start in range(0, len(rows), CANDIDATES_AT_ONCE):
            scores += self._score(rows[start : start + CANDIDATES_AT_ONCE])
        return [score / len(row) if normalize else score for score, row in zip(scores, rows, strict=True)]

    def _score(self, rows: list[list[int]]) -> list[float]:
        length = max(len(row) for row in rows)
        device = self._embeds.device
        ids = torch.tensor([row + [self._lm.pad] * (length - len(row)) for row in rows], device=device)  # (N, L)
        counted = torch.tensor([[1.0] * len(row) + [0.0] * (length - len(row)) for row in rows], device=device)
        # Padding stands behind a candidate, where nothing that counts can see it: the mask may be all ones.
        mask = torch.ones(len(rows), self._embeds.shape[1] + length - 1, dtype=torch.long, device=device)
        cache = self._lm.fork(self._cache, len(rows))
        later = self._lm.logits(self._lm.embed(ids[:, :-1]), mask, cache=cache)  # (N, L-1, V)
        logits = torch.cat([self._next.expand(len(rows), 1, -1), later], dim=1).float()  # (N, L, V)
        likelihood = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (N, L)
        return (likelihood * counted).sum(-1).tolist()

    def _decode(self, rows: list[list[int]]) -> str:
        return str(self._lm.decode(rows[0])).strip()
