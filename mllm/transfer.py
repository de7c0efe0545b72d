"""Copy trained parts of another run into a model, by parameter name (``init.from``)."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mllm.config.base import PartSpec
from mllm.config.lm import LMSpec
from mllm.config.parts import AssemblySpec, EncoderSpec
from mllm.config.recipe import Stage
from mllm.errors import MLLMError, near
from mllm.hub import loading as hub
from mllm.hub.fingerprints import fingerprint
from mllm.hub.identity import differing, of_language_model, without
from mllm.model import Model
from mllm.saving import (
    TensorShape,
    check_fingerprints,
    find_folder,
    fingerprints_of,
    read_about,
    read_shapes,
    read_tensors,
)

FrozenSpec = EncoderSpec | LMSpec | PartSpec | None


def transfer(model: Model, source: Path, paths: Sequence[str] = ()) -> None:
    """Copy trained tensors of a run or saved model into a model that may have other parts besides.

    Args:
        model: the target.
        source: the run or saved model.
        paths: parts, or paths inside them (``connector.qformer``); none: all trained tensors of the source.

    Raises:
        MLLMError: a path that the source has not trained, tensors that do not fit, or frozen parts other than those
            that the source was trained on.
    """
    path = find_folder(source)
    about = read_about(path)
    here = {part: without(fingerprint, "chat_template") for part, fingerprint in fingerprints_of(model).items()}
    check_fingerprints(path, about.fingerprints, {part: here.get(part, "none") for part in about.fingerprints})
    saved, targets = read_tensors(path / about.tensors), model.trained_tensors()
    names = _transferred(path, {name: tuple(tensor.shape) for name, tensor in saved.items()}, targets, paths)
    model.load_state_dict({name: saved[name] for name in names}, strict=False)
    model.calibrated = model.calibrated or complete(targets, names)


def complete(targets: Iterable[str], names: Container[str]) -> bool:
    """Whether names of tensors include all of the connector's that set its output's scale.

    Those of its vocabulary do not, nor does the newline token of tiles.
    """
    other = ("connector.vocabulary.", "connector.newline")
    own = (name for name in targets if name.startswith("connector.") and not name.startswith(other))
    return all(name in names for name in own)


def check_source(model: Model, stage: Stage) -> None:
    """Check that `transfer` would succeed for a stage, whose model may be on the meta device.

    The source is verified. Frozen parts with the same name are assumed to be the same: their weights are not hashed.

    Raises:
        MLLMError: `transfer` would fail.
    """
    path = find_folder(Path(stage.init.source or ""))
    about = read_about(path)
    for part, expected in about.fingerprints.items():
        there, here = _frozen_spec(about.spec, part), _frozen_spec(stage, part)
        if _label(there) != _label(here) and not _is_same(model, part, here, expected):
            raise MLLMError(
                f"init.from: {path} was trained on another {part}: {_label(there)}, and this recipe has "
                f"{_label(here)}. Use that {part}, or a run that was trained on this one."
            )
    _transferred(path, read_shapes(path, about), model.trained_tensors(), stage.init.parts)


def _frozen_spec(parts: AssemblySpec | Stage, name: str) -> FrozenSpec:
    """Return the specification of a frozen part."""
    specs: dict[str, FrozenSpec] = {"encoder": parts.encoder, "lm": parts.lm, "decoder": parts.decoder}
    return specs.get(name)


def _label(spec: FrozenSpec) -> str:
    """Return a frozen part's name, which identifies it by its specification alone."""
    if spec is None:
        return "none"
    if isinstance(spec, EncoderSpec):
        name = spec.label
    else:
        name = spec.model if isinstance(spec, LMSpec) else str(spec.options().get("model") or spec.type)
    return f"{name} (random weights)" if _is_random(spec) else name


def _is_random(spec: FrozenSpec) -> bool:
    """Whether a part has random weights instead of pretrained ones."""
    return isinstance(spec, EncoderSpec | LMSpec) and spec.init == "random"


def _is_same(model: Model, part: str, spec: FrozenSpec, expected: str) -> bool:
    """Whether a part has the expected fingerprint; only if its pretrained weights are on this machine."""
    if spec is None or _is_random(spec):
        return False
    with contextlib.suppress(MLLMError):
        return not differing(expected, without(_fingerprint(model, part, spec), "chat_template"))
    return False


def _fingerprint(model: Model, part: str, spec: FrozenSpec) -> str:
    if isinstance(spec, LMSpec):  # on the meta device it has no weights to hash
        folder = hub.resolve(spec.model, group="lms")
        return of_language_model(fingerprint(folder), folder, model.lm.tokenizer)
    return str(model.get_submodule(part).fingerprint)


def _transferred(
    path: Path, saved: Mapping[str, TensorShape], targets: Mapping[str, Tensor], paths: Sequence[str]
) -> list[str]:
    """Return the names of a source's tensors that are transferred, after a check of their shapes."""
    for name in paths:
        if not any(f"{tensor}.".startswith(f"{name}.") for tensor in saved):
            raise MLLMError(f"init.parts names {name!r}, which {path} has not trained. {near(name, _modules(saved))}")
    names = [name for name in saved if not paths or any(f"{name}.".startswith(f"{part}.") for part in paths)]
    wrong = [name for name in names if name not in targets or tuple(targets[name].shape) != saved[name]]
    if wrong:
        raise MLLMError(
            f"init.from: {path} does not fit this model: unknown or of another shape are {', '.join(wrong)}. List in "
            "init.parts the parts to transfer, or give the parts here the sizes that they have there."
        )
    return names


def _modules(tensors: Iterable[str]) -> list[str]:
    """Return the dotted names of all modules that contain tensors of these names."""
    steps = [name.split(".") for name in tensors]
    return sorted({".".join(parts[:end]) for parts in steps for end in range(1, len(parts))})
