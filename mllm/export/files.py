"""Write an exported model's files as both lines of transformers, 4.57 and 5.x, read them.

The two name some things differently. What one line does not know it ignores or initializes at random, at most with a
warning, so every such name is written: those of 5.x, which saves the files, and beside them those of 4.57.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.conversion_mapping import get_model_conversion_mapping

from mllm.export.stock import StockModel

OF_THIS_MACHINE = ("backend", "is_local", "local_files_only")  # of tokenizer_config.json: how this process loaded it
SCALED = (
    "gemma",
    "gemma2",
)  # the models of 4.57 that multiply visual tokens by the scale of their embeddings, unlike 5.x


def needs_5(config: Any) -> bool:
    """Whether transformers 4.57 would compute something else with the same weights."""
    return config.get_text_config().model_type in SCALED


def write_files(stock: StockModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights, the configurations and the processor into a folder."""
    stock.model.to(dtype)
    # With its mapping a model is saved under the names of its first release, as if it was loaded from such a file.
    stock.model._weight_conversions = get_model_conversion_mapping(stock.model, add_legacy=False)
    stock.model.save_pretrained(folder)
    stock.processor.save_pretrained(folder)
    write_json(folder / "config.json", _with_older_names(json.loads((folder / "config.json").read_text())))
    file = folder / "tokenizer_config.json"
    write_json(file, _tokenizer_config(json.loads(file.read_text()), stock))


def write_json(file: Path, values: Any) -> None:
    """Write values as an indented JSON file."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def let_others_read(folder: Path) -> None:
    """Give a folder and its files the permissions of new ones; `safetensors` and `tempfile` make them private."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's configuration with the rotary embeddings under the names of 4.57, too."""
    return {
        name: value | _older_rope(value) if isinstance(value, dict) and "rope_parameters" in value else value
        for name, value in config.items()
    }


def _older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the base, the scaling and the share of rotary embeddings as 4.57 names them."""
    rope = config["rope_parameters"]
    if "full_attention" in rope:  # of each kind of layer; in 4.57 the others have a base of their own at most
        local = rope.get("sliding_attention", {}).get("rope_theta")
        return _older_rope({**config, "rope_parameters": rope["full_attention"]}) | {"rope_local_base_freq": local}
    kind = rope.get("rope_type", "default")
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if kind == "longrope":  # Phi-3 of 4.57 takes these three alone
        scaling = {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": None if kind == "default" else scaling}
    if (share := rope.get("partial_rotary_factor")) is not None:
        older["partial_rotary_factor"] = share
    if config["model_type"].startswith("gpt_neox"):
        older |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": share}
    return older


def _tokenizer_config(values: dict[str, Any], stock: StockModel) -> dict[str, Any]:
    """Return a tokenizer's configuration: it pads on the left, and is read from tokenizer.json as it stands."""
    values = {name: value for name, value in values.items() if name not in OF_THIS_MACHINE}
    values["padding_side"] = "left"
    if isinstance(stock.processor.tokenizer, PreTrainedTokenizerFast):
        # A class that 4.57 does not know is refused there.
        kind = "TokenizersBackend" if needs_5(stock.model.config) else "PreTrainedTokenizerFast"
        values |= {"tokenizer_class": kind, "model_input_names": ["input_ids", "attention_mask"]}
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    return values
