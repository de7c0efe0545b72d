"""The one door through which pretrained parts come: an installed part, a hub id, or a folder.

Notable: weights are identified by a hash of their files, so that a connector can refuse to be put on others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, ViTImageProcessorPil

from mllm.errors import MLLMError
from mllm.hub import embedded as parts
from mllm.hub.embedded_list import PARTS
from mllm.hub.published import configuration


def resolve(model: str, group: str) -> str:
    """Return what `transformers` can load for ``model``: a folder, or a hub id.

    Raises:
        MLLMError: an embedded part that is unknown, not installed or of another group.
    """
    if Path(model).is_dir():
        return model
    if model.startswith("mllm/"):
        part = PARTS.get(model)
        if part is not None and part.group != group:
            raise MLLMError(f"{model!r} is one of the {part.group}, and was given where one of the {group} is needed.")
        return str(parts.locate(model))
    if model.startswith((".", "/", "~")):
        raise MLLMError(f"There is no folder {model!r}. Give one with a config.json, a hub id, or an installed part.")
    return model


def load_model(auto: Any, folder: str, *, init: str = "pretrained", seed: int = 0, **options: Any) -> Any:
    """Load a model by an Auto class; with ``init="random"`` only its configuration is read, and weights are drawn.

    On the meta device there are no weights: only its configuration is read, too.

    Raises:
        MLLMError: the model is nowhere to be found, is of a kind this class does not load, or lacks weights.
    """
    with explained(folder):
        if init == "random" or torch.get_default_device().type == "meta":
            config = load_config(folder)
            if options.get("dtype") == "auto":  # from_config takes a type only, and the configuration's by itself
                del options["dtype"]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = auto.from_config(config, **options)
            return model.to("meta") if torch.get_default_device().type == "meta" else model  # some tensors stay behind
        model, found = auto.from_pretrained(folder, output_loading_info=True, **options)
    _refuse_drawn(model, folder, sorted(found["missing_keys"]))
    return model


def _refuse_drawn(model: Any, folder: str, missing: list[str]) -> None:
    """Let no weight be drawn in silence for one that the files lack.

    Classifiers are saved without the pooler of the bare model: it is taken off, so that its noise is no feature.
    """
    if any(name.startswith("pooler.") for name in missing):
        model.pooler = None
    left = [name for name in missing if not name.startswith("pooler.")]
    if left:
        raise MLLMError(
            f"{folder!r} lacks {len(left)} of the model's tensors: {', '.join(left[:4])}{', ...' * (len(left) > 4)}. "
            "Weights drawn at random in their place would be no pretrained model. Is the folder whole?"
        )


def load_config(folder: str) -> Any:
    """Load a model's configuration; of a published model that is not on this machine, the one that comes with us."""
    known = configuration(folder)
    if known is None:
        return AutoConfig.from_pretrained(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return AutoConfig.for_model(**known)


def language_class(folder: str) -> Any:
    """Return the Auto class of a language model: with an encoder of its own, or a decoder alone."""
    with explained(folder):
        return AutoModelForSeq2SeqLM if load_config(folder).is_encoder_decoder else AutoModelForCausalLM


def load_processor(auto: Any, folder: str) -> Any:
    """Load an image processor (the PIL one: equal pixels with and without torchvision), a tokenizer or the like.

    None on the meta device where only the configuration is known: shapes need neither.
    """
    if torch.get_default_device().type == "meta" and configuration(folder) is not None:
        return None
    with explained(folder):
        if auto.__name__ != "AutoImageProcessor":
            return auto.from_pretrained(folder)
        try:
            processor = auto.from_pretrained(folder, backend="pil")
        except ImportError:  # its class is for torchvision only
            return _plain_processor(folder)
        return processor if processor.backend == "pil" else _plain_processor(folder)


def _plain_processor(folder: str) -> Any:
    """Return a processor that resizes, scales and normalises by PIL, for a class that is written for torchvision.

    Raises:
        MLLMError: its file asks for other steps.
    """
    values, _ = ViTImageProcessorPil.get_image_processor_dict(folder)
    steps = {"do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_center_crop"}
    others = sorted(key for key, value in values.items() if key.startswith("do_") and value and key not in steps)
    missing = sorted({"size", "image_mean", "image_std"} - {key for key, value in values.items() if value})
    if others or missing:
        raise MLLMError(
            f"The image processor of {folder!r}, {values.get('image_processor_type')}, is written for torchvision, and "
            f"PIL alone cannot follow its file: it asks for {', '.join(others) or 'nothing more'}, and leaves out "
            f"{', '.join(missing) or 'nothing'}. Take a model whose pictures are resized, scaled and normalised only."
        )
    return ViTImageProcessorPil.from_dict(values)


@contextlib.contextmanager
def explained(folder: str) -> Iterator[None]:
    """Turn what `transformers` raises for a missing or unfit model into one message."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except MLLMError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MLLMError(
            f"{folder!r} could not be loaded: {first} Give an installed part (`mllm parts list`), a folder with "
            "config.json and weights, or a hub id that is reachable or already in the local cache."
        ) from error
