"""Published models that recipes name: their configurations, which come with the package, so shapes need no download.

``recipes/models/ORG--NAME.yaml`` holds ``model_type`` and what differs from its defaults in `transformers`. The type
``shape`` (``dim``, and ``grid`` or ``patches``) stands for an encoder that `transformers` does not have.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn


def configuration(model: str) -> dict[str, Any] | None:
    """Return the configuration of a published model by its hub id (``facebook/opt-6.7b``), or None."""
    path = Path(str(files("mllm.recipes"))) / "models" / f"{model.replace('/', '--')}.yaml"
    if model.count("/") != 1 or not path.is_file():
        return None
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


class Shape(nn.Module):
    """An encoder of which only the shape of the features is known: enough for sizes, not for pictures.

    Args:
        dim: D_vis.
        grid: rows and columns of the patches, or None.
        patches: P, where there is no grid.
    """

    def __init__(self, *, dim: int, grid: tuple[int, int] | None = None, patches: int | None = None) -> None:
        super().__init__()
        assert grid or patches
        self.dim, self.grid = dim, grid and (grid[0], grid[1])
        self.num_patches = grid[0] * grid[1] if grid else int(patches or 0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features of the right shape and no content ``(B, P, D_vis)``."""
        return torch.zeros(len(pixels), self.num_patches, self.dim)
