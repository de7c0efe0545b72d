"""Identify a frozen part: by its weights, its configuration, and how its inputs are prepared.

A fingerprint is the SHA-256 of the weights, followed by short hashes of the part's other aspects, each with its name:
``9f86d0... configuration:1b4f0e... tokenizer:60303a...``. Earlier versions wrote the first alone. Bookkeeping is left
out: names and paths, versions, the precision that weights are loaded in, and values that only training uses. A value
that equals the default of its class is left out too, so it may or may not be written in the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm.hub.fingerprints import file_hash
from mllm.hub.loading import load_config

WEIGHTS = "weights"
FILES = {  # where an aspect is found in a part's folder
    WEIGHTS: "its weight files",
    "configuration": "config.json",
    "preprocessing": "preprocessor_config.json",
    "tokenizer": "the tokenizer's files",
    "chat_template": "the tokenizer's chat template",
}
BOOKKEEPING = re.compile(
    r"_.*|.*_version|.*dropout.*|.*drop_path.*|.*layerdrop.*|init(ializer)?_(range|factor|std)"
    r"|architectures|auto_map|(torch_)?dtype|id2label|label2id|num_labels|problem_type|finetuning_task"
    r"|task_specific_params|output_(attentions|hidden_states)|return_dict|use_cache|chunk_size_feed_forward"
    r"|gradient_checkpointing|attn_implementation|(tokenizer|processor)_class|(image_processor|feature_extractor)_type"
)


def fingerprint_of(weights: str, **aspects: Any) -> str:
    """Return the fingerprint of a part.

    Args:
        weights: their hash.
        aspects: what else identifies the part, by its name in `FILES`: anything that JSON can express; None: unknown.
    """
    known = {name: _short_hash(value) for name, value in aspects.items() if value is not None}
    return _written({WEIGHTS: weights, **known})


def joined(weights: str, fingerprints: Sequence[str]) -> str:
    """Return the fingerprint of something made of several parts: a hash of their weights, and theirs of each aspect."""
    parts = [_read(fingerprint) for fingerprint in fingerprints]
    names = dict.fromkeys(name for part in parts for name in part if name != WEIGHTS)
    return fingerprint_of(weights, **{name: [part.get(name, "") for part in parts] for name in names})


def weights_of(fingerprint: str) -> str:
    """Return the hash of a part's weights: its whole fingerprint, where an earlier version wrote it."""
    return _read(fingerprint)[WEIGHTS]


def without(fingerprint: str, aspect: str) -> str:
    """Return a fingerprint that leaves an aspect open."""
    return _written({name: value for name, value in _read(fingerprint).items() if name != aspect})


def differing(one: str, other: str) -> dict[str, tuple[str, str]]:
    """Return the aspects in which two fingerprints differ, with both hashes; what only one of them has is left out."""
    first, second = _read(one), _read(other)
    return {name: (first[name], second[name]) for name in first if first[name] != second.get(name, first[name])}


def of_language_model(weights: str, folder: str, tokenizer: Any, *, trust_remote_code: bool = False) -> str:
    """Return the fingerprint of a language model, or of a text encoder.

    Args:
        weights: their hash.
        folder: the folder or Hub id that it was loaded from. Its configuration is read there: that of the loaded model
            depends on options, such as quantization.
        tokenizer: of `transformers`, or None.
        trust_remote_code: run code of the model's repository, to read its configuration.
    """
    return fingerprint_of(
        weights,
        configuration=configuration(load_config(folder, trust_remote_code=trust_remote_code)),
        tokenizer=tokenization(tokenizer),
        chat_template=getattr(tokenizer, "chat_template", None),
    )


def configuration(config: Any) -> dict[str, Any]:
    """Return what a configuration of `transformers` determines about a model's outputs."""
    defaults = _defaults(config.__class__)
    values = {
        name: value
        for name, value in config.to_dict().items()
        if not BOOKKEEPING.fullmatch(name) and (name not in defaults or value != defaults[name])
    }
    members = {name: getattr(config, name, None) for name in type(config).sub_configs}
    values |= {name: configuration(member) for name, member in members.items() if hasattr(member, "to_dict")}
    return {**values, "model_type": config.model_type}


def preprocessing(processor: Any) -> dict[str, Any] | None:
    """Return how an image processor or a feature extractor prepares inputs; None where there is none."""
    if processor is None:
        return None
    values = processor.to_dict().items()
    return {name: value for name, value in values if _is_set(value) and not BOOKKEEPING.fullmatch(name)}


def tokenization(tokenizer: Any) -> dict[str, Any] | None:
    """Return what determines the ids of a text, and the text of ids; None where there is no tokenizer.

    Truncation, padding and the chat template do not belong to it.
    """
    if tokenizer is None:
        return None
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        model = json.dumps(state.pop("model"), sort_keys=True)  # it has hundreds of thousands of entries
        kept = {name: state[name] for name in state.keys() - {"version", "truncation", "padding"}}
        return {**kept, "special": special, "model": hashlib.sha256(model.encode()).hexdigest()}
    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    vocabulary = {"vocab": tokenizer.get_vocab(), "file": file_hash(file) if file.is_file() else None}
    return {"special": special, "type": type(tokenizer).__name__, **vocabulary}


def _is_set(value: Any) -> bool:
    return value is not None and value is not False  # 0 is a resampling filter


@functools.cache
def _defaults(kind: Any) -> dict[str, Any]:
    """Return the values of a configuration that is made without arguments; none where that is impossible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return dict(kind().to_dict())
        except Exception:  # each class checks its arguments in its own way
            return {}


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return a value in the one form that equal values have in JSON: 1 and 1.0, a list and a tuple."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read(fingerprint: str) -> dict[str, str]:
    """Return the hashes of a fingerprint by their names; one that a part makes up itself is that of its weights."""
    weights, *aspects = fingerprint.split(" ")
    return {WEIGHTS: weights, **dict(aspect.split(":", 1) for aspect in aspects if ":" in aspect)}


def _written(hashes: dict[str, str]) -> str:
    return " ".join(value if name == WEIGHTS else f"{name}:{value}" for name, value in hashes.items())
