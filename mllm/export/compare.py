"""Compare an exported model with the original: input ids, pixels, logits and generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.export.probes import Probe, inputs_of
from mllm.lms.decoding import Decoding
from mllm.lms.generation import answer_ids
from mllm.model import Model

TOKENS = 12  # generated tokens per probe
POSITIONS = 64  # the last ones of a probe, whose logits are compared; they attend to all others
EXACT, MERGED = 1e-5, 1e-4  # the largest difference of logits, as a share of the largest logit
ROUNDED = 4.0  # in half precision: times the difference that the rounding of matrix products makes in the original


@dataclass(frozen=True)
class Comparison:
    """The results of both models on one probe.

    Attributes:
        prompt: the text for the transformers processor; of a conversation, as the chat template formats it.
        images: image files in the exported folder.
        difference: the largest absolute difference of any logit.
        largest: the largest absolute logit.
        tokens: greedily decoded tokens of the original model.
        stock: greedily decoded tokens of the transformers class.
    """

    prompt: str
    images: list[str]
    difference: float
    largest: float
    tokens: list[int]
    stock: list[int]


@dataclass(frozen=True)
class Reference:
    """The original model's results on one probe.

    Attributes:
        ids: the token ids, with that of the image token at visual tokens.
        pixels: of the images' tiles; an image that is not cut is one.
        tiles: their number of each image.
        logits: ``(K, V)`` at the last positions.
        tokens: greedily decoded, in one batch with the other probes of its kind.
    """

    ids: list[int]
    pixels: Tensor
    tiles: list[int]
    logits: Tensor
    tokens: list[int]


@torch.no_grad()
def references(model: Model, probes: Sequence[Sequence[Probe]], image: int) -> list[list[Reference]]:
    """Return the original model's results on probes of each kind.

    Args:
        model: the original.
        probes: by kind; those of one kind are a batch.
        image: the id of the image token.
    """
    return [_references(model, kind, image) for kind in probes]


def _references(model: Model, probes: Sequence[Probe], image: int) -> list[Reference]:
    embeds, batch = model.prepare([probe.pieces for probe in probes])
    decodings = [Decoding(max_new_tokens=TOKENS, do_sample=False)] * len(probes)
    answers = model.lm.generate(batch.mask, decodings, inputs_embeds=embeds)
    results = []
    for probe, answer in zip(probes, answers, strict=True):
        encoded = model.encode(probe.pieces)
        ids = [image if visual else token for token, visual in zip(encoded.ids, encoded.visual, strict=True)]
        tiles = [model.encoder.tiles(image) for image in probe.images]
        pixels = model.encoder.preprocess([*chain(*tiles)])
        results.append(Reference(ids, pixels, [*map(len, tiles)], _logits(model, probe), answer))
    return results


def _logits(model: Model, probe: Probe) -> Tensor:
    """Return the original model's logits ``(K, V)`` at a probe's last positions."""
    embeds, batch = model.prepare([probe.pieces])
    length = batch.ids.shape[1]
    return model.lm.logits(embeds, batch.mask, torch.arange(max(length - POSITIONS, 0), length))[0].float()


@torch.no_grad()
def rounding(
    model: Model, probes: Sequence[Sequence[Probe]], expected: Sequence[Sequence[Reference]], dtype: torch.dtype
) -> float:
    """Return what rounding changes: the original's largest difference, as a share of the largest logit, in a precision.

    Its matrix products are computed in this precision (`torch.autocast`), which needs no second copy of the weights.
    """
    shares = []
    with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
        for probe, reference in zip(chain(*probes), chain(*expected), strict=True):
            shares.append(float((_logits(model, probe) - reference.logits).abs().max() / reference.logits.abs().max()))
    return ROUNDED * max(shares)


@torch.no_grad()
def compare_all(
    model: Model,
    stock: Any,
    processor: Any,
    probes: Sequence[Sequence[Probe]],
    expected: Sequence[Sequence[Reference]],
) -> list[Comparison]:
    """Return the comparisons of the transformers model with the original on all probes.

    The logits are those of every probe alone; the tokens are decoded in one padded batch of each kind of probes, where
    this language model can run one.

    Raises:
        MLLMError: the processor returns other ids or pixels for a probe.
    """
    comparisons = []
    for kind, results in zip(probes, expected, strict=True):
        answers = _generated(model, stock, processor, kind)
        for probe, reference, answer in zip(kind, results, answers, strict=True):
            inputs = inputs_of(processor, [probe])
            _check_inputs(inputs, reference)
            keep, vocabulary = reference.logits.shape
            logits = stock(**inputs.to(stock.dtype)).logits[0, -keep:, :vocabulary].float()
            comparisons.append(
                Comparison(
                    prompt=probe.written(processor),
                    images=probe.files,
                    difference=float((reference.logits - logits).abs().max()),
                    largest=float(reference.logits.abs().max()),
                    tokens=reference.tokens,
                    stock=answer,
                )
            )
    return comparisons


def check(comparisons: Sequence[Comparison], tolerance: float) -> None:
    """Raise an `MLLMError` where tokens differ, or logits by more than the tolerance (relative to the largest)."""
    for result in comparisons:
        relative = result.difference / max(result.largest, 1e-12)
        if not relative <= tolerance or result.tokens != result.stock:
            raise MLLMError(
                f"The transformers class differs, so nothing is exported: after {result.prompt[-40:]!r} logits differ "
                f"by {relative:.2g} of the largest (the tolerance is {tolerance:g}), and the tokens are "
                f"{result.tokens} and {result.stock}."
            )


def check_rounded(comparisons: Sequence[Comparison], allowed: float) -> None:
    """Raise an `MLLMError` where logits in half precision differ by more than rounding explains, or are not finite."""
    for result in comparisons:
        relative = result.difference / max(result.largest, 1e-12)
        if not relative <= allowed:
            raise MLLMError(
                f"In this precision the transformers class differs by more than rounding explains: after "
                f"{result.prompt[-40:]!r} logits differ by {relative:.2g} of the largest (allowed: {allowed:.2g}). "
                "Nothing is exported. Export in float32, or in bfloat16, whose range is that of float32."
            )


def _generated(model: Model, stock: Any, processor: Any, probes: Sequence[Probe]) -> list[list[int]]:
    """Return the tokens that the transformers model decodes greedily after every probe."""
    rows = []
    for group in [probes] if model.lm.whole_batches else [[probe] for probe in probes]:
        inputs = inputs_of(processor, group).to(stock.dtype)
        ids = stock.generate(**inputs, max_new_tokens=TOKENS)[:, inputs["input_ids"].shape[1] :]
        rows += [answer_ids(model.lm.text, row) for row in ids.tolist()]
    return rows


def _check_inputs(inputs: Any, reference: Reference) -> None:
    """Raise an `MLLMError` where the transformers processor returns other ids or pixels for a prompt."""
    ids = inputs["input_ids"].tolist()[0]
    if ids != reference.ids:
        place = next((i for i, (a, b) in enumerate(zip(ids, reference.ids, strict=False)) if a != b), 0)
        raise MLLMError(
            "The transformers processor returns other ids for a prompt than this model was trained with, so nothing is "
            f"exported: at place {place} {ids[place : place + 8]}... instead of "
            f"{reference.ids[place : place + 8]}...."
        )
    pixels = inputs["pixel_values"]
    if pixels.ndim == 5:  # of each image its tiles, and padding up to the most of them
        pixels = torch.cat([rows[:number] for rows, number in zip(pixels, reference.tiles, strict=True)])
    if not torch.equal(pixels, reference.pixels):
        raise MLLMError("The transformers image processor returns other pixels for an image, so nothing is exported.")
