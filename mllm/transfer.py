"""Transfer trained parts from another run into a model whose other parts may differ (``init.from``)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mllm.config.recipe import Stage
from mllm.errors import MLLMError, near
from mllm.hub import loading as hub
from mllm.hub.fingerprints import fingerprint
from mllm.model import Model
from mllm.saving import ASSEMBLY, Shape, check_fingerprints, find_folder, fingerprints_of, parse_about, read_tensors


def transfer(model: Model, source: Path, paths: Sequence[str] = ()) -> None:
    """Transfer trained tensors from a run or saved model into a model whose other parts may differ.

    Args:
        model: receives them.
        source: the run or saved model.
        paths: parts, or paths inside them (``connector.qformer``); none: all trained tensors.

    Raises:
        MLLMError: a path that the source has not trained, tensors that do not fit, or frozen parts other than those
            that the source was trained on.
    """
    path = find_folder(source)
    about = parse_about(path / ASSEMBLY)
    here = fingerprints_of(model)
    check_fingerprints(path, about.fingerprints, {part: here.get(part, "none") for part in about.fingerprints})
    saved, wanted = read_tensors(path / about.tensors), model.trained_tensors()
    names = _selected(path, {name: tuple(tensor.shape) for name, tensor in saved.items()}, wanted, paths)
    model.load_state_dict({name: saved[name] for name in names}, strict=False)
    model.calibrated = model.calibrated or all(name in names for name in wanted if name.startswith("connector."))


def check_source(model: Model, stage: Stage) -> None:
    """Check that `transfer` would work for a stage, whose model may be on the meta device; no tensor is read.

    Frozen parts of the same name are assumed to be the same: their weights are not hashed.

    Raises:
        MLLMError: it would not.
    """
    path = find_folder(Path(stage.init.source or ""))
    about = parse_about(path / ASSEMBLY)
    for part, expected in about.fingerprints.items():
        there, here = _label(getattr(about.spec, part)), _label(getattr(stage, part))
        if there != here and _weights(model, part, getattr(stage, part)) != expected:
            raise MLLMError(
                f"init.from: {path} was trained on another {part}: {there}, and this recipe has {here}. Name that one, "
                "or take a run that was trained on this one."
            )
    _selected(path, _shapes(path / about.tensors), model.trained_tensors(), stage.init.parts)


def _label(spec: Any) -> str:
    """Return what identifies a frozen part, by its specification alone."""
    if spec is None:
        return "none"
    name = getattr(spec, "label", None) or getattr(spec, "model", None) or spec.type
    return f"{name} (random weights)" if getattr(spec, "init", None) == "random" else str(name)


def _weights(model: Model, part: str, spec: Any) -> str | None:
    """Return the fingerprint of a part whose weights are on this machine and would be loaded."""
    if spec is None or getattr(spec, "init", None) == "random":
        return None
    with contextlib.suppress(MLLMError):
        if part == "lm":  # built with random weights where nothing is loaded
            return fingerprint(hub.resolve(spec.model, group="lms"))
        return str(getattr(model, part).fingerprint)
    return None


def _selected(path: Path, saved: Mapping[str, Shape], wanted: Mapping[str, Tensor], paths: Sequence[str]) -> list[str]:
    """Return the names of the tensors to transfer, of all in a source, having compared their shapes."""
    for name in paths:
        if not any(f"{tensor}.".startswith(f"{name}.") for tensor in saved):
            raise MLLMError(f"init.parts names {name!r}, which {path} has not trained. {near(name, _modules(saved))}")
    selected = [name for name in saved if not paths or any(f"{name}.".startswith(f"{part}.") for part in paths)]
    odd = [name for name in selected if name not in wanted or tuple(wanted[name].shape) != saved[name]]
    if odd:
        raise MLLMError(
            f"init.from: {path} does not fit this model: unknown or of another shape are {', '.join(odd)}. Name in "
            "init.parts the parts to take, or give the parts here the sizes they have there."
        )
    return selected


def _shapes(path: Path) -> dict[str, Shape]:
    """Return the shapes of a file's tensors, from its header: a length in 8 bytes, and as much JSON."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (OSError, ValueError) as error:
        raise MLLMError(f"{path} cannot be read: {error}") from None
    return {name: tuple(about["shape"]) for name, about in header.items() if name != "__metadata__"}


def _modules(tensors: Iterable[str]) -> list[str]:
    """Return the dotted names of all modules that hold tensors of these names."""
    steps = [name.split(".") for name in tensors]
    return sorted({".".join(parts[:end]) for parts in steps for end in range(1, len(parts))})
