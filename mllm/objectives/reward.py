"""Train on the model's own samples by their rewards: policy gradient (REINFORCE), with a baseline of the samples.

Notable: the loss that is logged, and validated by, is the negative mean reward; its gradient is the policy gradient's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from mllm.devices import has_values
from mllm.errors import MLLMError
from mllm.guides.contracts import Ask, AsksGuides, ReadsNoAnswer, Reward, Samples
from mllm.lms.decoding import Decoding
from mllm.model import Model
from mllm.objectives.kl_to_base import TRAINS, kl_to_base, target_logits, text_of
from mllm.prompts.batch import IGNORED, Batch, Encoded, collate
from mllm.prompts.pieces import Piece, Target, counted, images_of
from mllm.registry import Count, NonNegative, Positive, fulfilled, lookup, made
from mllm.slots import Inputs, LanguageModel


class RewardLoss:
    """The negative expected reward of answers that the model samples to each prompt.

    The gradient is that of REINFORCE: the sum over a sample's tokens of their negative log-likelihood, times the
    advantage, the sample's reward minus a baseline. Samples are drawn by torch's global generator, whose state a
    resumed run restores.

    Args:
        of: the rewards: mappings of ``type``, ``weight`` (1 by default) and a reward's own options; they are summed.
        samples: K, how many answers are sampled to a prompt.
        length: most tokens of an answer.
        temperature: of the samples.
        top_p: of the samples; 1: all tokens.
        baseline: ``leave-one-out``, the mean reward of a prompt's other samples, or ``mean``, that of all.
        kl: the weight of the KL divergence from the frozen language model, which reads the text alone: its mean over a
            sample's tokens.
        guide: the name of a language model that is the base of ``kl``; None: the model's own.

    Raises:
        MLLMError: no reward, or another baseline.
    """

    needs = (LanguageModel,)

    def __init__(
        self,
        *,
        of: Sequence[Mapping[str, Any]],
        samples: Annotated[int, Ge(2)] = 4,
        length: Count = 20,
        temperature: Positive = 1.0,
        top_p: Positive = 1.0,
        baseline: Literal["leave-one-out", "mean"] = "leave-one-out",
        kl: NonNegative = 0.0,
        guide: str | None = None,
    ) -> None:
        if baseline not in ("leave-one-out", "mean"):
            raise MLLMError(f"The objective reward has baseline={baseline!r}: expected leave-one-out or mean.")
        self.rewards = [_reward(spec) for spec in of]
        if not self.rewards:
            raise MLLMError("The objective reward has no rewards: give of: [{type: closeness}], for example.")
        self.samples, self.length, self.baseline, self.kl = samples, length, baseline, kl
        self._warpers = {"temperature": temperature, **({"top_p": top_p} if top_p < 1 else {})}
        self.ask = None if guide is None else Ask((LanguageModel,), guide)

    @property
    def per_example(self) -> bool:
        """Whether no reward compares the examples of a batch."""
        return all(reward.per_example for _, _, reward in self.rewards)

    @property
    def reads_no_answer(self) -> bool:
        """Whether no reward reads answers."""
        return all(isinstance(reward, ReadsNoAnswer) and reward.reads_no_answer for _, _, reward in self.rewards)

    @property
    def asks(self) -> Sequence[Ask]:
        """Return what the rewards ask, and the base where it is a guide."""
        asks = [ask for _, _, reward in self.rewards if isinstance(reward, AsksGuides) for ask in reward.asks]
        return [*asks, *([] if self.ask is None else [self.ask])]

    def problems(self, model: Model) -> list[str]:
        """Return that the language model trains, where it would be its own base."""
        return [TRAINS] if self.kl and self.ask is None and model.spec.trains("lm") else []

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of prompts."""
        return len(rows)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over prompts.

        Raises:
            MLLMError: a reward that is not finite.
        """
        model, rows = inputs.model, [row for row in inputs.rows for _ in range(self.samples)]
        prompts = [prompt_of(row) for row in rows]
        visual = repeated(inputs, self.samples)
        encoded = [model.encode(prompt) for prompt in prompts]
        ids = self._sampled(model, encoded, visual)
        rewards = self._rewards(model, rows, prompts, ids)  # (B, K)
        mean = rewards.mean(1).sum()
        batch = collate([_answered(*pair) for pair in zip(encoded, ids, strict=True)], model.lm.pad).to(model.device)
        embeds = model.embed(visual, batch)
        divergence = self._divergence(model, embeds, batch) if self.kl else 0.0
        if not torch.is_grad_enabled():
            return divergence - mean
        losses = model.lm.losses(embeds, batch.mask, batch.labels)
        weights = advantages(rewards, self.baseline).flatten().repeat_interleave(targets_of(batch)) / self.samples
        gradient = (weights.to(losses) * losses).sum()
        return gradient - gradient.detach() + divergence - mean

    @torch.no_grad()
    def _sampled(self, model: Model, encoded: Sequence[Encoded], visual: Tensor | None) -> list[list[int]]:
        """Return the ids of an answer to each prompt, its end included where it ended."""
        lm = model.lm
        if not has_values(lm.model.get_input_embeddings().weight):  # in a plan: answers of the full length
            return [[lm.eos] * self.length for _ in encoded]
        batch = collate(encoded, lm.pad).to(model.device)
        decoding = Decoding(max_new_tokens=self.length, do_sample=True, warpers=self._warpers)
        answers = lm.generate(batch.mask, [decoding] * len(encoded), inputs_embeds=model.embed(visual, batch))
        return [ids if len(ids) == self.length else [*ids, lm.eos] for ids in answers]

    def _rewards(
        self, model: Model, rows: Sequence[Sequence[Piece]], prompts: Sequence[list[Piece]], ids: Sequence[list[int]]
    ) -> Tensor:
        """Return the weighted sum of the rewards ``(B, K)``."""
        total = torch.zeros(len(ids))
        if not has_values(next(model.lm.parameters())):
            return total.view(-1, self.samples)
        references = [[piece.text.strip() for piece in row if isinstance(piece, Target)] for row in rows]
        samples = Samples(model, [model.lm.decode(each).strip() for each in ids], prompts, references)
        for name, weight, reward in self.rewards:
            values = reward(samples).float().cpu()
            for text, value in zip(samples.texts, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise MLLMError(f"The reward {name} of the answer {text!r} is {value}: expected a finite number.")
            total += weight * values
        return total.view(-1, self.samples)

    def _divergence(self, model: Model, embeds: Any, batch: Batch) -> Tensor:
        """Return the weighted KL divergence from the base, summed over prompts."""
        base = None if self.ask is None else model.guide(self.ask)
        each = kl_to_base(model, text_of(batch, model.lm), target_logits(model.lm, embeds, batch), base)
        return (
            self.kl * torch.stack([one.mean() for one in each.split(targets_of(batch).tolist())]).sum() / self.samples
        )


def advantages(rewards: Tensor, baseline: str) -> Tensor:
    """Return rewards ``(B, K)`` minus their baseline: the mean of the row, or of the row's other rewards."""
    number = rewards.shape[1]
    scale = number / (number - 1) if baseline == "leave-one-out" else 1.0
    return scale * (rewards - rewards.mean(1, keepdim=True))


