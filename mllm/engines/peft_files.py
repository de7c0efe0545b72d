"""Write a LoRA as files of peft, which an engine loads; the folder is named by their content."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from mllm.capabilities import PeftAdapter
from mllm.hub.fingerprints import hash_of_tensors
from mllm.system import cache_dir, write


def peft_folder(adapter: PeftAdapter, base: str) -> Path:
    """Return a folder in the cache with an adapter's files; what is there already is not written again.

    Args:
        adapter: with its trained weights.
        base: the language model's name.
    """
    tensors, config = adapter.peft_tensors(), adapter.peft_config
    config.base_model_name_or_path = base
    folder = cache_dir() / "lora" / f"mllm-{hash_of_tensors(tensors, repr(config.to_dict()))[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path))
    config.save_pretrained(str(folder))
    return folder
