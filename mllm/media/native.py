"""Divide images into the patches that an encoder of native resolution makes of them, grouped into cells.

A cell is a square of patches that one visual token is made of (2 x 2 with a merge, or a single patch). The number of
cells follows from the image's size. Cells at the right and lower edge are filled with zeros where patches are missing.

Shapes: I images, U cells of all of them, m the side of a cell, n patches of an image, K values of a patch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from mllm.errors import MLLMError
from mllm.media.sizes import label_of, size_of
from mllm.media.tiles import Cutting, Grid, Layout, Size

LONG_SIDES = (199, 4000, 64_000)  # pixels of images that are measured for the most tokens of any
RATIOS = (1, 14, 199)


@dataclass(frozen=True)
class NativeResolution(Cutting):
    """The cells of images; those of an image are encoded together.

    Args:
        merge: m.
        most: the cells of an image that fills the budget of patches.
        measure: returns the grid of patches of an image with a size, or raises a `ValueError` that says why there is
            none.
    """

    merge: int
    most: int
    measure: Callable[[Size], Grid] = field(repr=False, compare=False)
    joint = True

    def measured(self, image: Any) -> Layout:
        """Return the cells of an image; of a file only the header is read.

        Raises:
            MLLMError: it cannot be read, or the image processor refuses its size.
        """
        width, height = size = size_of(image)
        try:
            grid = self.measure(size)
        except ValueError as error:
            raise MLLMError(f"{label_of(image)}: {width} x {height} pixels: {error}. Crop it.") from None
        if not math.prod(grid):
            raise MLLMError(f"{label_of(image)}: {width} x {height} pixels, which are resized to none. Crop it.")
        return _layout(*cells_of(grid, self.merge))

    def cut(self, image: Any) -> list[Any]:
        """Return the image, which is encoded as a whole."""
        return [image]

    @cached_property
    def fullest(self) -> list[Layout]:
        """The layout of an image that fills the budget, and those of elongated ones, which may exceed it."""
        layouts = [_layout(1, self.most)]
        for long, ratio in itertools.product(LONG_SIDES, RATIOS):
            for size in ((long, max(1, long // ratio)), (max(1, long // ratio), long)):
                with contextlib.suppress(ValueError):
                    layouts.append(_layout(*cells_of(self.measure(size), self.merge)))
        return layouts


def _layout(rows: int, columns: int) -> Layout:
    return Layout(size=(columns, rows), grid=(rows, columns), tiles=rows * columns, whole=None, unpad=False)


def cells_of(grid: Grid, merge: int) -> Grid:
    """Return the rows and columns of cells of a grid of patches."""
    return math.ceil(grid[0] / merge), math.ceil(grid[1] / merge)


def most_cells(patches: int, merge: int, *, aligned: bool) -> int:
    """Return the most cells of any grid of so many patches; ``aligned``: its sides are multiples of a cell's."""
    if aligned:
        return patches // merge**2
    grids = ((rows, patches // rows) for rows in range(1, patches + 1))
    return max(math.prod(cells_of(grid, merge)) for grid in grids)


def to_cells(patches: Tensor, grid: Grid, merge: int) -> Tensor:
    """Return an image's patches ``(..., n, K)`` in reading order as cells ``(..., U, m * m, K)``, filled with zeros."""
    rows, columns = cells_of(grid, merge)
    image = patches.unflatten(-2, grid)
    image = pad(image, (0, 0, 0, columns * merge - grid[1], 0, rows * merge - grid[0]))
    return rearrange(image, "... (r a) (c b) k -> ... (r c) (a b) k", a=merge, b=merge)


def from_cells(cells: Tensor, grid: Grid, merge: int) -> Tensor:
    """Return the patches ``(..., n, K)`` in reading order of an image's cells ``(..., U, m * m, K)``."""
    rows, columns = cells_of(grid, merge)
    image = rearrange(cells, "... (r c) (a b) k -> ... (r a) (c b) k", r=rows, c=columns, a=merge, b=merge)
    return image[..., : grid[0], : grid[1], :].flatten(-3, -2)


def together(features: Tensor, layouts: Sequence[Layout]) -> Tensor:
    """Return the features ``(I, P, D)`` of images of those of their cells ``(U, m * m, D)``, padded with zeros."""
    images = [cells.flatten(0, 1) for cells in features.split([layout.tiles for layout in layouts])]
    longest = max(map(len, images))
    return torch.stack([pad(image, (0, 0, 0, longest - len(image))) for image in images])
