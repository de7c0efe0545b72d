"""Several answers to each prompt, of which the one is kept that a scorer finds closest to the picture.

As in MacCap (Qiu et al., AAAI 2024), which reranks sampled captions by CLIP similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mllm.answering.decode import answer, decodings
from mllm.errors import MLLMError
from mllm.prompts.pieces import Piece, images_of


def reranked(model: Any, prompts: Sequence[Sequence[Piece]], count: int, decoding: dict[str, Any]) -> list[Any]:
    """Return each prompt's best `Output` of ``count``: the plain answer, and others that are drawn.

    Args:
        model: the assembly, with a scorer.
        prompts: interleaved prompts, each with an image; the last one is what the answer is held against.
        count: answers of each prompt.
        decoding: settings; with a ``seed`` the draws are the same each time.

    Raises:
        MLLMError: a prompt without an image, or beams.
    """
    if not all(images_of(prompt) for prompt in prompts):
        raise MLLMError("Candidates are held against a picture, and a prompt has none. Leave out 'candidates'.")
    if {**model.spec.decoding, **decoding}.get("num_beams", 1) > 1:
        raise MLLMError("Candidates are drawn, which beams are not: set num_beams=1.")
    first = decoding.get("seed")
    first = int(torch.randint(2**31, ())) if first is None else first
    drawn = [{**decoding, "do_sample": True, "seed": first + number} for number in range(1, count)]
    rows = [prompt for prompt in prompts for _ in range(count)]
    answers = answer(model, rows, decodings(model, rows, [decoding, *drawn] * len(prompts)))
    best = []
    for place, prompt in enumerate(prompts):
        best.append(closest(model, prompt, answers[place * count : (place + 1) * count]))
    return best


def closest(model: Any, prompt: Sequence[Piece], answers: Sequence[Any]) -> Any:
    """Return the answer that the scorer finds closest to a prompt's last image."""
    closeness = model.scorer.image_text(images_of(prompt)[-1:], [str(answer) for answer in answers])[0]
    return answers[int(closeness.argmax())]
