"""Encode images and the texts that stand in images' places together, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.media.texts import TextSource


def features_of(encoder: Any, opened: Sequence[Any], device: torch.device) -> Tensor:
    """Return an encoder's features ``(U, P, D_vis)`` of opened images' tiles, and of texts in images' places.

    Args:
        encoder: one that is given a text is an `mllm.capabilities.EncodesTexts`: any other has refused to open it.
        opened: tiles, and `TextSource`s.
        device: of the encoder.
    """
    texts = [number for number, tile in enumerate(opened) if isinstance(tile, TextSource)]
    images = [number for number, tile in enumerate(opened) if not isinstance(tile, TextSource)]
    parts = []
    if texts:
        parts.append(encoder.encode_texts([opened[number].text for number in texts]).to(device))
    if images or not texts:
        parts.append(encoder(encoder.preprocess([opened[number] for number in images]).to(device)))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([*texts, *images], device=device).argsort()
    return torch.cat(parts)[order]
