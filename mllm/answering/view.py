"""Encode prompts once and keep their KV cache: one prefix, many questions.

Notable: several prompts are encoded in one batch and asked in one batch, a row for each question. Text at the end of a
prefix may be tokenized differently once a question follows ("," and "," + " why"); such tokens are masked out in the
cache, and those of the whole text are encoded instead, so an answer is always that of the whole prompt. A connector
that reads questions makes other visual tokens for each, so that only the encoder's features are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mllm.answering.decode import answer, check_candidates, check_scoring, for_prompts, generate_ids, make_decoding
from mllm.answering.generate import answer_prompts
from mllm.answering.shared import prefilled
from mllm.errors import MLLMError, renamed_method
from mllm.lms.decoding import Decoding
from mllm.lms.generation import exceeds
from mllm.model import Model
from mllm.prompts.batch import IGNORED, Encoded, continued
from mllm.prompts.pieces import Piece, answer_text, images_of, trailing_text


class Views(Sequence["View"]):
    """Several prompts that were encoded in one batch. Asking changes nothing in them.

    Args:
        model: the model.
        prompts: interleaved prompts.
        before: views that the prompts continue, one each; None: they start from nothing.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[Piece]], before: Sequence[View] | None = None) -> None:
        self.model = model
        self.prompts = [[*view.prompt, *new] for view, new in zip(before or [], prompts, strict=False)] or [
            list(prompt) for prompt in prompts
        ]
        self.features = self._features()
        if before is None or self.features or not self._continue_views(before, prompts):
            embeds, batch = model.prepare(self.prompts, self._features_of(range(len(self))))
            self.mask = batch.mask  # (N, T)
            self.cache, self.next = prefilled(model, embeds, batch)  # and the next token's logits (N, V)
        tails = [trailing_text(prompt) for prompt in self.prompts]
        self.tails = [(text, model.lm.tokenize(text)) for text in tails]

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
        """Answer each view's questions, all in one batch, formatted by the recipe's ``prompt.question``."""
        question_prompt, decoding = self.model.spec.prompt.question, {"kind": "question", **decoding}
        texts = [[question_prompt.format(question=question) for question in of_view] for of_view in questions]
        return self.continue_with(texts, **decoding)

    def continue_with(self, texts: Sequence[Sequence[str]], **decoding: Any) -> list[list[str]]:
        """Answer after each view and each of its texts, all in one batch; equal to `Assembly.generate` one by one.

        Args:
            texts: for each view, texts between its prompt and an answer.
            decoding: options over the recipe's; see `mllm.assembly.Assembly.generate`.

        Raises:
            MLLMError: not a list of texts for each view, or a text after which no answer of ``max_new_tokens`` fits.
        """
        if len(texts) != len(self) or any(isinstance(of_view, str) for of_view in texts):
            raise MLLMError(f"Expected a list of texts for each of the {len(self)} views; got {texts!r}.")
        rows = [(view, text) for view, of_view in enumerate(texts) for text in of_view]
        answers = iter(self._answers(rows, make_decoding(self.model, decoding)) if rows else [])
        return [[next(answers) for _ in of_view] for of_view in texts]

    go_on = renamed_method("Views.go_on", continue_with)

    def _answers(self, rows: Sequence[tuple[int, str]], decoding: Decoding) -> list[str]:
        model, prompts = self.model, self._whole_prompts(rows)
        new = [self.following(view, text) for view, text in rows]
        # An image at the end with nothing after it leaves no token to start from.
        if decoding.selects or self.features or not all(ids for _, ids in new):
            return self._from_whole_prompts(rows, decoding)
        names = [f"Text {number} ({text[-40:]!r})" for number, (_, text) in enumerate(rows)]
        decodings = for_prompts(model, prompts, [decoding] * len(rows), names)
        width, cached = max(len(ids) for _, ids in new), self.mask.shape[1]
        mask = torch.cat([self.mask[[view for view, _ in rows]], self.mask.new_zeros(len(rows), width)], dim=1)
        whole = torch.full_like(mask, model.lm.pad)  # only ids after the KV cache are looked up
        for row, (masked, ids) in enumerate(new):
            mask[row, cached - masked : cached] = 0
            mask[row, cached + width - len(ids) :] = 1
            whole[row, cached + width - len(ids) :] = torch.tensor(ids, device=mask.device)
        longest = max(one.max_new_tokens or 0 for one in decodings)
        gap = _has_gaps(mask) and model.lm.exceeds_window(mask.shape[1] + longest)
        if gap or exceeds(model.lm, mask.shape[1] + longest):
            return self._from_whole_prompts(rows, decoding)
        cache = model.lm.fork(self.cache, [view for view, _ in rows])
        answers = generate_ids(model, prompts, decodings, mask, cache=cache, input_ids=whole)
        return [model.lm.decode(ids).strip() for ids in answers]

    def _from_whole_prompts(self, rows: Sequence[tuple[int, str]], decoding: Decoding) -> list[str]:
        """Answer without the KV cache."""
        model, prompts = self.model, self._whole_prompts(rows)
        if decoding.selects or not self.features:
            return [str(output) for output in answer_prompts(model, prompts, decoding)]
        features = self._features_of([view for view, _ in rows])
        return [str(output) for output in answer(model, prompts, [decoding] * len(rows), features=features)]

    def _features(self) -> dict[int, Tensor]:
        """Return the features of the images of each prompt that has some, if the connector reads their questions."""
        model = self.model
        images = {} if model.questions(self.prompts) is None else dict(enumerate(map(images_of, self.prompts)))
        return {number: model.image_features(each) for number, each in images.items() if each}

    def _features_of(self, views: Sequence[int]) -> Tensor | None:
        """Return the features of some views' images together; None: they are not kept."""
        kept = [self.features[view] for view in views if view in self.features]
        return torch.cat(kept) if kept else None

    def _whole_prompts(self, rows: Sequence[tuple[int, str]]) -> list[list[Piece]]:
        return [[*self.prompts[view], text] for view, text in rows]

    def following(self, view: int, text: str) -> tuple[int, list[int]]:
        """Return how many of a view's last tokens are replaced, and the ids that follow the others."""
        tail, tail_ids = self.tails[view]
        whole = self.model.lm.tokenize(tail + text)
        different = (i for i, (a, b) in enumerate(zip(tail_ids, whole, strict=False)) if a != b)
        same = next(different, min(len(tail_ids), len(whole)))
        same = min(same, len(whole) - 1) if whole else 0  # one token is needed to start from
        return len(tail_ids) - same, whole[same:]

    def _continue_views(self, before: Sequence[View], prompts: Sequence[Sequence[Piece]]) -> bool:
        """Encode prompts after the KV cache of other views of one batch; return whether that is possible."""
        model, views = self.model, before[0].views
        mask = views.mask[[view.row for view in before]]
        encoded = []
        for row, (view, prompt) in enumerate(zip(before, prompts, strict=True)):
            first, rest = (prompt[0], prompt[1:]) if isinstance(prompt[0], str) else ("", prompt)
            masked, ids = views.following(view.row, first) if first else (0, [])
            mask[row, mask.shape[1] - masked :] = 0
            new = model.encode(rest, start=False)
            visual, labels = [False] * len(ids), [IGNORED] * len(ids)
            encoded.append(Encoded(ids + new.ids, visual + new.visual, labels + new.labels))
        embeds, batch = model.embedded(prompts, encoded)
        self.mask = torch.cat([mask, batch.mask], dim=1)
        if (_has_gaps(self.mask) and model.lm.has_window) or exceeds(model.lm, self.mask.shape[1]):
            return False
        self.cache = model.lm.fork(views.cache, [view.row for view in before])
        last = torch.tensor([embeds.shape[1] - 1], device=embeds.device)
        self.next = model.lm.logits(embeds, self.mask, keep=last, cache=self.cache)[:, -1]
        return True


