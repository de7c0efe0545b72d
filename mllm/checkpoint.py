"""Save and load what was trained: a file of tensors and ``assembly.json``, which names it and knows its parts.

Notable: the tensors carry fingerprints of the frozen parts that took part in training them. On other parts they are
refused, and so is a file with a tensor too many or too few. The tensors' file is named by its content and
``assembly.json`` is replaced last, so at every instant the folder holds one whole model, the former or the new.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm import hub
from mllm.assembling import build
from mllm.errors import MLLMError, near
from mllm.files import write
from mllm.model import Assembly
from mllm.spec import FROZEN, AssemblySpec, Spec, Stage, checked
from mllm.version import __version__

FORMAT = 1
ASSEMBLY, UNNAMED = "assembly.json", ".trained.safetensors"

Shape = tuple[int, ...]


class About(Spec):
    """What ``assembly.json`` says."""

    format: int
    version: str  # of mllm
    spec: AssemblySpec
    fingerprints: dict[str, str]  # of the frozen parts
    tensors: str = Field(pattern=r"^trained-[0-9a-f]{12}\.safetensors$")  # the file beside this one
    sha256: str  # of that file


def save(model: Assembly, folder: Path) -> Path:
    """Write a model's trained tensors and what they belong to.

    Raises:
        MLLMError: the folder cannot be written (a full disk, no permission); nothing half-written is left, and a model
            that was there before is still there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors, sha256 = _write_tensors(model, folder)
        about = About(
            format=FORMAT,
            version=__version__,
            spec=model.spec,
            fingerprints=_fingerprints(model),
            tensors=tensors,
            sha256=sha256,
        )
        write(folder / ASSEMBLY, lambda path: path.write_text(about.model_dump_json(indent=2) + "\n"))
    except (OSError, SafetensorError) as error:
        raise MLLMError(
            f"The model could not be saved in {folder}: {error}. Free some room, or give another folder."
        ) from error
    finally:
        _sweep(folder)
    return folder


def load(folder: str | Path) -> Assembly:
    """Load a run or a saved model.

    Raises:
        MLLMError: no model there, one of another format, other frozen parts than it was trained on, or tensors that
            are missing, unknown or damaged.
    """
    path = _find(Path(folder))
    model = build(_intact(path).spec)
    restore(model, path)
    return model


def about(folder: Path) -> About:
    """Return what a run or saved model says of itself; the errors are those of `load`."""
    return _intact(_find(folder))


def trained_on(folder: str | Path) -> tuple[AssemblySpec, dict[str, str], dict[str, Tensor]]:
    """Return what a run or saved model is built from, its frozen parts' fingerprints, and its trained tensors.

    Nothing is built, and no frozen part is loaded; the errors are those of `load`.
    """
    path = _find(Path(folder))
    about = _intact(path)
    return about.spec, about.fingerprints, _tensors(path / about.tensors)


def restore(model: Assembly, folder: Path) -> None:
    """Put what was saved in a folder into a model of the same parts; the errors are those of `load`."""
    about = _intact(folder)
    _same_parts(folder, about.fingerprints, _fingerprints(model))
    _put(model, folder / about.tensors)


def _intact(folder: Path) -> About:
    """Return what a folder's ``assembly.json`` says, having held its tensors' file against it."""
    about = _about(folder / ASSEMBLY)
    tensors = folder / about.tensors
    if _digest(tensors) != about.sha256:
        raise MLLMError(
            f"{tensors} is not the file that {ASSEMBLY} belongs to: it was changed or cut short. Copy the folder again."
        )
    return about


def _write_tensors(model: Assembly, folder: Path) -> tuple[str, str]:
    """Write the trained tensors to a file named by its content; return the name and the content's SHA-256."""
    unnamed = folder / UNNAMED
    save_file(model.trained_state(), unnamed)
    unnamed.chmod(0o644)  # it is written for its owner only
    sha256 = _digest(unnamed)
    name = f"trained-{sha256[:12]}.safetensors"
    os.replace(unnamed, folder / name)
    return name, sha256


def _sweep(folder: Path) -> None:
    """Remove tensors that ``assembly.json`` does not name: a former model's, or of a save that failed."""
    with contextlib.suppress(OSError, MLLMError):  # a file too many does no harm
        keep = _about(folder / ASSEMBLY).tensors if (folder / ASSEMBLY).exists() else None
        for file in [folder / UNNAMED, *folder.glob("trained-*.safetensors")]:
            if file.name != keep:
                file.unlink(missing_ok=True)


def _put(model: Assembly, tensors: Path) -> None:
    """Load tensors into a model; every one must be used, and none may be missing."""
    saved = _tensors(tensors)
    wanted = model.trained_state()
    odd = sorted(saved.keys() ^ wanted.keys())
    odd += [name for name in saved.keys() & wanted.keys() if saved[name].shape != wanted[name].shape]
    if odd:
        raise MLLMError(f"{tensors} does not fit the model: missing, unknown or of another shape are {', '.join(odd)}.")
    model.load_state_dict(saved, strict=False)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MLLMError(f"{path} cannot be read: {error}") from None


