"""Read the bundled configurations of published models, so that recipes can be planned without a download.

``recipes/models/ORG--NAME.yaml`` contains ``model_type`` and the differences from its defaults in `transformers`. The
type ``shape`` (``dim``, and ``grid`` or ``patches``) describes an encoder that `transformers` does not have.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def configuration(model: str) -> dict[str, Any] | None:
    """Return the configuration of a published model by its Hub id (``facebook/opt-6.7b``), or None."""
    path = Path(str(files("mllm.recipes"))) / "models" / f"{model.replace('/', '--')}.yaml"
    if model.count("/") != 1 or not path.is_file():
        return None
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
