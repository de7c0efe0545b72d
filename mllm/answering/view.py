"""What was seen, kept as key-value states: one prefix, many questions.

Notable: several prompts are seen in one batch and asked in one batch, a row for each question. Text that ends a prefix
may become another token once a question stands behind it ("," and "," + " why"); the states of such tokens are masked
out, and the tokens of the whole are read instead, so an answer is always that of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mllm.answering.decode import decodings
from mllm.answering.generate import generate
from mllm.errors import MLLMError
from mllm.prompts.batch import IGNORED, Encoded
from mllm.prompts.pieces import Piece, answer_text, trailing_text


class Views(Sequence["View"]):
    """Several prompts that went through the model once, together. Asking changes nothing in them.

    Args:
        model: the assembly.
        prompts: what is seen, as interleaved prompts.
        before: views that the prompts go on from, one each; None: from nothing.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[Piece]], before: Sequence[View] | None = None) -> None:
        self.model = model
        self.prompts = [[*view.prompt, *new] for view, new in zip(before or [], prompts, strict=False)] or [
            list(prompt) for prompt in prompts
        ]
        if before is None or not self._go_on_from(before, prompts):
            embeds, batch = model.prepare(self.prompts)
            self.mask = batch.mask  # (N, T)
            self.cache, self.next = model.lm.prefill(embeds, self.mask)  # and the next token's logits (N, V)
        tails = [trailing_text(prompt) for prompt in self.prompts]
        self._tails = [(text, model.lm.tokenize(text)) for text in tails]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> View: ...
    @overload
    def __getitem__(self, index: slice) -> list[View]: ...
    def __getitem__(self, index: int | slice) -> View | list[View]:
        """Return one of the views, or some."""
        if isinstance(index, slice):
            return [View(self, row) for row in range(len(self))[index]]
        return View(self, range(len(self))[index])

    def ask(self, questions: Sequence[Sequence[str]], **decoding: Any) -> list[list[str]]:
        """Answer each view's questions, all in one batch, put as the recipe's ``prompt.question`` puts them."""
        put = self.model.spec.prompt.question
        return self.go_on([[put.format(question=question) for question in own] for own in questions], **decoding)

    def go_on(self, texts: Sequence[Sequence[str]], **decoding: Any) -> list[list[str]]:
        """Write on after each view and each of its texts, all in one batch; equal to `Assembly.generate` one by one.

        Args:
            texts: for each view, what stands between what was seen and an answer.
            decoding: fields of `transformers.GenerationConfig` over the recipe's own.

        Raises:
            MLLMError: not a list of texts for each view.
        """
        if len(texts) != len(self) or any(isinstance(own, str) for own in texts):
            raise MLLMError(f"Expected a list of texts for each of the {len(self)} views; got {texts!r}.")
        rows = [(view, text) for view, own in enumerate(texts) for text in own]
        answers = iter(self._decoded(rows, decoding) if rows else [])
        return [[next(answers) for _ in own] for own in texts]

    def _decoded(self, rows: Sequence[tuple[int, str]], decoding: dict[str, Any]) -> list[str]:
        model = self.model
        new = [self.following(view, text) for view, text in rows]
        given = {**model.spec.decoding, **decoding}
        anew = given.get("candidates", 1) > 1 or given.get("words") is not None  # not from what was seen
        # An image at the end and nothing behind it leaves no token to start from.
        if anew or not all(ids for _, ids in new):
            return self._anew(rows, decoding)
        width, seen = max(len(ids) for _, ids in new), self.mask.shape[1]
        mask = torch.cat([self.mask[[view for view, _ in rows]], self.mask.new_zeros(len(rows), width)], dim=1)
        whole = torch.full_like(mask, model.lm.pad)  # ids behind the key-value states alone are looked up
        for row, (masked, ids) in enumerate(new):
            mask[row, seen - masked : seen] = 0
            mask[row, seen + width - len(ids) :] = 1
            whole[row, seen + width - len(ids) :] = torch.tensor(ids, device=mask.device)
        if _holed(mask) and model.lm.beyond(mask.shape[1] + int(given.get("max_new_tokens") or 0)):
            return self._anew(rows, decoding)
        settings = decodings(model, [[*self.prompts[view], text] for view, text in rows], decoding)
        cache = model.lm.fork(self.cache, [view for view, _ in rows])
        found = model.lm.generate(mask, settings, cache=cache, input_ids=whole)
        return [model.lm.decode(ids).strip() for ids in found]

    def _anew(self, rows: Sequence[tuple[int, str]], decoding: dict[str, Any]) -> list[str]:
        outputs = generate(self.model, [[*self.prompts[view], text] for view, text in rows], decoding)
        return [str(output) for output in outputs]

    def following(self, view: int, text: str) -> tuple[int, list[int]]:
        """Return how many of a view's last tokens are replaced, and the ids that follow the others."""
        tail, seen = self._tails[view]
        whole = self.model.lm.tokenize(tail + text)
        same = next(
            (i for i, (a, b) in enumerate(zip(seen, whole, strict=False)) if a != b), min(len(seen), len(whole))
        )
        same = min(same, len(whole) - 1) if whole else 0  # one token is needed to start from
        return len(seen) - same, whole[same:]

    def _go_on_from(self, before: Sequence[View], prompts: Sequence[Sequence[Piece]]) -> bool:
        """Read what is new behind the states of other views, which must be of one batch; or say that it cannot be."""
        model, views = self.model, before[0].views
        seen = views.mask[[view.row for view in before]]
        encoded = []
        for row, (view, prompt) in enumerate(zip(before, prompts, strict=True)):
            first, rest = (prompt[0], prompt[1:]) if isinstance(prompt[0], str) else ("", prompt)
            masked, ids = views.following(view.row, first) if first else (0, [])
            seen[row, seen.shape[1] - masked :] = 0
            new = model.encode(rest, start=False)
            none = [False] * len(ids), [IGNORED] * len(ids)
            encoded.append(Encoded(ids + new.ids, none[0] + new.visual, none[1] + new.labels))
        embeds, batch = model.embedded(prompts, encoded)
        self.mask = torch.cat([seen, batch.mask], dim=1)
        if _holed(self.mask) and model.lm.window is not None:
            return False
        self.cache = model.lm.fork(views.cache, [view.row for view in before])
        last = torch.tensor([embeds.shape[1] - 1], device=embeds.device)
        self.next = model.lm.logits(embeds, self.mask, keep=last, cache=self.cache)[:, -1]
        return True