def targets_of(batch: Batch) -> Tensor:
    """Return the number of targets ``(B,)`` of each row."""
    return (batch.labels[:, 1:] != IGNORED).sum(1)


def prompt_of(row: Sequence[Piece]) -> list[Piece]:
    """Return what is before a training example's answer; all of it where there is none."""
    first = next((number for number, piece in enumerate(row) if isinstance(piece, Target)), len(row))
    return list(row[:first])


def repeated(inputs: Inputs, times: int) -> Tensor | None:
    """Return the visual tokens of the prompts, each prompt several times.

    Raises:
        MLLMError: an image after an answer.
    """
    if inputs.visual is None:
        return None
    images = [images_of(row) for row in inputs.rows]
    if any(len(images_of(prompt_of(row))) < len(each) for row, each in zip(inputs.rows, images, strict=True)):
        raise MLLMError("The objective reward samples one answer to a prompt, and an example has an image after one.")
    visual = inputs.visual
    tokens = (
        visual
        if visual.dim() == 3
        else visual.split(counted([image for each in images for image in each], inputs.model.counts))
    )
    rows = torch.arange(len(tokens)).split([len(each) for each in images])
    order = [int(index) for row in rows for _ in range(times) for index in row]
    return visual[order] if visual.dim() == 3 else torch.cat([tokens[index] for index in order])


def _answered(prompt: Encoded, ids: Sequence[int]) -> Encoded:
    return Encoded([*prompt.ids, *ids], [*prompt.visual, *[False] * len(ids)], [IGNORED] * len(prompt.ids) + [*ids])


def _reward(spec: Mapping[str, Any]) -> tuple[str, float, Reward]:
    """Return a reward with its name and its weight.

    Raises:
        MLLMError: no mapping with a type, a weight that is no number, an unknown reward, or options it does not take.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
        raise MLLMError(
            f"The objective reward has the reward {spec!r}: expected a mapping, such as {{type: closeness}}."
        )
    name, weight = spec["type"], spec.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise MLLMError(f"The reward {name} has the weight {weight!r}: expected a number.")
    options = {key: value for key, value in spec.items() if key not in ("type", "weight")}
    reward: Reward = fulfilled(Reward, f"reward {name}", made(lookup("rewards", name), f"reward {name}", **options))
    return name, float(weight), reward
