"""Hash weights: files on disk, or tensors in memory.

Hashing a large file takes seconds, so its hash is kept in the cache folder, with the file's size, times and inode: a
file that was written since, or whose times were set, is hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.hub.loading import explain_errors
from mllm.system import cache_dir, write

WEIGHTS = ("*.safetensors", "*.bin")
LARGE = 2**24  # bytes; the hashes of smaller files are kept in memory alone
SETTLED = 2 * 10**9  # nanoseconds; a file that was written less long ago may change without a change of its times

State = tuple[int, ...]

_hashes: dict[tuple[Path, State], str] = {}


def fingerprint(folder: str) -> str:
    """Return a SHA-256 of the weight files of ``folder`` (a folder, or a Hub id in the local cache).

    Raises:
        MLLMError: there are no weight files.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """Return a file's SHA-256, computed once as long as the file is not written."""
    path = file.resolve()  # in the cache of the Hub a file is a link
    state = state_of(path)
    known = _hashes.get((path, state)) or _kept_hash(path, state)
    if known is None:
        with path.open("rb") as stream:
            known = hashlib.file_digest(stream, "sha256").hexdigest()
        if state_of(path) != state or not _settled(state):
            return known
        _keep_hash(path, state, known)
    _hashes[path, state] = known
    return known


def tensor_hash(module: nn.Module, without: Container[str] = ()) -> str:
    """Return a SHA-256 of the names, shapes, dtypes and bytes of a module's tensors, except those in ``without``."""
    return hash_of_tensors({name: tensor for name, tensor in module.state_dict().items() if name not in without})


def hash_of_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a SHA-256 of the names, shapes, dtypes and bytes of tensors, and of a text before them."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        tensor = getattr(tensor, "full_tensor", lambda local=tensor: local)()  # gathers a sharded tensor
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weight_files(folder: str) -> list[Path]:
    """Return the weight files of ``folder`` (a folder, or a Hub id in the local cache).

    Raises:
        MLLMError: there are none.
    """
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        with explain_errors(folder):
            folder = snapshot_download(folder, local_files_only=True, allow_patterns=list(WEIGHTS))
    for pattern in WEIGHTS:
        paths = sorted(Path(folder).glob(pattern))
        if paths:
            return paths
    raise MLLMError(f"{folder} contains no weights: expected *.safetensors. Save the model there with save_pretrained.")


def state_of(path: Path) -> State:
    """Return what changes when a file is written or replaced: size, times and inode."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _settled(state: State) -> bool:
    """Whether a file was last written so long ago that a later write changes its times."""
    _, written, changed, *_ = state
    return time.time_ns() - max(written, changed) > SETTLED


def _kept_hash(path: Path, state: State) -> str | None:
    """Return a large file's hash from the cache folder; None where the file is another, or none is kept."""
    if state[0] < LARGE:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(_record(path).read_text(encoding="utf-8"))
        if kept["path"] == str(path) and kept["state"] == list(state):
            return str(kept["sha256"])
    return None


def _keep_hash(path: Path, state: State, sha256: str) -> None:
    if state[0] < LARGE:
        return
    with contextlib.suppress(OSError):  # it is computed again
        record = _record(path)
        record.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"path": str(path), "state": state, "sha256": sha256})
        write(record, lambda file: file.write_text(content, encoding="utf-8"))


def _record(path: Path) -> Path:
    return cache_dir() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
