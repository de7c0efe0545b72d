"""Return the engine that a user names, and the language model whose layers it runs.

An engine is a name of the registry group ``engines``, URLs, or a mapping with options.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllm.config.parts import AssemblySpec
from mllm.config.yaml_text import parse_yaml
from mllm.engines.base import Engine
from mllm.engines.language_model import EngineLanguageModel
from mllm.errors import MLLMError
from mllm.registry import lookup, made

LOCAL = "transformers"  # the language model's layers are loaded here

EngineName = str | Sequence[str] | Mapping[str, Any] | Engine | None


def transformers() -> None:
    """Return no engine: the layers are loaded here, and run by the ``generate`` of `transformers`."""


def engine_of(given: EngineName) -> Engine | None:
    """Return an engine; None: the layers are loaded here.

    Args:
        given: a name (``vllm``), one URL or several, a mapping with the name as ``type`` and the options of its class
            (``{"type": "vllm", "tensor_parallel_size": 2}``, or the same as YAML), an engine, or None: `transformers`.

    Raises:
        MLLMError: an unknown engine or option, one that is not installed, or a URL at which none answers.
    """
    if given is None or isinstance(given, Engine):
        return given
    options = _options_of(given)
    if not isinstance(name := options.pop("type", None), str):
        raise MLLMError(f"The engine is {options!r}: expected a 'type', such as vllm.")
    engine = made(lookup("engines", name), f"engine {name}", **options)
    if engine is not None and not isinstance(engine, Engine):
        raise MLLMError(f"The engine {name} is a {type(engine).__name__}: inherit from mllm.engines.base.Engine.")
    return engine


def _options_of(given: str | Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine that a user names as a mapping, with its name as ``type``."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = dict(parse_yaml(f"engine: {given}", "--engine")["engine"])
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str) and "://" not in given:
        return {"type": given}
    urls = [given] if isinstance(given, str) else given
    return {"type": "url", "urls": [url.strip() for text in urls for url in str(text).split(",")]}


def build_lm(
    spec: AssemblySpec,
    *,
    device: torch.device | None = None,
    engine: Engine | None = None,
    computes: torch.dtype | None = None,
) -> Any:
    """Return the language model; None where the specification has none.

    Args:
        spec: the specification. What trains in the language model is kept in float32, with the rest of it: in half
            precision most updates are rounded away.
        device: on which quantized weights are built; None: the CPU.
        engine: what will run its layers, if anything does.
        computes: the type in which it computes, if it is frozen; None: as it is stored.

    Raises:
        MLLMError: it trains and is to be in float16, or something in its options is wrong.
    """
    if spec.lm is None:
        return None
    cls, options = lookup("lms", spec.lm.type), spec.lm.options()
    if spec.trains("lm"):
        if spec.lm.dtype == "float16":
            raise MLLMError(
                "lm.dtype is float16, in which training diverges, and a stage trains the language model. Leave out "
                "lm.dtype, or use LoRA."
            )
        options["dtype"] = "float32"
    elif computes is not None and options["dtype"] == "auto" and spec.lm.quantize is None:
        options["dtype"] = str(computes).removeprefix("torch.")
    if engine is not None:
        cls, options["engine"] = EngineLanguageModel, engine
    if device is not None and "device" in inspect.signature(cls).parameters:
        options["device"] = device
    return made(cls, f"language model {spec.lm.model}", **options, seed=spec.seed_of("lm"))
