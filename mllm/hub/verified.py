"""Write and read safetensors files whose header contains the SHA-256 of their content, or of each of their tensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm.hub.fingerprints import State, hash_of_tensors, state_of
from mllm.system import check_regular, parse_json, write

STATE, SHA256 = "state", "sha256"
EACH = "sha256 of each"
NO_CHECKSUM = "its header contains no checksum"
CHANGED = "it does not have the checksum in its header: it was changed after it was written"


class DamagedFile(Exception):
    """A file's content is not what was written; the message says why."""


def save_verified(path: Path, tensors: Mapping[str, Tensor], state: str = "") -> None:
    """Write tensors and a text to a file, whole or not at all.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    metadata = {STATE: state, SHA256: hash_of_tensors(tensors, state)}
    write(path, lambda file: save_file(dict(tensors), file, metadata=metadata))


def read_verified(path: Path, *, checksum_required: bool = True) -> tuple[dict[str, Tensor], str]:
    """Return a file's tensors and text, after every byte of them is verified.

    Args:
        path: the file.
        checksum_required: whether a file without a checksum, of an earlier version, is refused.

    Raises:
        OSError: the file cannot be read.
        DamagedFile: it does not have the content that was written.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise DamagedFile(str(error)) from None
    if metadata.keys() - {STATE, SHA256} or (checksum_required and SHA256 not in metadata):
        raise DamagedFile(NO_CHECKSUM)
    state = metadata.get(STATE, "")
    if SHA256 in metadata and metadata[SHA256] != hash_of_tensors(tensors, state):
        raise DamagedFile(CHANGED)
    return tensors, state


def save_each_verified(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, whole or not at all, of which `read_tensor` reads single ones.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    metadata = {EACH: json.dumps({name: hash_of_tensors({name: tensor}) for name, tensor in tensors.items()})}
    write(path, lambda file: save_file(dict(tensors), file, metadata=metadata))


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor of a file, after every byte of it is verified; the others are not read.

    A file of `save_verified` has one checksum: when the first of its tensors is read, all are, one after another.

    Raises:
        OSError: the file cannot be read.
        DamagedFile: the tensor is not what was written.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if EACH in metadata:
                tensor: Tensor = file.get_tensor(name)
                if parse_json(metadata[EACH]).get(name) != hash_of_tensors({name: tensor}):
                    raise DamagedFile(CHANGED)
                return tensor
            _check_whole(path, state_of(path))
            return file.get_tensor(name)
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise DamagedFile(str(error)) from None


@functools.cache
def _check_whole(path: Path, state: State) -> None:
    """Check the checksum of a whole file, once as long as the file is not written."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if SHA256 not in metadata:
            raise DamagedFile(NO_CHECKSUM)
        if metadata[SHA256] != hash_of_tensors(_Tensors(file), metadata.get(STATE, "")):
            raise DamagedFile(CHANGED)


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open file, each of which is read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())
