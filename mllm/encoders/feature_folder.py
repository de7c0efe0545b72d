"""Name the cache folder of an encoder's features by a hash of everything that determines them.

These are the encoder's weights, configuration, layer, selection, resolution, preprocessing and dtype. When any of them
changes, another folder is used, so no stale feature is ever read.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from mllm.hub.fingerprints import tensor_hash
from mllm.hub.identity import weights_of
from mllm.model import Model
from mllm.system import cache_dir

FORMAT = 2  # of the shards and of their folder's key


def features_folder(model: Model, dtype: str = "auto") -> Path:
    """Return the cache folder for the features of this encoder: with its weights, configuration and settings.

    ``dtype`` is the recipe's ``cache.dtype``: that of the rows.
    """
    stored = {} if dtype == "auto" else {"stored": dtype}
    return _folder_of(model, format=FORMAT, fingerprint=str(model.encoder.fingerprint), **stored)


def warn_of_former_folder(model: Model) -> None:
    """Warn of features in the folder that earlier versions used, for any encoder with these weights and settings."""
    former = _folder_of(model, weights=weights_of(str(model.encoder.fingerprint)))
    if former.exists() and not features_folder(model).exists():
        warnings.warn(
            f"The features in {former} are of an earlier version, whose key was the encoder's weights and not its "
            "configuration: they are not used, and computed again. The folder can be deleted.",
            UserWarning,
            stacklevel=2,
        )


def _folder_of(model: Model, **identity: Any) -> Path:
    encoder = model.encoder
    identity |= {
        "kind": type(encoder).__name__,
        "dtypes": sorted({str(parameter.dtype) for parameter in encoder.parameters()}),
        "settings": encoder.settings(),
    }
    if encoder.tiling is not None:
        identity["tiles"] = repr(encoder.tiling)
    if model.spec.trains("encoder"):
        identity["trained"] = tensor_hash(encoder)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "features" / digest[:32]
