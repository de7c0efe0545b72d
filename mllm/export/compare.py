"""Compare an exported model with the original: input ids, pixels, logits and generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm.errors import MLLMError
from mllm.export.stock import StockModel
from mllm.lms.decoding import Decoding
from mllm.model import Model
from mllm.prompts.pieces import arrange

TOKENS = 12  # generated tokens per probe
EXACT, MERGED = 1e-5, 1e-4  # the largest difference of logits, as a share of the largest logit


@dataclass(frozen=True)
class Comparison:
    """The results of both models on one probe.

    Attributes:
        prompt: the text for the transformers processor.
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


def compare(model: Model, exported: StockModel, folder: Path) -> list[Comparison]:
    """Return the comparisons of the original model with the model that transformers loads from the folder.

    Raises:
        MLLMError: the two differ.
    """
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    (folder / "probes").mkdir()
    comparisons = []
    for pieces in _probes(model, several=bool(exported.image)):
        names, words = [], []
        for piece in pieces:
            if not isinstance(piece, str):
                names.append(f"probes/{_number(piece)}.png")
                piece.save(folder / names[-1])
            words.append(piece if isinstance(piece, str) else exported.image)
        comparisons.append(_compared(model, stock, processor, pieces, "".join(words), names))
    _check(comparisons, MERGED if model.spec.adapters else EXACT)
    return comparisons


@torch.no_grad()
def _compared(
    model: Model, stock: Any, processor: Any, pieces: Sequence[Any], prompt: str, names: list[str]
) -> Comparison:
    images = [piece for piece in pieces if not isinstance(piece, str)]
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    embeds, batch = model.prepare([pieces])
    _check_inputs(model, stock, inputs, images, batch)
    original: Tensor = model.logits(model.connector(model.features(images)), batch)
    exported: Tensor = stock(**inputs).logits[..., : original.shape[-1]]
    decoding = Decoding(max_new_tokens=TOKENS, do_sample=False)
    (tokens,) = model.lm.generate(batch.mask, [decoding], inputs_embeds=embeds)
    ids = stock.generate(**inputs, max_new_tokens=TOKENS)[0].tolist()
    ids = ids[batch.ids.shape[1] :]
    return Comparison(
        prompt=prompt,
        images=names,
        difference=float((original - exported).abs().max()),
        largest=float(original.abs().max()),
        tokens=tokens,
        stock=model.lm.text.until_end(ids),
    )


def _check_inputs(model: Model, stock: Any, inputs: Any, images: Sequence[Any], batch: Any) -> None:
    """Raise an `MLLMError` where the transformers processor returns other ids or pixels for a prompt."""
    expected = batch.ids.masked_fill(batch.visual, stock.config.image_token_id)
    if inputs["input_ids"].tolist() != expected.tolist():
        raise MLLMError(
            "The transformers processor returns other ids for a prompt than this model was trained with, so nothing is "
            f"exported: {inputs['input_ids'].tolist()[0][:8]}... instead of {expected.tolist()[0][:8]}...."
        )
    if not torch.equal(inputs["pixel_values"], model.encoder.preprocess(images)):
        raise MLLMError("The transformers image processor returns other pixels for an image, so nothing is exported.")


def _check(comparisons: Sequence[Comparison], tolerance: float) -> None:
    """Raise an `MLLMError` where tokens differ, or logits by more than the tolerance (relative to the largest)."""
    for result in comparisons:
        relative = result.difference / max(result.largest, 1e-12)
        if relative > tolerance or result.tokens != result.stock:
            raise MLLMError(
                f"The transformers class differs, so nothing is exported: after {result.prompt[-40:]!r} logits differ "
                f"by {relative:.2g} of the largest (the tolerance is {tolerance:g}), and the tokens are "
                f"{result.tokens} and {result.stock}."
            )


def _probes(model: Model, *, several: bool) -> list[list[Any]]:
    """Return the recipe's prompts with one image each, and with two images where the processor accepts several."""
    first, second = _images()
    prompt = model.spec.prompt
    caption, question = prompt.caption, prompt.question.format(question="What is in the picture?")
    probes = [arrange(prompt.template, [first], caption), arrange(prompt.template, [second], question)]
    return [*probes, *([arrange(prompt.template, [first, second], question)] if several else [])]


def _images() -> list[Image.Image]:
    """Return an image of noise and one of a color gradient, which are not square."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:150, 0:100]
    gradient = np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)
    return [Image.fromarray(noise), Image.fromarray(gradient)]


def _number(image: Image.Image) -> int:
    """Return an image's number in its file name: 1 for the noise, 2 for the gradient."""
    return 1 if image.height < image.width else 2
