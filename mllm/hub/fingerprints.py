"""Hash weights: files on disk, or tensors in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from functools import cache
from pathlib import Path

import torch
from torch import nn

from mllm.errors import MLLMError
from mllm.hub.loading import explain_errors

WEIGHTS = ("*.safetensors", "*.bin")


def fingerprint(folder: str) -> str:
    """Return a SHA-256 of the weight files of ``folder`` (a folder, or a Hub id in the local cache).

    Raises:
        MLLMError: there are no weight files.
    """
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()


@cache
def file_hash(file: Path) -> str:
    """Return a file's SHA-256, computed once per process."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_hash(module: nn.Module, without: Container[str] = ()) -> str:
    """Return a SHA-256 of the names, shapes, dtypes and bytes of a module's tensors, except those in ``without``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name in without:
            continue
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        tensor = getattr(tensor, "full_tensor", lambda local=tensor: local)()  # gathers a sharded tensor
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _weight_files(folder: str) -> list[Path]:
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        with explain_errors(folder):
            folder = snapshot_download(folder, local_files_only=True, allow_patterns=list(WEIGHTS))
    for pattern in WEIGHTS:
        paths = sorted(Path(folder).glob(pattern))
        if paths:
            return paths
    raise MLLMError(f"{folder} contains no weights: expected *.safetensors. Save the model there with save_pretrained.")