def _find(folder: Path) -> Path:
    for path in (folder, folder / "model"):
        if (path / ASSEMBLY).is_file():
            return path
    raise MLLMError(f"There is no model in {folder}: expected {ASSEMBLY} there or in {folder / 'model'}.")


def _about(path: Path) -> About:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MLLMError(f"{path} cannot be read: {error}. Copy the folder again.") from None
    if isinstance(about, dict) and about.get("format") != FORMAT:
        raise MLLMError(
            f"{path} is of format {about.get('format')!r}, and this version of mllm reads format {FORMAT}. "
            f"It was written by mllm {about.get('version', '(unknown)')}: load it with that version."
        )
    return checked(About, about, label=str(path))


def take(model: Assembly, source: Path, paths: Sequence[str] = ()) -> None:
    """Take trained tensors from a run or saved model into a model that is otherwise another.

    Args:
        model: what they are put into.
        source: the run or saved model.
        paths: parts, or paths inside them (``connector.qformer``); none: all that is there.

    Raises:
        MLLMError: a path that the source has not trained, tensors that do not fit, or frozen parts other than those
            that took part in the training there.
    """
    path = _find(source)
    about = _about(path / ASSEMBLY)
    here = _fingerprints(model)
    _same_parts(path, about.fingerprints, {part: here.get(part, "none") for part in about.fingerprints})
    saved, wanted = _tensors(path / about.tensors), model.trained_tensors()
    names = _taken(path, {name: tuple(tensor.shape) for name, tensor in saved.items()}, wanted, paths)
    model.load_state_dict({name: saved[name] for name in names}, strict=False)
    model.calibrated = model.calibrated or all(name in names for name in wanted if name.startswith("connector."))


def check_source(model: Assembly, stage: Stage) -> None:
    """Say whether `take` would work for a stage, whose model may be on the meta device; no tensor is read.

    Frozen parts that are called the same are taken to be so: their weights are not hashed.

    Raises:
        MLLMError: it would not.
    """
    path = _find(Path(stage.init.source or ""))
    about = _about(path / ASSEMBLY)
    for part, expected in about.fingerprints.items():
        there, here = _called(getattr(about.spec, part)), _called(getattr(stage, part))
        if there != here and _weights(model, part, getattr(stage, part)) != expected:
            raise MLLMError(
                f"init.from: {path} was trained on another {part}: {there}, and this recipe has {here}. Name that one, "
                "or take a run that was trained on this one."
            )
    _taken(path, _shapes(path / about.tensors), model.trained_tensors(), stage.init.parts)


def _called(spec: Any) -> str:
    """Return what tells a frozen part from others, by its specification alone."""
    if spec is None:
        return "none"
    name = getattr(spec, "label", None) or getattr(spec, "model", None) or spec.type
    return f"{name} (random weights)" if getattr(spec, "init", None) == "random" else str(name)


def _weights(model: Assembly, part: str, spec: Any) -> str | None:
    """Return the fingerprint of a part whose weights are on this machine and would be loaded."""
    if spec is None or getattr(spec, "init", None) == "random":
        return None
    with contextlib.suppress(MLLMError):
        if part == "lm":  # built with random weights where it is only looked at
            return hub.fingerprint(hub.resolve(spec.model, group="lms"))
        return str(getattr(model, part).fingerprint)
    return None


def _taken(path: Path, saved: Mapping[str, Shape], wanted: Mapping[str, Tensor], paths: Sequence[str]) -> list[str]:
    """Return the names of the tensors that are taken, of all that a source has, by their shapes."""
    for name in paths:
        if not any(f"{tensor}.".startswith(f"{name}.") for tensor in saved):
            raise MLLMError(f"init.parts names {name!r}, which {path} has not trained. {near(name, _modules(saved))}")
    taken = [name for name in saved if not paths or any(f"{name}.".startswith(f"{part}.") for part in paths)]
    odd = [name for name in taken if name not in wanted or tuple(wanted[name].shape) != saved[name]]
    if odd:
        raise MLLMError(
            f"init.from: {path} does not fit this model: unknown or of another shape are {', '.join(odd)}. Name in "
            "init.parts what is to be taken, or give the parts here the sizes they have there."
        )
    return taken


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


def _fingerprints(model: Assembly) -> dict[str, str]:
    """Return the fingerprints of the frozen parts that are there: they took part in the training."""
    return {part: str(getattr(model, part).fingerprint) for part in FROZEN if getattr(model, part) is not None}


def _same_parts(path: Path, trained_on: dict[str, str], here: dict[str, str]) -> None:
    for part, found in here.items():
        expected = trained_on.get(part, "none")
        if expected != found:
            raise MLLMError(
                f"{path} was trained on another {part}: its fingerprint is {expected[:16]}..., and the one found here "
                f"has {found[:16]}.... Put the original {part} back, or train on this one."
            )


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise MLLMError(f"{path} cannot be read: {error.strerror or error}. Copy the folder again.") from None
