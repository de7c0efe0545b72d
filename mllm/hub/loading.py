"""Load pretrained models, configurations and processors: from an installed part, a Hub id or a folder.

Notable: code of a model's repository is run only where ``trust_remote_code`` is given for that part. Where the argument
is left out, `transformers` asks on stdin.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, ViTImageProcessorPil

from mllm.devices import forked_rng
from mllm.errors import MLLMError, first_line
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
    if os.path.isdir(model):
        _refuse_pipes(model)
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
            f"There is no folder {model[:200]!r}. Give a folder with a config.json, a Hub id or an installed part."
        )
    return model


def _refuse_pipes(folder: str) -> None:
    """Refuse a folder with a pipe or a device in it, which would be read without an end."""
    with explain_errors(folder):
        others = [entry.name for entry in os.scandir(folder) if not (entry.is_file() or entry.is_dir())]
    if any(os.path.exists(os.path.join(folder, name)) for name in others):  # else they are links to nothing
        raise MLLMError(f"{folder!r} has {others[0]!r}, which is no regular file. Remove it, or copy the folder again.")


def load_model(
    auto: Any,
    folder: str,
    *,
    init: str = "pretrained",
    seed: int = 0,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Load a model with an Auto class; ``init="random"`` initializes the weights randomly from its configuration.

    On the meta device, too, only the configuration is read.

    Args:
        auto: an Auto class of `transformers`.
        folder: a folder or a Hub id.
        init: ``pretrained`` or ``random``.
        seed: the seed of random weights.
        trust_remote_code: run code of the model's repository.
        options: passed on to the Auto class.

    Raises:
        MLLMError: the model does not exist, is of a type that this class does not load, or lacks weights.
    """
    with explain_errors(folder):
        if init == "random" or torch.get_default_device().type == "meta":
            config = load_config(folder, trust_remote_code=trust_remote_code)
            if options.get("dtype") == "auto":  # from_config takes only a dtype; its default is the configuration's
                del options["dtype"]
            with forked_rng(seed):
                model = auto.from_config(config, trust_remote_code=trust_remote_code, **options)
            return (
                model.to("meta") if torch.get_default_device().type == "meta" else model
            )  # some tensors are created on the CPU
        model, loading_info = auto.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=trust_remote_code, **options
        )
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


def load_config(folder: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration; for a published model that is not in the local cache, the one in this package."""
    bundled = configuration(folder)
    if bundled is None:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except OSError:
        return AutoConfig.for_model(**bundled)


def language_class(folder: str, *, trust_remote_code: bool = False) -> Any:
    """Return the Auto class of a language model: encoder-decoder or decoder-only."""
    with explain_errors(folder):
        config = load_config(folder, trust_remote_code=trust_remote_code)
        return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_processor(auto: Any, folder: str, *, trust_remote_code: bool = False) -> Any:
    """Load an image processor, a tokenizer or another processor with an Auto class.

    Image processors use the PIL backend, so that pixels are equal with and without torchvision.

    Returns:
        The processor; None on the meta device if only the configuration is available, since shapes do not need it.
    """
    if torch.get_default_device().type == "meta" and configuration(folder) is not None:
        return None
    with explain_errors(folder):
        if auto.__name__ != "AutoImageProcessor":
            return auto.from_pretrained(folder, trust_remote_code=trust_remote_code)
        try:
            processor = auto.from_pretrained(folder, backend="pil", trust_remote_code=trust_remote_code)
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
    """Turn the exceptions that a missing, damaged or unsuitable model raises into an `MLLMError`.

    All of them: `transformers`, `tokenizers`, pickle and the checks of configurations raise types of their own.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except MLLMError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise MLLMError(
                f"{folder[:200]!r} has Python code of its own, which is not run. If you have read that code and trust "
                "it, set trust_remote_code: true for this part (encoder or lm); otherwise choose another model."
            ) from error
        raise MLLMError(
            f"{folder[:200]!r} could not be loaded: {first_line(error)} Give an installed part (`mllm parts list`), a "
            "folder with config.json and weights, or a Hub id that is reachable or already in the local cache."
        ) from error
