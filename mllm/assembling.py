"""The parts of a specification, built and joined: widths wired, trained parts drawn, adapters put into their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm import encoder as encoders
from mllm.errors import MLLMError, near
from mllm.image_decoders.conditions import check_condition
from mllm.lms.tokens import NewTokens
from mllm.memory import give_back
from mllm.model import Assembly
from mllm.registry import lookup, made
from mllm.spec import AssemblySpec, PartSpec, checked


def assemble(
    encoder: str | dict[str, Any],
    lm: str | dict[str, Any],
    connector: str | dict[str, Any] = "linear",
    *,
    adapters: Sequence[dict[str, Any]] = (),
    seed: int = 0,
    **settings: Any,
) -> Assembly:
    """Join a frozen encoder and a frozen language model by a connector with new weights.

    Args:
        encoder: an installed part, hub id or folder; or the recipe's mapping.
        lm: likewise.
        connector: a registry name; or the recipe's mapping with its arguments.
        adapters: the recipe's mappings: ``[{"type": "lora", "r": 16}]``.
        seed: of all weights drawn here.
        settings: the recipe's ``heads``, ``tokens``, ``decoder``, ``scorer``, ``prompt`` and ``decoding``.

    Raises:
        MLLMError: an unknown part or argument, or parts that do not fit.
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
    return build(spec)


def build(spec: AssemblySpec) -> Assembly:
    """Build the parts that a specification names, wire their widths, and draw the trained parts' weights."""
    check_condition(spec)
    encoder = build_encoder(spec)
    give_back()  # what it was tried out with
    return join(spec, encoder=encoder, lm=build_lm(spec))


def join(spec: AssemblySpec, *, encoder: Any, lm: Any) -> Assembly:
    """Bridge a built encoder and a built language model by new trained parts, some of them inside the latter."""
    check_condition(spec)
    widths = {"lm_dim": lm.dim if lm is not None else None, "vis_dim": encoder.dim if encoder is not None else None}
    connector = None
    if spec.connector is not None:
        if encoder is None:
            raise MLLMError(f"The connector {spec.connector.type} reads an encoder's features: give encoder.")
        connector = build_connector(spec, encoder=encoder, lm_dim=widths["lm_dim"])
    model = Assembly(
        encoder=encoder,
        connector=connector,
        lm=lm,
        adapters=build_adapters(spec, lm=lm),
        tokens=build_tokens(spec, lm=lm),
        heads={part.type: _drawn(spec, "head", part, **widths) for part in spec.heads},
        decoder=None if spec.decoder is None else _drawn(spec, "image_decoder", spec.decoder),
        spec=spec,
    )
    for path in spec.trained:
        trained_module(model, path)
    return model


def _drawn(spec: AssemblySpec, kind: str, part: PartSpec, *inside: Any, **options: Any) -> Any:
    """Build a part that draws weights; they depend on the specification's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        label = f"{kind.replace('_', ' ')} {part.type}"
        return made(lookup(f"{kind}s", part.type), label, *inside, **options, **part.options())


def trained_module(model: Assembly, path: str) -> nn.Module:
    """Return the module that a stage's ``train`` names by a dotted path.

    Raises:
        MLLMError: there is no such module.
    """
    try:
        module = model.get_submodule(path) if path else None
    except AttributeError:
        module = None
    if module is None:
        known = [name for name, _ in model.named_modules() if name]
        raise MLLMError(f"A stage's 'train' names {path!r}, which is no part of the model. {near(path, known)}")
    return module


def build_encoder(spec: AssemblySpec) -> Any:
    """Build the encoder alone; None where there is none."""
    return None if spec.encoder is None else encoders.build(spec.encoder, seed=spec.seed)


def build_lm(spec: AssemblySpec) -> Any:
    """Build the language model alone; None where there is none."""
    if spec.lm is None:
        return None
    options = spec.lm.model_dump(exclude={"type"})
    return made(lookup("lms", spec.lm.type), f"language model {spec.lm.model}", **options, seed=spec.seed)


def build_connector(spec: AssemblySpec, *, encoder: Any, lm_dim: int | None) -> nn.Module:
    """Build a connector between widths; ``lm_dim`` None: without the map to a language model's width."""
    assert spec.connector is not None
    widths = {"vis_dim": encoder.dim, "lm_dim": lm_dim, "num_patches": encoder.num_patches, "grid": encoder.grid}
    connector: nn.Module = _drawn(spec, "connector", spec.connector, **widths)
    return connector


def build_tokens(spec: AssemblySpec, *, lm: Any) -> NewTokens | None:
    """Put new tokens beside a language model's tables, and tell its tokenizer."""
    if not spec.tokens:
        return None
    if lm is None:
        raise MLLMError("tokens: new tokens are a language model's, and the recipe names none. Give lm.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        tokens = NewTokens(lm.model, spec.tokens)
    lm.new_tokens = tokens.ids()
    return tokens


def build_adapters(spec: AssemblySpec, *, lm: Any) -> list[nn.Module]:
    """Put new adapters into a language model; their random weights depend on the specification's seed alone."""
    if spec.adapters and lm is None:
        raise MLLMError("adapters: they stand inside a language model, and the recipe names none. Give lm.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        adapters = [
            made(lookup("adapters", part.type), f"adapter {part.type}", lm.model, **part.options())
            for part in spec.adapters
        ]
    _check_sight(spec, adapters)
    for adapter in adapters:
        if hasattr(adapter, "num_positions"):  # it comes before the sequence, not into a layer
            lm.lead(adapter)
        if hasattr(adapter, "places"):  # it looks beside the sequence
            lm.look()
    return adapters


def _check_sight(spec: AssemblySpec, adapters: Sequence[nn.Module]) -> None:
    """Refuse adapters that do not go with one that looks beside the sequence."""
    looking = [part.type for part, adapter in zip(spec.adapters, adapters, strict=True) if hasattr(adapter, "places")]
    leading = [part.type for part, a in zip(spec.adapters, adapters, strict=True) if hasattr(a, "num_positions")]
    if len(looking) > 1:
        raise MLLMError(f"adapters: {' and '.join(looking)} both decide where images stand. Leave one out.")
    if looking and leading:
        raise MLLMError(
            f"adapters: {leading[0]} puts positions before the sequence, of which {looking[0]} does not know what they "
            "look at. Leave one out."
        )
    if looking and spec.connector is None:
        raise MLLMError(f"adapters: {looking[0]} looks at a connector's visual tokens, and there is none. Give both.")


@torch.no_grad()
def calibrate(model: Assembly, features: Tensor) -> None:
    """Scale a new connector's last map so that its output has the spread of the language model's embeddings.

    A start far from that scale does not learn at usual learning rates. Args: features ``(I, P, D_vis)`` of real images.
    """
    last = next((getattr(model.connector, name, None) for name in ("norm", "project") if _scales(model, name)), None)
    if last is None:
        return
    spread = float(model.connector(features).float().std())
    for parameter in last.parameters():
        parameter.mul_(model.lm.embedding_scale() / max(spread, 1e-12))


def _scales(model: Assembly, name: str) -> bool:
    """Whether the connector has a module of this name with weights: its last one, by convention."""
    return any(True for _ in getattr(model.connector, name, torch.nn.Identity()).parameters())
