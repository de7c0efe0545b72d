"""Generate several answers to each prompt, and select the one that a scorer finds closest to the image.

As in MacCap (Qiu et al., AAAI 2024), which reranks sampled captions by CLIP similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mllm.answering.decode import answer
from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding
from mllm.model import Model
from mllm.outputs import Output
from mllm.prompts.pieces import Piece, images_of


def answer_best(model: Model, prompts: Sequence[Sequence[Piece]], decoding: Decoding) -> list[Output]:
    """Return the best of ``decoding.candidates`` answers to each prompt: the plain answer, and sampled ones.

    Args:
        model: the model, with a scorer.
        prompts: interleaved prompts, each with an image; answers are compared with the last one.
        decoding: of the plain answer; with a ``seed`` the samples are the same each time.

    Raises:
        MLLMError: a prompt without an image, or beam search.
    """
    if not all(images_of(prompt) for prompt in prompts):
        raise MLLMError("Candidates are compared with an image, and a prompt has none. Leave out 'candidates'.")
    if decoding.num_beams > 1:
        raise MLLMError("Candidates are sampled, which beam search does not do: set num_beams=1.")
    first = int(torch.randint(2**31, ())) if decoding.seed is None else decoding.seed
    count = decoding.candidates
    sampled = [replace(decoding, do_sample=True, seed=first + number) for number in range(1, count)]
    rows = [prompt for prompt in prompts for _ in range(count)]
    answers = answer(model, rows, [decoding, *sampled] * len(prompts))
    return [
        closest(model, prompt, answers[number * count : (number + 1) * count]) for number, prompt in enumerate(prompts)
    ]


def closest(model: Model, prompt: Sequence[Piece], answers: Sequence[Output]) -> Output:
    """Return the answer with the highest similarity to a prompt's last image, by the scorer."""
    similarities = model.scorer.image_text(images_of(prompt)[-1:], [str(answer) for answer in answers])[0]
    return answers[int(similarities.argmax())]
