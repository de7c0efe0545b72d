"""Read a language model's embedding table from its files, and none of its layers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from mllm.errors import MLLMError
from mllm.hub import loading as hub
from mllm.hub.fingerprints import weight_files


def model_with_table(folder: str, *, trust_remote_code: bool, dtype: str | torch.dtype) -> Any:
    """Return a model of `transformers` with its embedding table, and with its layers on the meta device.

    Args:
        folder: its folder or Hub id.
        trust_remote_code: run code of the model's repository.
        dtype: of the table; ``auto``: as it is stored.
    """
    code: Any = {"trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        model = hub.load_model(hub.language_class(folder, **code), folder, **code)
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    with hub.explain_errors(folder):
        weight = _read(folder, f"{name}.weight", tuple(table.weight.shape))
    table.weight = nn.Parameter(weight if isinstance(dtype, str) else weight.to(dtype), requires_grad=False)
    _fill_buffers(table, folder)
    return model


def _read(folder: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of a name, or of its end: files of a bare model leave out the beginning, those of others add.

    Raises:
        MLLMError: the files have no such tensor.
    """
    for file in _files(folder):
        if file.suffix != ".safetensors":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for key, tensor in tensors.items():
                if _is_same(key, name) and tuple(tensor.shape) == shape:
                    return tensor.clone()
            continue
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                if _is_same(key, name) and tuple(opened.get_slice(key).get_shape()) == shape:
                    return opened.get_tensor(key)
    raise MLLMError(f"The files of {folder!r} have no embedding table {name!r} of {shape}. Use engine: transformers.")


def _is_same(key: str, name: str) -> bool:
    return f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}")


def _files(folder: str) -> list[Path]:
    """Return the weights' files; those of a Hub id are downloaded where they are not in the local cache."""
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        snapshot_download(folder, allow_patterns=["*.json", "*.safetensors"])
    return weight_files(folder)


def _fill_buffers(table: nn.Module, folder: str) -> None:
    """Give a table that scales its rows its factor, which is computed from the configuration.

    Raises:
        MLLMError: it has another buffer, of which nothing is known.
    """
    for name, buffer in list(table.named_buffers()):
        if buffer.is_meta:
            if not hasattr(table, "scalar_embed_scale"):
                raise MLLMError(f"The embedding table of {folder!r} has {name!r}, which is unknown. Use transformers.")
            table.register_buffer(name, torch.tensor(table.scalar_embed_scale), persistent=False)
