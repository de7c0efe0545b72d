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
from pathlib import Path

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm.config.messages import checked
from mllm.config.parts import FROZEN, AssemblySpec, Spec
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.system import write
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

    @property
    def fingerprint(self) -> str:
        """Return what tells a saved model from others: a hash of its tensors and its frozen parts."""
        content = json.dumps([self.sha256, self.fingerprints], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def save(model: Model, folder: Path) -> Path:
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
            fingerprints=fingerprints_of(model),
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


def about(folder: Path) -> About:
    """Return what a run or saved model says of itself; the errors are those of `load`."""
    return read_about(find_folder(folder))


def read_saved(folder: str | Path) -> tuple[AssemblySpec, dict[str, str], dict[str, Tensor]]:
    """Return the specification of a run or saved model, its frozen parts' fingerprints, and its trained tensors.

    Nothing is built, and no frozen part is loaded; the errors are those of `load`.
    """
    path = find_folder(Path(folder))
    about = read_about(path)
    return about.spec, about.fingerprints, read_tensors(path / about.tensors)


def restore(model: Model, folder: Path) -> None:
    """Put what was saved in a folder into a model of the same parts; the errors are those of `load`."""
    about = read_about(folder)
    check_fingerprints(folder, about.fingerprints, fingerprints_of(model))
    _put(model, folder / about.tensors)


def read_about(folder: Path) -> About:
    """Return what a folder's ``assembly.json`` says, having held its tensors' file against it."""
    about = parse_about(folder / ASSEMBLY)
    tensors = folder / about.tensors
    if _digest(tensors) != about.sha256:
        raise MLLMError(
            f"{tensors} is not the file that {ASSEMBLY} belongs to: it was changed or cut short. Copy the folder again."
        )
    return about


def _write_tensors(model: Model, folder: Path) -> tuple[str, str]:
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
        keep = parse_about(folder / ASSEMBLY).tensors if (folder / ASSEMBLY).exists() else None
        for file in [folder / UNNAMED, *folder.glob("trained-*.safetensors")]:
            if file.name != keep:
                file.unlink(missing_ok=True)


def _put(model: Model, tensors: Path) -> None:
    """Load tensors into a model; every one must be used, and none may be missing."""
    saved = read_tensors(tensors)
    wanted = model.trained_state()
    odd = sorted(saved.keys() ^ wanted.keys())
    odd += [name for name in saved.keys() & wanted.keys() if saved[name].shape != wanted[name].shape]
    if odd:
        raise MLLMError(f"{tensors} does not fit the model: missing, unknown or of another shape are {', '.join(odd)}.")
    model.load_state_dict(saved, strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; one that cannot be read is an `MLLMError`."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MLLMError(f"{path} cannot be read: {error}") from None


def find_folder(folder: Path) -> Path:
    """Return the folder that holds ``assembly.json``: this one, or ``model`` inside it."""
    for path in (folder, folder / "model"):
        if (path / ASSEMBLY).is_file():
            return path
    raise MLLMError(f"There is no model in {folder}: expected {ASSEMBLY} there or in {folder / 'model'}.")


def parse_about(path: Path) -> About:
    """Return what an ``assembly.json`` says, checked; its tensors are not read."""
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


def fingerprints_of(model: Model) -> dict[str, str]:
    """Return the fingerprints of the frozen parts that are there: they took part in the training."""
    return {part: str(getattr(model, part).fingerprint) for part in FROZEN if getattr(model, part) is not None}


def check_fingerprints(path: Path, saved: dict[str, str], here: dict[str, str]) -> None:
    """Check that frozen parts are those that were trained on.

    Raises:
        MLLMError: one is another.
    """
    for part, present in here.items():
        expected = saved.get(part, "none")
        if expected != present:
            raise MLLMError(
                f"{path} was trained on another {part}: its fingerprint is {expected[:16]}..., and the one here has "
                f"{present[:16]}.... Restore the original {part}, or train on this one."
            )


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise MLLMError(f"{path} cannot be read: {error.strerror or error}. Copy the folder again.") from None
