"""Return the image processor of `transformers` that makes an image square, or cuts it, as the encoder does."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from mllm.model import Model

SHARED = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
KEPT = (*SHARED, "do_convert_rgb")


def image_processor(model: Model) -> Any:
    """Return an image processor with the encoder's settings: its way of making squares, and its resolution."""
    encoder, side = model.encoder, model.encoder.size
    square = {"height": side, "width": side}
    if encoder.resize in ("crop", "pad"):
        kept = {name: value for name, value in encoder.processor.to_dict().items() if name in KEPT}
        kind: Any = CLIPImageProcessorPil if encoder.resize == "crop" else LlavaImageProcessorPil
        padding = {"do_pad": True} if encoder.resize == "pad" else {}
        return kind(**kept, **padding, size={"shortest_edge": side}, crop_size=square)
    processor = copy.deepcopy(encoder.processor)
    sizes = encoder.own_sizes
    if encoder.resize == "stretch":
        sizes = {"size": square} | ({"crop_size": square} if hasattr(processor, "do_center_crop") else {})
        for name in ("do_center_crop", "do_pad"):
            if hasattr(processor, name):
                setattr(processor, name, False)
    for name, size in sizes.items():
        setattr(processor, name, size)
    return processor


def tiles_processor(model: Model, kind: str, **options: Any) -> Any:
    """Return an image processor that cuts images, with the encoder's normalization and filter.

    Args:
        model: the model.
        kind: the name of its class.
        options: its further options.
    """
    settings = model.encoder.processor.to_dict()
    return getattr(transformers, kind)(**{name: settings[name] for name in SHARED if name in settings}, **options)
