"""Give vision towers of native resolution their inputs, by the arguments of their forward.

There are three forms: ``spatial_shapes`` (patches of each image, padded), ``grid_thw`` (the patches of all images in
one sequence, cell by cell) and ``image_sizes`` (pixels, padded). Here images of one grid are encoded at a time, so
nothing is padded.

Shapes: B images of one grid, n patches of each, K values of a patch, D.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from mllm.errors import MLLMError
from mllm.media.tiles import Grid


class Form:
    """How a tower takes patches; one with a grid for each image, padded and masked (SigLIP 2 NaFlex).

    Args:
        model: the vision tower.

    Attributes:
        merge: the side of a cell, if patches are in an order of cells; None: in reading order.
        reads_values: whether the tower computes with a tensor of grids, which has no values on the meta device.
    """

    argument = "spatial_shapes"
    reads_values = True
    merge: int | None = None

    def __init__(self, model: Any) -> None:
        self.model, self.patch = model, int(model.config.patch_size)

    @property
    def width(self) -> int:
        """Return the width of the hidden states, as the configuration names it."""
        config = self.model.config
        return int(getattr(config, "embed_dim", config.hidden_size))

    def grid(self, inputs: Any) -> Grid:
        """Return the grid of the one image that an image processor returned."""
        rows, columns = (int(side) for side in inputs["spatial_shapes"][0])
        return rows, columns

    def patches(self, inputs: Any) -> Tensor:
        """Return the patches ``(n, K)`` of the one image that an image processor returned, in the tower's order."""
        rows, columns = self.grid(inputs)
        patches: Tensor = inputs["pixel_values"][0, : rows * columns]
        return patches

    def arguments(self, patches: Tensor, grid: Grid) -> dict[str, Any]:
        """Return the tower's arguments for patches ``(B, n, K)``."""
        shapes = torch.tensor([grid] * len(patches), device="cpu")
        return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}

    def states(self, states: Tensor, grid: Grid) -> Tensor:
        """Return a tower's hidden states as ``(B, n, D)``, in the order of the patches."""
        return states


class Sequence(Form):
    """The patches of all images in one sequence, cell by cell (Qwen2-VL)."""

    argument = "grid_thw"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.merge = int(model.config.spatial_merge_size)

    def grid(self, inputs: Any) -> Grid:
        """Return the grid of the one image that an image processor returned."""
        _, rows, columns = (int(side) for side in inputs["image_grid_thw"][0])
        return rows, columns

    def patches(self, inputs: Any) -> Tensor:
        """Return the patches ``(n, K)`` of the one image that an image processor returned."""
        patches: Tensor = inputs["pixel_values"]
        return patches

    def arguments(self, patches: Tensor, grid: Grid) -> dict[str, Any]:
        """Return the tower's arguments for patches ``(B, n, K)``."""
        device = "cpu" if patches.is_meta else patches.device
        grids = torch.tensor([(1, *grid)] * len(patches), device=device)
        return {"hidden_states": patches.flatten(0, 1), "grid_thw": grids}

    def states(self, states: Tensor, grid: Grid) -> Tensor:
        """Return a tower's hidden states as ``(B, n, D)``; those of one that attends in windows are put in order."""
        count = grid[0] * grid[1]
        window = getattr(self.model, "window_size", None)
        if window is not None and self.merge is not None:
            grids = torch.tensor([(1, *grid)] * (len(states) // count), device="cpu")
            index, _ = get_vision_window_index(grids, self.merge, window, self.patch)
            cells = states.unflatten(0, (-1, self.merge**2))
            states = cells[torch.as_tensor(index).argsort().to(states.device)].flatten(0, 1)
        return states.unflatten(0, (-1, count))


class Pixels(Form):
    """The pixels of each image, padded (Pixtral)."""

    argument = "image_sizes"
    reads_values = False

    def grid(self, inputs: Any) -> Grid:
        """Return the grid of the one image that an image processor returned."""
        rows, columns = (int(side) // self.patch for side in inputs["image_sizes"][0])
        return rows, columns

    def patches(self, inputs: Any) -> Tensor:
        """Return the patches ``(n, K)`` of the one image that an image processor returned."""
        size = self.patch
        return rearrange(inputs["pixel_values"][0], "c (h a) (w b) -> (h w) (c a b)", a=size, b=size)

    def arguments(self, patches: Tensor, grid: Grid) -> dict[str, Any]:
        """Return the tower's arguments for patches ``(B, n, K)``."""
        rows, columns = grid
        size = {"h": rows, "w": columns, "a": self.patch, "b": self.patch}
        pixels = rearrange(patches, "i (h w) (c a b) -> i c (h a) (w b)", **size)
        return {"pixel_values": pixels, "image_sizes": [tuple(pixels.shape[2:])] * len(pixels)}

    def states(self, states: Tensor, grid: Grid) -> Tensor:
        """Return a tower's hidden states as ``(B, n, D)``."""
        return states[0].unflatten(0, (-1, grid[0] * grid[1]))


FORMS: tuple[type[Form], ...] = (Form, Sequence, Pixels)


def form_of(model: Any, name: str) -> Form:
    """Return how a vision tower takes patches.

    Raises:
        MLLMError: in none of the known ways.
    """
    arguments = inspect.signature(model.forward).parameters
    for form in FORMS:
        if form.argument in arguments:
            return form(model)
    raise MLLMError(
        f"encoder.type is native, and the forward of {name!r} takes none of "
        f"{', '.join(form.argument for form in FORMS)}: it is no encoder of native resolution. Set "
        "encoder.type=transformers."
    )
