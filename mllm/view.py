"""What was seen, kept as key-value states: one prefix, many questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.prompt import answer_text
from mllm.spec import PromptSpec


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
        scores = self._score(rows)
        return [score / len(row) if normalize else score for score, row in zip(scores, rows, strict=True)]

    def _score(self, rows: list[list[int]]) -> list[float]:
        """Walk the tree of the candidates' tokens by levels: what candidates have in common is computed once."""
        scores = [0.0] * len(rows)
        cache, logits = self._lm.fork(self._cache), self._next.unsqueeze(0)  # (1, V): the tree's root
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for depth in range(max(len(row) for row in rows)):
            likelihood = logits.float().log_softmax(-1)  # (N, V)
            open_rows = [index for index, row in enumerate(rows) if len(row) > depth]
            parents = [nodes[tuple(rows[index][:depth])] for index in open_rows]
            steps = likelihood[parents, [rows[index][depth] for index in open_rows]]
            for index, step in zip(open_rows, steps.tolist(), strict=True):
                scores[index] += step
            children = {tuple(row[: depth + 1]): nodes[tuple(row[:depth])] for row in rows if len(row) > depth + 1}
            if children:
                cache, logits = self._grow(cache, list(children), list(children.values()))
                nodes = {prefix: place for place, prefix in enumerate(children)}
        return scores

    def _grow(self, cache: Any, prefixes: list[tuple[int, ...]], parents: list[int]) -> tuple[Any, Tensor]:
        """Return key-value states and logits ``(N, V)`` one token on, for N prefixes of equal length."""
        device = self._embeds.device
        cache.reorder_cache(torch.tensor(parents, device=device))
        tokens = torch.tensor([prefix[-1:] for prefix in prefixes], device=device)  # (N, 1)
        length = self._embeds.shape[1] + len(prefixes[0])
        mask = torch.ones(len(prefixes), length, dtype=torch.long, device=device)
        return cache, self._lm.logits(self._lm.embed(tokens), mask, cache=cache)[:, -1]

    def _decode(self, rows: list[list[int]]) -> str:
        return str(self._lm.decode(rows[0])).strip()
