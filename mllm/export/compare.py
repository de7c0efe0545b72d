"""Compare an exported model with its assembly: logits, tokens and generated ids."""

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
from mllm.export.stock import Shell
from mllm.lms.decoding import Decoding
from mllm.model import Model
from mllm.prompts.pieces import arrange

TOKENS = 12  # that are generated on each probe
EXACT, MERGED = 1e-5, 1e-4  # the largest difference of logits, as a share of the largest logit


@dataclass(frozen=True)
class Comparison:
    """What both models gave on one probe.

    Attributes:
        prompt: as the stock processor takes it.
        images: files of the folder.
        difference: the largest of any logit.
        largest: the largest logit's size.
        tokens: greedy tokens of the assembly.
        stock: greedy tokens of the stock class.
    """

    prompt: str
    images: list[str]
    difference: float
    largest: float
    tokens: list[int]
    stock: list[int]


def compare(model: Model, shell: Shell, place: Path) -> list[Comparison]:
    """Answer the probes with the assembly and with what stock code loads from the folder."""
    stock = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(place, backend="pil")
    (place / "probes").mkdir()
    found = []
    for pieces in _probes(model, several=bool(shell.image)):
        names, words = [], []
        for piece in pieces:
            if not isinstance(piece, str):
                names.append(f"probes/{_number(piece)}.png")
                piece.save(place / names[-1])
            words.append(piece if isinstance(piece, str) else shell.image)
        found.append(_compared(model, stock, processor, pieces, "".join(words), names))
    _refuse(found, MERGED if model.spec.adapters else EXACT)
    return found


@torch.no_grad()
def _compared(
    model: Model, stock: Any, processor: Any, pieces: Sequence[Any], prompt: str, names: list[str]
) -> Comparison:
    images = [piece for piece in pieces if not isinstance(piece, str)]
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    embeds, batch = model.prepare([pieces])
    _same_inputs(model, stock, inputs, images, batch)
    mine = model.logits(model.connector(model.features(images)), batch)
    theirs: Tensor = stock(**inputs).logits[..., : mine.shape[-1]]
    decoding = Decoding(max_new_tokens=TOKENS, do_sample=False)
    (tokens,) = model.lm.generate(batch.mask, [decoding], inputs_embeds=embeds)
    rows = stock.generate(**inputs, max_new_tokens=TOKENS)[0].tolist()
    rows = rows[batch.ids.shape[1] :]
    return Comparison(
        prompt=prompt,
        images=names,
        difference=float((mine - theirs).abs().max()),
        largest=float(mine.abs().max()),
        tokens=tokens,
        stock=rows[: rows.index(model.lm.eos)] if model.lm.eos in rows else rows,
    )


def _same_inputs(model: Model, stock: Any, inputs: Any, images: Sequence[Any], batch: Any) -> None:
    """Refuse where the stock processor makes other ids or pixels of a prompt."""
    expected = batch.ids.masked_fill(batch.visual, stock.config.image_token_id)
    if inputs["input_ids"].tolist() != expected.tolist():
        raise MLLMError(
            "The stock processor makes other ids of a prompt than this model was trained with, so nothing is exported. "
            f"It makes {inputs['input_ids'].tolist()[0][:8]}..., and here it is {expected.tolist()[0][:8]}...."
        )
    if not torch.equal(inputs["pixel_values"], model.encoder.preprocess(images)):
        raise MLLMError("The stock image processor makes other pixels of a picture, so nothing is exported.")


def _refuse(found: Sequence[Comparison], allowed: float) -> None:
    for one in found:
        share = one.difference / max(one.largest, 1e-12)
        if share > allowed or one.tokens != one.stock:
            raise MLLMError(
                f"The stock class differs, so nothing is exported: after {one.prompt[-40:]!r} logits differ by "
                f"{share:.2g} of the largest (allowed is {allowed:g}), and the tokens are {one.tokens} and {one.stock}."
            )


def _probes(model: Model, *, several: bool) -> list[list[Any]]:
    """Return the recipe's own prompts on pictures, and two pictures in one prompt where the processor takes several."""
    first, second = _pictures()
    words = model.spec.prompt
    caption, question = words.caption, words.question.format(question="What is in the picture?")
    probes = [arrange(words.template, [first], caption), arrange(words.template, [second], question)]
    return [*probes, *([arrange(words.template, [first, second], question)] if several else [])]


def _pictures() -> list[Image.Image]:
    """Return a picture of noise and one of a slow change of colour, of odd sizes."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:150, 0:100]
    slow = np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)
    return [Image.fromarray(noise), Image.fromarray(slow)]


def _number(picture: Image.Image) -> int:
    return 1 if picture.height < picture.width else 2
