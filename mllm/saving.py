"""Save and load trained tensors: a safetensors file, and ``assembly.json`` with its name and the model's parts.

``assembly.json`` contains the fingerprints of the frozen parts that the tensors were trained on (`mllm.hub.identity`);
with other parts the tensors are refused, and so is a file with a missing or an unknown tensor. The file is named by its
content, and ``assembly.json`` is replaced last: the folder has one complete model at every moment, the old or the new.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm.config.base import Spec
from mllm.config.lm import add_quantization
from mllm.config.messages import checked
from mllm.config.parts import FROZEN, AssemblySpec, add_resize
from mllm.errors import MLLMError
from mllm.hub import identity
from mllm.model import Model
from mllm.prompts.chat_template import uses_template
from mllm.system import check_regular, open_regular, read_json, write
from mllm.version import __version__

FORMAT, STAGES = 1, "stages"  # the latter is a run's folder of the models of all stages but the last
ASSEMBLY, UNNAMED, UNSAVED = "assembly.json", ".trained.safetensors", f"trained-{'0' * 12}.safetensors"

TensorShape = tuple[int, ...]
_PLANNED: dict[Path, Model] = {}  # by the folder where it will be saved


class About(Spec):
    """The content of ``assembly.json``."""

    format: int
    version: str  # of mllm
    spec: AssemblySpec
    fingerprints: dict[str, str]  # of the frozen parts
    tensors: str = Field(pattern=r"^trained-[0-9a-f]{12}\.safetensors$")  # the file's name, in the same folder
    sha256: str  # of that file

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the whole model: of its tensors and frozen parts."""
        weights = {part: identity.weights_of(fingerprint) for part, fingerprint in self.fingerprints.items()}
        content = json.dumps([self.sha256, weights], sort_keys=True)
        parts = [self.fingerprints[part] for part in sorted(self.fingerprints)]
        return identity.joined(hashlib.sha256(content.encode()).hexdigest(), parts)


def save(model: Model, folder: Path) -> Path:
    """Write a model's trained tensors and ``assembly.json`` to a folder.

    Raises:
        MLLMError: the folder cannot be written (a full disk, no permission); no partial file is left, and a model that
            was saved there before can still be loaded.
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
            f"The model could not be saved in {folder}: {error}. Free some space, or give another folder."
        ) from error
    finally:
        _remove_stale(folder)
    return folder


def about(folder: Path) -> About:
    """Return the content of a run's or saved model's ``assembly.json``; the errors are those of `load`."""
    return read_about(find_folder(folder))


def read_saved(folder: str | Path) -> tuple[AssemblySpec, dict[str, str], dict[str, Tensor]]:
    """Return a run's or saved model's specification, its frozen parts' fingerprints, and its trained tensors.

    No model is built, and no frozen part is loaded; the errors are those of `load`.
    """
    path = find_folder(Path(folder))
    about = read_about(path)
    tensors = _PLANNED[path].trained_tensors() if path in _PLANNED else read_tensors(path / about.tensors)
    return about.spec, about.fingerprints, tensors


def read_shapes(folder: Path, about: About) -> dict[str, TensorShape]:
    """Return the shapes of a saved model's trained tensors, from the header of their file."""
    path = folder / about.tensors
    if folder in _PLANNED:
        return {name: tuple(tensor.shape) for name, tensor in _PLANNED[folder].trained_tensors().items()}
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MLLMError(f"{path} cannot be read: {error}. Copy the file again.") from None


def restore(model: Model, folder: Path) -> None:
    """Load a folder's tensors into a model of the same parts; the errors are those of `load`."""
    about = read_about(folder)
    check_fingerprints(folder, about.fingerprints, fingerprints_of(model))
    _load_tensors(model, folder / about.tensors)


def read_about(folder: Path) -> About:
    """Return the content of a folder's ``assembly.json``, after verifying the checksum of its tensors' file."""
    if folder in _PLANNED:
        spec = _PLANNED[folder].spec
        frozen = {part: "planned" for part in FROZEN if getattr(spec, part) is not None}
        return About(format=FORMAT, version=__version__, spec=spec, fingerprints=frozen, tensors=UNSAVED, sha256="")
    about = parse_about(folder / ASSEMBLY)
    tensors = folder / about.tensors
    if _digest(tensors) != about.sha256:
        raise MLLMError(
            f"{tensors} does not have the checksum in {ASSEMBLY}: it was changed or truncated. Copy the folder again."
        )
    return about


def check_trust(spec: AssemblySpec, path: Path, trusted: Sequence[str]) -> None:
    """Check that parts of a saved model run code of their repositories only where the caller allows it.

    Raises:
        MLLMError: a part does that is not named.
    """
    for part, model in spec.remote_code().items():
        name = part.partition(".")[0]
        if name not in trusted:
            raise MLLMError(
                f"The {name} of {path} runs Python code from the repository of {model!r}. If you have read that code "
                f"and trust it, allow it: --trust-remote-code {name}, or trust_remote_code=[{name!r}]."
            )


def _write_tensors(model: Model, folder: Path) -> tuple[str, str]:
    """Write the trained tensors to a file named by its content; return the name and the SHA-256 checksum."""
    unnamed = folder / UNNAMED
    save_file(model.trained_state(), unnamed)
    unnamed.chmod(0o644)  # safetensors creates files that only the owner can read
    sha256 = _digest(unnamed)
    name = f"trained-{sha256[:12]}.safetensors"
    os.replace(unnamed, folder / name)
    return name, sha256