def _has_gaps(mask: Tensor) -> bool:
    """Whether masked positions follow others in a row of ``(N, T)``: a sliding window would count them."""
    return bool((mask[:, 1:] < mask[:, :-1]).any())


class View:
    """Images (and text) that were encoded once; questions are answered from their KV cache.

    Asking changes nothing in the view, so neither the order of questions matters nor which are asked together.
    """

    def __init__(self, views: Views, row: int) -> None:
        self.views, self.row = views, row

    @property
    def prompt(self) -> list[Piece]:
        """Return the interleaved prompt."""
        return self.views.prompts[self.row]

    def see(self, pieces: Sequence[Piece]) -> View:
        """Return a view of a longer prompt: few-shot examples are encoded once, then each query after them."""
        with torch.no_grad():
            return Views(self.views.model, [pieces], before=[self])[0]

    def ask(self, question: str, **decoding: Any) -> str:
        """Answer a question about the prompt, formatted by the recipe's ``prompt.question``."""
        text = self.views.model.spec.prompt.question.format(question=question)
        return self.continue_with(text, **{"kind": "question", **decoding})

    def caption(self, **decoding: Any) -> str:
        """Describe the images, after the recipe's ``prompt.caption``."""
        return self.continue_with(self.views.model.spec.prompt.caption, **{"kind": "caption", **decoding})

    def continue_with(self, text: str = "", **decoding: Any) -> str:
        """Answer after the prompt and ``text``; equal to `Assembly.generate` on the whole prompt."""
        texts: list[list[str]] = [[] for _ in self.views]
        texts[self.row] = [text]
        return self.views.continue_with(texts, **decoding)[self.row][0]

    go_on = renamed_method("View.go_on", continue_with)

    @torch.no_grad()
    def score(self, candidates: Sequence[str], *, normalize: bool = False) -> list[float]:
        """Return the log-likelihood of each candidate as the whole answer (its end included).

        Args:
            candidates: possible answers; a space is prepended to each, as in training.
            normalize: divide by the number of tokens.

        Raises:
            MLLMError: no candidate, an empty one, or one that does not fit into the context after the prompt.
        """
        texts = [isinstance(candidate, str) and bool(candidate.strip()) for candidate in candidates]
        if not texts or not all(texts):
            raise MLLMError(f"Expected candidate answers, texts that are not empty; got {list(candidates)!r}.")
        lm = self.views.model.lm
        check_scoring(lm)
        check_candidates(lm, int(self.views.mask[self.row].sum()), candidates)
        tail, _ = self.views.tails[self.row]
        rows = [[*continued([tail, answer_text(candidate)], lm)[-1], lm.eos] for candidate in candidates]
        wide = exceeds(lm, self.views.mask.shape[1] + max(map(len, rows)))
        view = Views(self.views.model, [self.prompt])[0] if wide and len(self.views) > 1 else self
        scores = view._score(rows)
        return [score / len(row) if normalize else score for score, row in zip(scores, rows, strict=True)]

    def _score(self, rows: list[list[int]]) -> list[float]:
        """Score the tree of the candidates' tokens level by level: common prefixes are computed once."""
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
                nodes = {prefix: node for node, prefix in enumerate(children)}
        return scores

    def _grow(self, cache: Any, prefixes: list[tuple[int, ...]], parents: list[int]) -> Tensor:
        """Return logits ``(N, V)`` of the token after N prefixes of equal length; the cache grows by their last one."""
        mask = self.views.mask[[self.row]]
        ids = torch.tensor(prefixes, device=mask.device)  # (N, L)
        logits: Tensor = self.views.model.lm.step(cache, ids, mask, parents)
        return logits
