"""Assemble a new model from parts that are given by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm.assembly import Assembly
from mllm.build import build
from mllm.config.messages import checked
from mllm.config.parts import AssemblySpec
from mllm.devices import DeviceName, DTypeName


def assemble(
    encoder: str | dict[str, Any],
    lm: str | dict[str, Any],
    connector: str | dict[str, Any] = "linear",
    *,
    adapters: Sequence[dict[str, Any]] = (),
    seed: int = 0,
    device: DeviceName | None = None,
    dtype: DTypeName | None = None,
    **settings: Any,
) -> Assembly:
    """Join a frozen encoder and a frozen language model by a connector with new weights.

    Args:
        encoder: an installed part, hub id or folder; or a mapping as in a recipe.
        lm: likewise.
        connector: a registry name; or a mapping as in a recipe, with its arguments.
        adapters: mappings as in a recipe: ``[{"type": "lora", "r": 16}]``.
        seed: of all randomly initialized weights.
        device: where the model computes (``cuda``, ``cuda:1``, ``mps``, ``cpu``); None: a GPU where there is one.
        dtype: of the frozen weights (``float32``, ``bfloat16``, ``float16``); None: as they are stored, or as ``lm``
            says.
        settings: the recipe's ``heads``, ``tokens``, ``decoder``, ``scorer``, ``prompt`` and ``decoding``.

    Raises:
        MLLMError: an unknown part, argument or device, or parts that do not fit.
    """
    spec = checked(
        AssemblySpec,
        {
            "encoder": {"model": encoder} if isinstance(encoder, str) else encoder,
            "lm": {"model": lm} if isinstance(lm, str) else lm,
            "connector": {"type": connector} if isinstance(connector, str) else connector,
            "adapters": list(adapters),
            "seed": seed,
            **settings,
        },
    )
    return build(spec, device=device, dtype=dtype)
