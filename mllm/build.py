"""Build the parts of a specification and join them to a model: match widths, initialize weights, insert adapters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mllm.answering.on_engine import start
from mllm.assembly import Assembly
from mllm.config.base import PartSpec
from mllm.config.messages import checked
from mllm.config.parts import SCORER, AssemblySpec, EncoderSpec
from mllm.decoders.condition import check_condition
from mllm.devices import (
    DeviceName,
    DTypeName,
    cast,
    choose_device,
    computes_in_bfloat16,
    dtype_of,
    forked_rng,
    give_memory,
)
from mllm.encoders.base import on_meta
from mllm.encoders.specified import cut_for, newline_for
from mllm.encoders.specified import encoder_of as encoder_of
from mllm.engines.base import Engine
from mllm.engines.choose import EngineName, engine_of
from mllm.engines.choose import build_lm as build_lm
from mllm.engines.parts import check_parts
from mllm.errors import MLLMError
from mllm.guides.base import GROUPS, Guides
from mllm.lms.insert import build_adapters, build_tokens
from mllm.lms.words import bind
from mllm.model import Model
from mllm.parts import trained_module
from mllm.prompts.chat_template import end_of_turn
from mllm.readout.tokens import every_token
from mllm.registry import fulfilled, group_of, lookup, made
from mllm.saving import check_trust, find_folder, read_about, restore
from mllm.scorers.own import REQUIRED_PARTS, own_scorer
from mllm.slots import Connector, Head, ImageDecoder, Scorer
from mllm.system import return_memory

Slot = TypeVar("Slot")


def build(
    spec: AssemblySpec,
    *,
    device: DeviceName | None = None,
    dtype: DTypeName | None = None,
    engine: Engine | None = None,
    computes: torch.dtype | None = None,
) -> Assembly:
    """Return the model of a specification, on a device; the trained parts' weights are initialized at random.

    Args:
        spec, device, dtype: the specification; the rest is as in `load`.
        engine: what will run the language model's layers, which are then not loaded here.
        computes: the type in which a frozen language model computes, and is therefore loaded, unless the
            specification says another; None: as it is stored.
    """
    check_condition(spec)
    place, kind = choose_device(device), None if dtype is None else dtype_of(dtype)
    encoder = build_encoder(spec, device=place)
    return_memory()  # of the encoder's test forward pass
    lm = build_lm(spec, device=place, engine=engine, computes=computes)
    for part in (encoder, lm):
        if part is not None and kind is not None:
            cast(part, kind)
    return _joined(spec, encoder=encoder, lm=lm, device=place)


def join(spec: AssemblySpec, *, encoder: Any, lm: Any, device: DeviceName | None = None) -> Assembly:
    """Return the model of a built encoder and a built language model, joined by new trained parts, on a device."""
    check_condition(spec)
    return _joined(spec, encoder=encoder, lm=lm, device=choose_device(device))


def _joined(spec: AssemblySpec, *, encoder: Any, lm: Any, device: torch.device) -> Assembly:
    """Return the model, with all of its parts brought together on one device; on the meta device they stay there."""
    widths = {"lm_dim": lm.dim if lm is not None else None, "vis_dim": encoder.dim if encoder is not None else None}
    connector = None
    if spec.connector is not None:
        if encoder is None:
            raise MLLMError(
                f"The connector {spec.connector.type} reads an encoder's features, and there is none: give encoder."
            )
        connector = build_connector(spec, encoder=encoder, lm=lm)
    heads: dict[str, Head] = {part.name: _build_seeded(spec, Head, "head", part, **widths) for part in spec.heads}
    decoder = None
    if spec.decoder is not None:
        decoder = _build_seeded(spec, ImageDecoder, "image_decoder", spec.decoder, device=device)
    model = Assembly(
        encoder=encoder,
        connector=connector,
        lm=lm,
        adapters=build_adapters(spec, lm=lm, varying=encoder is not None and encoder.tiling is not None),
        tokens=build_tokens(spec, every_token(spec.tokens, heads.values()), lm=lm),
        heads=heads,
        decoder=decoder,
        spec=spec,
        guides=guides_of(spec.scorer),
    )
    for path in spec.trained:
        trained_module(model, path)
    if model.generates_text:
        lm.text.turn_end = end_of_turn(spec.prompt, lm)
    if on_meta():
        return model
    give_memory(model.adapters, device)  # those inside layers that an engine has
    return model.to(device)


def _build_seeded(
    spec: AssemblySpec,
    contract: type[Slot],
    group: str,
    part: PartSpec,
    *,
    device: torch.device | None = None,
    **options: Any,
) -> Slot:
    """Return a part of a registry group; its random weights depend on the specification's seeds alone.

    Args:
        spec: of the model.
        contract: the class that the part has to be of.
        group: the registry group, in the singular.
        part: the part's type and options.
        device: of a run that the part is given.
        options: further arguments of the part.

    Raises:
        MLLMError: arguments that the part does not take, or a part of another package that breaks its contract.
    """
    with forked_rng(spec.seed_of(group.removeprefix("image_"))):
        cls, label = lookup(f"{group}s", part.type), f"{group.replace('_', ' ')} {part.type}"
        return fulfilled(contract, label, made(cls, label, **options, **with_runs(cls, part.options(), device)))


def with_runs(cls: Any, options: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    """Return a part's options with the models that they name.

    An argument is a run where the part annotates it as `Model`, and a scorer's mapping where it does as `Scorer`.
    """
    kinds = {name: parameter.annotation for name, parameter in inspect.signature(cls).parameters.items()}

    def value_of(name: str, value: Any) -> Any:
        if kinds.get(name) in (Model, "Model"):
            return load(value, device=device)
        if kinds.get(name) in (Scorer, "Scorer | None") and value is not None:
            return open_part(("scorers",), checked(PartSpec, value, f"The argument {name}"), device)
        return value

    return {name: value_of(name, value) for name, value in options.items()}


def build_encoder(spec: AssemblySpec, *, device: torch.device | None = None) -> Any:
    """Return the encoder, on the CPU; None where the specification has none.

    What trains in it is kept in float32, with the rest of it. On a ``device`` that computes in bfloat16 a frozen one is
    in this type, unless the specification says another.
    """
    if spec.encoder is None:
        return None
    here = torch.device("cpu")  # until the parts are joined
    runs = functools.partial(with_runs, device=here)
    encoder = encoder_of(spec.encoder, seed=spec.seed_of("encoder"), runs=runs)
    if spec.trains("encoder"):
        cast(encoder, torch.float32)
    elif not _has_dtype(spec.encoder) and device is not None and computes_in_bfloat16(device):
        cast(encoder, torch.bfloat16)
    return encoder


def _has_dtype(spec: EncoderSpec) -> bool:
    """Whether a specification says the type of an encoder's weights, or of one inside of it."""
    return spec.dtype != "auto" or any(map(_has_dtype, spec.of or ()))