def _holed(mask: Tensor) -> bool:
    """Whether masked places stand behind others in a row of ``(N, T)``: a sliding window would count them."""
    return bool((mask[:, 1:] < mask[:, :-1]).any())


class View:
    """Images (and text) that went through the model once; questions are answered from there.

    Asking changes nothing in the view, so the order of questions does not matter, nor which are asked at once.
    """

    def __init__(self, views: Views, row: int) -> None:
        self.views, self.row = views, row

    @property
    def prompt(self) -> list[Piece]:
        """Return what was seen."""
        return self.views.prompts[self.row]

    def see(self, pieces: Sequence[Piece]) -> View:
        """Return a view that saw more: few-shot examples are seen once, then each query behind them."""
        with torch.no_grad():
            return Views(self.views.model, [pieces], before=[self])[0]

    def ask(self, question: str, **decoding: Any) -> str:
        """Answer a question about what was seen, put as the recipe's ``prompt.question`` puts it."""
        return self.go_on(self.views.model.spec.prompt.question.format(question=question), **decoding)

    def caption(self, **decoding: Any) -> str:
        """Describe what was seen, after the recipe's ``prompt.caption``."""
        return self.go_on(self.views.model.spec.prompt.caption, **decoding)

    def go_on(self, text: str = "", **decoding: Any) -> str:
        """Write on after what was seen and ``text``; equal to `Assembly.generate` on the whole prompt."""
        texts: list[list[str]] = [[] for _ in self.views]
        texts[self.row] = [text]
        return self.views.go_on(texts, **decoding)[self.row][0]

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
        lm = self.views.model.lm
        rows = [[*lm.tokenize(answer_text(candidate)), lm.eos] for candidate in candidates]
        scores = self._score(rows)
        return [score / len(row) if normalize else score for score, row in zip(scores, rows, strict=True)]

    def _score(self, rows: list[list[int]]) -> list[float]:
        """Walk the tree of the candidates' tokens by levels: what candidates have in common is computed once."""
        scores = [0.0] * len(rows)
        cache, logits = self.views.model.lm.fork(self.views.cache, [self.row]), self.views.next[[self.row]]  # (1, V)
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
                logits = self._grow(cache, list(children), list(children.values()))
                nodes = {prefix: place for place, prefix in enumerate(children)}
        return scores

    def _grow(self, cache: Any, prefixes: list[tuple[int, ...]], parents: list[int]) -> Tensor:
        """Return logits ``(N, V)`` one token on, for N prefixes of equal length; the states grow by it."""
        seen = self.views.mask[[self.row]]
        ids = torch.tensor(prefixes, device=seen.device)  # (N, L)
        return self.views.model.lm.step(cache, ids, seen, parents)