def _remove_stale(folder: Path) -> None:
    """Remove tensors' files that ``assembly.json`` does not name: of an earlier model, or of a save that failed."""
    with contextlib.suppress(OSError, MLLMError):  # a stale file is harmless
        current = parse_about(folder / ASSEMBLY).tensors if (folder / ASSEMBLY).exists() else None
        for file in [folder / UNNAMED, *folder.glob("trained-*.safetensors")]:
            if file.name != current:
                file.unlink(missing_ok=True)


def _load_tensors(model: Model, file: Path) -> None:
    """Load a file's tensors into a model; every tensor must be used, and none may be missing."""
    saved = read_tensors(file)
    expected = model.trained_state()
    wrong = sorted(saved.keys() ^ expected.keys())
    wrong += [name for name in saved.keys() & expected.keys() if saved[name].shape != expected[name].shape]
    if wrong:
        raise MLLMError(
            f"{file} does not fit the model: missing, unknown or of another shape are {', '.join(wrong)}. Load it with "
            "the specification that it was saved with."
        )
    model.load_state_dict(saved, strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; an unreadable file raises an `MLLMError`."""
    try:
        check_regular(path)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MLLMError(f"{path} cannot be read: {error}. Copy the file again.") from None


def is_saved(folder: Path) -> bool:
    """Whether a folder is a saved model, or a run that is finished."""
    return any(os.path.isfile(path / ASSEMBLY) for path in (folder, folder / "model"))


@contextlib.contextmanager
def planned(folder: Path, model: Model) -> Iterator[None]:
    """Let a folder be read as if a model were saved there that will be: on the meta device, for checks before it is."""
    _PLANNED[folder] = model
    try:
        yield
    finally:
        del _PLANNED[folder]


def find_folder(folder: Path) -> Path:
    """Return the folder that contains ``assembly.json``: this one, or ``model`` inside it."""
    if folder in _PLANNED:
        return folder
    for path in (folder, folder / "model"):
        if os.path.isfile(path / ASSEMBLY):
            return path
    stages = folder.glob(f"{STAGES}/*/{ASSEMBLY}") if os.path.isdir(folder) else ()
    done = ", ".join(str(path.parent) for path in sorted(stages))
    raise MLLMError(
        f"There is no model in {str(folder)[:200]}: no {ASSEMBLY}, there or in its folder model. Give the folder of a "
        f"run or of a saved model{', such as that of a stage: ' if done else ''}{done}."
    )


def parse_about(path: Path) -> About:
    """Return the validated content of an ``assembly.json``; its tensors are not read."""
    try:
        about = read_json(path)
    except (OSError, ValueError) as error:
        raise MLLMError(f"{path} cannot be read: {error}. Copy the folder again.") from None
    if isinstance(about, dict) and about.get("format") != FORMAT:
        raise MLLMError(
            f"{path} is of format {about.get('format')!r}, and this version of mllm reads format {FORMAT}. "
            f"It was written by mllm {about.get('version', '(unknown)')}: load it with that version."
        )
    if isinstance(about, dict) and isinstance(about.get("spec"), dict):
        add_resize(about["spec"])
        add_quantization(about["spec"])
    return checked(About, about, label=str(path))


def fingerprints_of(model: Model) -> dict[str, str]:
    """Return the fingerprints of the model's frozen parts, on which the tensors are trained.

    The language model's chat template is left open where prompts are not written in it.
    """
    prints = {name: str(part.fingerprint) for name in FROZEN if (part := model.slot(name)) is not None}
    if "lm" in prints and not uses_template(model.spec.prompt, model.lm):
        prints["lm"] = identity.without(prints["lm"], "chat_template")
    return prints


def check_fingerprints(
    path: Path, trained_on: dict[str, str], here: dict[str, str], instead: str = "train on this one"
) -> None:
    """Compare the frozen parts with those that tensors were trained on; a fingerprint of weights alone warns once.

    Args:
        path: the tensors' run or folder.
        trained_on: the fingerprints of the parts that they were trained on.
        here: those of the present parts.
        instead: what can be done other than to restore the original part.

    Raises:
        MLLMError: a part is another one: its weights, its configuration, or how its inputs are prepared.
    """
    for part, actual in here.items():
        differing = identity.differing(trained_on.get(part, "none"), actual)
        for name, (expected, present) in differing.items():
            label = "fingerprint" if name == identity.WEIGHTS else name.replace("_", " ")
            same = "" if identity.WEIGHTS in differing else f" The weights are equal; compare {identity.FILES[name]}."
            raise MLLMError(
                f"{path} was trained on another {part}: its {label} is {expected[:16]}..., and that of this {part} is "
                f"{present[:16]}....{same} Restore the original {part}, or {instead}."
            )
        if trained_on.get(part) != actual and trained_on.get(part) == identity.weights_of(actual):
            _warn_of_weights_alone(path)


@functools.cache
def _warn_of_weights_alone(path: Path) -> None:
    """Warn, once per process and folder, of fingerprints as earlier versions wrote them."""
    warnings.warn(
        f"{path} has the fingerprints of an earlier version, of the weights alone. They match; whether the frozen "
        "parts' configurations, preprocessing and tokenizers are those that it was trained on is unknown. Saving the "
        "model again writes the complete fingerprints.",
        UserWarning,
        stacklevel=4,
    )


def _digest(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise MLLMError(f"{path} cannot be read: {error.strerror or error}. Copy the folder again.") from None
