"""Write and read safetensors files whose header contains the SHA-256 of their content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm.hub.fingerprints import hash_of_tensors
from mllm.system import check_regular, write

STATE, SHA256 = "state", "sha256"


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
        raise DamagedFile("its header contains no checksum")
    state = metadata.get(STATE, "")
    if SHA256 in metadata and metadata[SHA256] != hash_of_tensors(tensors, state):
        raise DamagedFile("it does not have the checksum in its header: it was changed after it was written")
    return tensors, state