def build_connector(spec: AssemblySpec, *, encoder: Any, lm: Any) -> Connector:
    """Return the connector; without a language model and a width of its own, it has no last projection.

    Raises:
        MLLMError: its width is not the language model's, or arguments that it does not take.
    """
    assert spec.connector is not None
    width = spec.connector.width
    assert not isinstance(width, str), "the width of a guide is taken before (mllm.training.guides.assembly_of)"
    lm_dim = width
    if lm is not None:
        lm_dim = lm.dim
        if width not in (None, lm_dim):
            raise MLLMError(
                f"connector.width is {width}, and the language model's width is {lm_dim}: leave out connector.width."
            )
    widths = {"vis_dim": encoder.dim, "lm_dim": lm_dim, "num_patches": encoder.num_patches, "grid": encoder.grid}
    connector = _build_seeded(spec, Connector, "connector", spec.connector, **widths)
    cut_for(encoder, connector)
    connector.newline = newline_for(encoder, connector, lm_dim, seed=spec.seed_of("connector"))
    if spec.connector.vocabulary is not None:
        bind(connector, lm, **spec.connector.vocabulary.model_dump())
    return connector


def load(
    folder: str | Path,
    *,
    device: DeviceName | None = None,
    dtype: DTypeName | None = None,
    trust_remote_code: Sequence[str] = (),
    engine: EngineName = None,
) -> Assembly:
    """Load a run or a saved model.

    Args:
        folder: of the run or the saved model.
        device: where it computes (``cuda``, ``cuda:1``, ``mps``, ``cpu``); None: a GPU where there is one.
        dtype: of the frozen weights (``float32``, ``bfloat16``, ``float16``); None: as in training.
        trust_remote_code: the parts (``encoder``, ``lm``) that may run code of their models' repositories. A folder may
            come from somebody else, so what its recipe allowed is not enough.
        engine: what runs the language model's layers (`mllm.engines.choose.engine_of`); None: `transformers`, here.

    Raises:
        MLLMError: there is no model, or one of another format; a part needs code that is not allowed; the frozen parts
            are not those that it was trained on; tensors are missing or damaged; or the engine cannot run the model.
    """
    path = find_folder(Path(folder))
    about = read_about(path)
    check_trust(about.spec, path, trust_remote_code)
    runs_layers = None if on_meta() else engine_of(engine)
    if runs_layers is not None:
        with torch.device("meta"):
            check_parts(build(about.spec))
    model = build(about.spec, device=device, dtype=dtype, engine=runs_layers)
    if not on_meta():
        restore(model, path)
    model.source, model.fingerprint = str(folder), about.fingerprint
    if runs_layers is not None:
        start(model)
    return model


def guides_of(scorer: PartSpec | None, guides: Mapping[str, PartSpec] | None = None) -> Guides:
    """Return the guides of a model: its scorer, and those that a stage names besides."""
    return Guides({**(guides or {}), **({} if scorer is None else {SCORER: scorer})}, open_guide)


def open_guide(model: Model | None, name: str, spec: PartSpec | None) -> Any:
    """Build a guide, frozen and on a model's device.

    A scorer without a specification is the model itself, and so is the run of a scorer that names none.

    Raises:
        MLLMError: an unknown type, arguments that it does not take, or a run that is not there.
    """
    if spec is None:
        assert model is not None
        return own_scorer(model)
    device = None if model is None else model.device
    if model is not None and name == SCORER and spec.type in REQUIRED_PARTS and "model" not in spec.options():
        return open_part(("scorers",), spec, device, model=model)
    try:
        guide = open_part(("scorers",) if name == SCORER else GROUPS, spec, device)
    except MLLMError as error:
        raise MLLMError(str(error) if name == SCORER else f"The guide {name!r}: {error}") from None
    return guide.requires_grad_(False).eval()


def open_part(groups: Sequence[str], spec: PartSpec, device: torch.device | None, **own: Any) -> Any:
    """Return a frozen part of one of several registry groups, with the runs that its options name."""
    group = group_of(spec.type, groups)
    cls = lookup(group, spec.type)
    label = f"{group.removesuffix('s').replace('_', ' ')} {spec.type}"
    if on_meta():
        return made(cls, label, **own, **with_runs(cls, spec.options(), None))
    return made(cls, label, **own, **with_runs(cls, spec.options(), device)).to(device)
