"""Save and load what was trained: ``trained.safetensors`` and ``assembly.json``, which knows its parts.

Notable: the tensors carry fingerprints of the frozen parts that took part in training them. On other parts they are
refused, and so is a file with a tensor too many or too few.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mllm import recipe
from mllm.errors import MLLMError
from mllm.model import Assembly, build
from mllm.recipe import AssemblySpec
from mllm.version import __version__

FORMAT = 1
TENSORS, ASSEMBLY = "trained.safetensors", "assembly.json"


def save(model: Assembly, folder: Path) -> Path:
    """Write a model's trained tensors and what they belong to.

    Raises:
        MLLMError: the folder cannot be written (a full disk, no permission); nothing half-written is left.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / TENSORS, lambda path: save_file(model.trained_state(), path))
        about = {
            "format": FORMAT,
            "version": __version__,
            "spec": model.spec.model_dump(mode="json"),
            "fingerprints": _fingerprints(model),
            "tensors": _digest(folder / TENSORS),
        }
        write(folder / ASSEMBLY, lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))
    except (OSError, SafetensorError) as error:
        raise MLLMError(f"The model could not be saved in {folder}: {error}. Free some room, or give another folder.") from error
    return folder


def load(folder: str | Path) -> Assembly:
    """Load a run or a saved model.

    Raises:
        MLLMError: no model there, one of another format, other frozen parts than it was trained on, or tensors that
            are missing, unknown or damaged.
    """
    path = _find(Path(folder))
    about = _about(path / ASSEMBLY)
    if about.get("format") != FORMAT:
        raise MLLMError(
            f"{path} is of format {about.get('format')!r}, and this version of mllm reads format {FORMAT}. "
            f"It was written by mllm {about.get('version', '(unknown)')}: load it with that version."
        )
    model = build(recipe.checked(AssemblySpec, about["spec"], label=str(path / ASSEMBLY)))
    _same_parts(path, about["fingerprints"], _fingerprints(model))
    if _digest(path / TENSORS) != about["tensors"]:
        raise MLLMError(f"{path / TENSORS} is not the file that {ASSEMBLY} belongs to: it was changed or cut short.")
    _put(model, path / TENSORS)
    return model


def write(path: Path, action: Callable[[Path], Any]) -> None:
    """Make a file whole or not at all: it is written beside its place and moved there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        action(beside)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _put(model: Assembly, tensors: Path) -> None:
    """Load tensors into a model; every one must be used, and none may be missing."""
    try:
        saved = load_file(tensors)
    except (SafetensorError, OSError) as error:
        raise MLLMError(f"{tensors} cannot be read: {error}") from None
    wanted = model.trained_state()
    odd = sorted(saved.keys() ^ wanted.keys())
    odd += [name for name in saved.keys() & wanted.keys() if saved[name].shape != wanted[name].shape]
    if odd:
        raise MLLMError(f"{tensors} does not fit the model: missing, unknown or of another shape are {', '.join(odd)}.")
    model.load_state_dict(saved, strict=False)


def _find(folder: Path) -> Path:
    for path in (folder, folder / "model"):
        if (path / ASSEMBLY).is_file():
            return path
    raise MLLMError(f"There is no model in {folder}: expected {ASSEMBLY} there or in {folder / 'model'}.")


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
        return about if isinstance(about, dict) else {}
    except (OSError, ValueError) as error:
        raise MLLMError(f"{path} cannot be read: {error}") from None


def _fingerprints(model: Assembly) -> dict[str, str]:
    return {"encoder": str(model.encoder.fingerprint), "lm": str(model.lm.fingerprint)}


def _same_parts(path: Path, trained_on: dict[str, str], here: dict[str, str]) -> None:
    for part, print_ in trained_on.items():
        if here[part] != print_:
            raise MLLMError(
                f"{path} was trained on another {part}: its fingerprint is {print_[:16]}..., and the one found here "
                f"has {here[part][:16]}.... Put the original {part} back, or train on this one."
            )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
