"""Load pretrained models, configurations and processors: from an installed part, a Hub id or a folder."""

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
    """Return the folder or Hub id that `transformers` can load for ``model``.

    Args:
        model: an embedded part, a Hub id or a folder.
        group: the kind of part that is needed: ``encoders``, ``lms``, ...

    Raises:
        MLLMError: an embedded part that is unknown, not installed or of another group, or a missing folder.
    """
    if Path(model).is_dir():
        return model
    if model.startswith("mllm/"):
        part = PARTS.get(model)
        if part is not None and part.group != group:
            raise MLLMError(
                f"{model!r} is one of the {part.group}; expected one of the {group}. See `mllm parts list`."
            )
        return str(parts.locate(model))
    if model.startswith((".", "/", "~")):
        raise MLLMError(
            f"There is no folder {model!r}. Give a folder with a config.json, a Hub id or an installed part."
        )
    return model


def load_model(auto: Any, folder: str, *, init: str = "pretrained", seed: int = 0, **options: Any) -> Any:
    """Load a model with an Auto class; ``init="random"`` initializes the weights randomly from its configuration.

    On the meta device, too, only the configuration is read.

    Args:
        auto: an Auto class of `transformers`.
        folder: a folder or a Hub id.
        init: ``pretrained`` or ``random``.
        seed: the seed of random weights.
        options: passed on to the Auto class.

    Raises:
        MLLMError: the model does not exist, is of a type that this class does not load, or lacks weights.
    """
    with explain_errors(folder):
        if init == "random" or torch.get_default_device().type == "meta":
            config = load_config(folder)
            if options.get("dtype") == "auto":  # from_config takes only a dtype; its default is the configuration's
                del options["dtype"]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = auto.from_config(config, **options)
            return (
                model.to("meta") if torch.get_default_device().type == "meta" else model
            )  # some tensors are created on the CPU
        model, loading_info = auto.from_pretrained(folder, output_loading_info=True, **options)
    _refuse_missing(model, folder, sorted(loading_info["missing_keys"]))
    return model


def _refuse_missing(model: Any, folder: str, missing: list[str]) -> None:
    """Refuse a model whose files lack weights, which `transformers` would initialize randomly.

    Classifiers are saved without the pooler of the bare model: a missing pooler is removed, so it is never used.
    """
    if any(name.startswith("pooler.") for name in missing):
        model.pooler = None
    lacking = [name for name in missing if not name.startswith("pooler.")]
    if lacking:
        raise MLLMError(
            f"{folder!r} lacks {len(lacking)} of the model's tensors: {', '.join(lacking[:4])}"
            f"{', ...' * (len(lacking) > 4)}. "
            "Expected all of them, because they would be initialized randomly. Is the folder complete?"
        )


def load_config(folder: str) -> Any:
    """Load a model's configuration; for a published model that is not in the local cache, the one in this package."""
    bundled = configuration(folder)
    if bundled is None:
        return AutoConfig.from_pretrained(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return AutoConfig.for_model(**bundled)


def language_class(folder: str) -> Any:
    """Return the Auto class of a language model: encoder-decoder or decoder-only."""
    with explain_errors(folder):
        return AutoModelForSeq2SeqLM if load_config(folder).is_encoder_decoder else AutoModelForCausalLM


def load_processor(auto: Any, folder: str) -> Any:
    """Load an image processor, a tokenizer or another processor with an Auto class.

    Image processors use the PIL backend, so that pixels are equal with and without torchvision.

    Returns:
        The processor; None on the meta device if only the configuration is available, since shapes do not need it.
    """
    if torch.get_default_device().type == "meta" and configuration(folder) is not None:
        return None
    with explain_errors(folder):
        if auto.__name__ != "AutoImageProcessor":
            return auto.from_pretrained(folder)
        try:
            processor = auto.from_pretrained(folder, backend="pil")
        except ImportError:  # its class supports torchvision only
            return _plain_processor(folder)
        return processor if processor.backend == "pil" else _plain_processor(folder)


def _plain_processor(folder: str) -> Any:
    """Return a PIL processor that resizes, rescales and normalizes, for a class that supports torchvision only.

    Raises:
        MLLMError: its configuration requires other steps.
    """
    values, _ = ViTImageProcessorPil.get_image_processor_dict(folder)
    steps = {"do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_center_crop"}
    others = sorted(key for key, value in values.items() if key.startswith("do_") and value and key not in steps)
    missing = sorted({"size", "image_mean", "image_std"} - {key for key, value in values.items() if value})
    if others or missing:
        raise MLLMError(
            f"The image processor of {folder!r}, {values.get('image_processor_type')}, supports torchvision only, "
            f"and PIL cannot replace it: it requires {', '.join(others) or 'no other step'}, and leaves out "
            f"{', '.join(missing) or 'nothing'}. Choose a model whose images are only resized, rescaled and normalized."
        )
    return ViTImageProcessorPil.from_dict(values)


@contextlib.contextmanager
def explain_errors(folder: str) -> Iterator[None]:
    """Turn the exceptions that `transformers` raises for a missing or unsuitable model into an `MLLMError`."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except MLLMError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MLLMError(
            f"{folder!r} could not be loaded: {first} Give an installed part (`mllm parts list`), a folder with "
            "config.json and weights, or a Hub id that is reachable or already in the local cache."
        ) from error
