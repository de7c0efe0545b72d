"""Build the parts of a specification and join them to a model: match widths, initialize weights, insert adapters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mllm.assembly import Assembly
from mllm.config.base import PartSpec
from mllm.config.messages import checked
from mllm.config.parts import SCORER, AssemblySpec
from mllm.decoders.condition import check_condition
from mllm.devices import DeviceName, DTypeName, cast, choose_device, dtype_of
from mllm.encoders.base import on_meta
from mllm.encoders.specified import cut_for, newline_for
from mllm.encoders.specified import encoder_of as encoder_of
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


def build(spec: AssemblySpec, *, device: DeviceName | None = None, dtype: DTypeName | None = None) -> Assembly:
    """Return the model of a specification, on a device; the trained parts' weights are initialized at random.

    Args:
        spec: the specification.
        device: see `mllm.devices.choose_device`.
        dtype: of the frozen weights; None: as they are stored, or as the specification says.
    """
    check_condition(spec)
    place, kind = choose_device(device), None if dtype is None else dtype_of(dtype)
    encoder = build_encoder(spec)
    return_memory()  # of the encoder's test forward pass
    lm = build_lm(spec, device=place)
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
    return model if on_meta() else model.to(device)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed_of(group.removeprefix("image_")))
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


def build_encoder(spec: AssemblySpec) -> Any:
    """Return the encoder; None where the specification has none."""
    if spec.encoder is None:
        return None
    here = torch.device("cpu")  # until the parts are joined
    runs = functools.partial(with_runs, device=here)
    return encoder_of(spec.encoder, seed=spec.seed_of("encoder"), runs=runs)


def build_lm(spec: AssemblySpec, *, device: torch.device | None = None) -> Any:
    """Return the language model; None where the specification has none.

    Args:
        spec: the specification.
        device: on which quantized weights are built; None: the CPU.
    """
    if spec.lm is None:
        return None
    cls, options = lookup("lms", spec.lm.type), spec.lm.options()
    if device is not None and "device" in inspect.signature(cls).parameters:
        options["device"] = device
    return made(cls, f"language model {spec.lm.model}", **options, seed=spec.seed_of("lm"))


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
) -> Assembly:
    """Load a run or a saved model.

    Args:
        folder: of the run or the saved model.
        device: where it computes (``cuda``, ``cuda:1``, ``mps``, ``cpu``); None: a GPU where there is one.
        dtype: of the frozen weights (``float32``, ``bfloat16``, ``float16``); None: as in training.
        trust_remote_code: the parts (``encoder``, ``lm``) that may run code of their models' repositories. A folder may
            come from somebody else, so what its recipe allowed is not enough.

    Raises:
        MLLMError: there is no model, or one of another format; a part needs code that is not allowed; the frozen parts
            are not those that it was trained on; or tensors are missing, unknown or damaged.
    """
    path = find_folder(Path(folder))
    about = read_about(path)
    check_trust(about.spec, path, trust_remote_code)
    model = build(about.spec, device=device, dtype=dtype)
    if not on_meta():
        restore(model, path)
    model.source, model.fingerprint = str(folder), about.fingerprint
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
