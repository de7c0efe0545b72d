"""Define the tiles of an image, and put their visual tokens into the image's order; `mllm.media.tilings` cuts them.

An image's size alone decides its tiles and how many tokens it takes, so both are known before anything is decoded.

Shapes: I images, U tiles of all of them, Q visual tokens of a tile, N visual tokens of all images, D their width.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mllm.errors import MLLMError
from mllm.media.sizes import label_of, size_of

ELONGATED = 200  # the largest aspect ratio of an image that is cut into tiles
Size = tuple[int, int]  # width, height
Grid = tuple[int, int]  # rows, columns
TOLERATED = 1.1  # a grid's sides may exceed those of its limit by this factor
REDUCED = "1 d h w -> h w d"


@dataclass(frozen=True)
class Layout:
    """The tiles of one image: a grid of them, row by row, and one that shows the whole image.

    Args:
        size: width and height of the image.
        grid: rows and columns of the tiles.
        tiles: their number, that of the whole image included.
        whole: the index of the tile that shows the whole image; None: they are cells of the image, none of which does.
        unpad: the grid's visual tokens are put in rows over all tiles, without those of the padding, and each row ends
            with a newline token; the whole image is the first tile. False: the tokens of one tile after another.
        limit: with ``unpad``, grids with clearly more visual tokens than so many tiles are reduced to about that many.
    """

    size: Size
    grid: Grid
    tiles: int
    whole: int | None
    unpad: bool
    limit: int | None = None

    def count(self, tokens: int, grid: Grid | None) -> int:
        """Return how many visual tokens the image takes, where a tile has ``tokens``, in a ``grid`` or in none."""
        if not self.unpad or grid is None:
            return self.tiles * tokens
        rows, columns = self.reduced(grid) or map(len, self.covered(grid))
        return tokens + rows * (columns + 1)

    def arranged(self, tokens: Tensor, grid: Grid | None, newline: Tensor | None) -> Tensor:
        """Return the image's visual tokens ``(N, D)``, of those of its tiles ``(tiles, Q, D)``; see `in_order`."""
        if not self.unpad or grid is None:
            return tokens.flatten(0, 1)
        assert newline is not None
        cells = rearrange(tokens[1:], "(r c) (h w) d -> (r h) (c w) d", r=self.grid[0], h=grid[0])
        rows, columns = self.covered(grid)
        cells = cells[rows.start : rows.stop, columns.start : columns.stop]
        if (reduced := self.reduced(grid)) is not None:
            cells = rearrange(interpolate(rearrange(cells, "h w d -> 1 d h w"), reduced, mode="bilinear"), REDUCED)
        lines = torch.cat([cells, newline.to(cells).expand(len(cells), 1, -1)], dim=1)
        return torch.cat([tokens[0], lines.flatten(0, 1)])

    def reduced(self, grid: Grid) -> Grid | None:
        """Return the rows and columns that the grid's visual tokens are reduced to; None: they are kept."""
        if self.limit is None:
            return None
        rows, columns = map(len, self.covered(grid))
        ratio = math.sqrt(rows * columns / (self.limit * grid[0] * grid[1]))
        return (max(int(rows // ratio), 1), max(int(columns // ratio), 1)) if ratio > TOLERATED else None

    def covered(self, grid: Grid) -> tuple[range, range]:
        """Return the rows and columns of visual tokens that show the image and not its padding."""
        (width, height), rows, columns = self.size, self.grid[0] * grid[0], self.grid[1] * grid[1]
        top = left = 0
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            left = (columns - int(round(width * (rows / height), 7))) // 2
        return range(top, rows - top), range(left, columns - left)


class Cutting(ABC):
    """How images are divided into units: tiles or segments of a video, which are encoded by themselves, or cells.

    Attributes:
        joint: whether the units are cells of an image that is encoded as a whole (`mllm.media.native`).
    """

    joint = False

    def of(self, image: Any) -> Layout:
        """Return the units of an image in any accepted form, of which no pixel is decoded; a layout is returned.

        Raises:
            MLLMError: it cannot be read, or not be divided.
        """
        return image if isinstance(image, Layout) else self.measured(image)

    @abstractmethod
    def measured(self, image: Any) -> Layout:
        """Return the units of an image in any accepted form; see `of`."""

    @abstractmethod
    def cut(self, image: Any) -> list[Any]:
        """Return an opened image's units."""

    @property
    @abstractmethod
    def fullest(self) -> Sequence[Layout]:
        """Layouts, among which is one that takes as many tokens as any image."""

    def within(self, tokens: int) -> Cutting:
        """Return the same for a connector that makes so many visual tokens of a unit."""
        return self


@dataclass(frozen=True)
class Tiling(Cutting):
    """How images are cut into tiles.

    Args:
        side: of the square tiles, in pixels.
        resample: the resampling filter of PIL; None: PIL's default.
    """

    side: int
    resample: int | None

    @abstractmethod
    def grid(self, size: Size) -> Grid:
        """Return the grid of tiles of an image with a size."""

    @abstractmethod
    def layout(self, size: Size) -> Layout:
        """Return the tiles of an image with a size."""

    @abstractmethod
    def grids(self) -> Sequence[Grid]:
        """Return all grids that an image can have."""

    @abstractmethod
    def cut(self, image: Image.Image) -> list[Image.Image]:
        """Return an RGB image's tiles."""

    def measured(self, image: Any) -> Layout:
        """Return the tiles of an image in any accepted form; of a file only the header is read.

        Raises:
            MLLMError: it cannot be read, or is too elongated.
        """
        width, height = size = size_of(image)
        if max(size) > ELONGATED * min(size):
            raise MLLMError(
                f"{label_of(image)}: {width} x {height} pixels, and images with an aspect ratio of at most {ELONGATED} "
                "are cut into tiles (encoder.tiles). Crop it."
            )
        return self.layout(size)

    @functools.cached_property
    def fullest(self) -> list[Layout]:
        """A layout of every grid, of images that fill it: no image takes more tokens than one of these."""
        return [self.layout((columns * self.side, rows * self.side)) for rows, columns in self.grids()]

    def whole(self, image: Image.Image) -> Image.Image:
        """Return the tile that shows a whole RGB image."""
        return image.resize((self.side, self.side), self.resample)

    def _split(self, canvas: Image.Image) -> list[Image.Image]:
        side = self.side
        corners = [(x, y) for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
        return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def whole_images(values: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
    """Return the rows ``(I, ...)`` of the tiles that show whole images, of the rows ``(U, ...)`` of all tiles.

    Of an image without such a tile it is the mean over its cells. ``layouts``: of the images; None: they are not cut,
    and each has one row.
    """
    if layouts is None:
        return values
    if any(layout.whole is None for layout in layouts):
        return torch.stack([rows.mean(0) for rows in values.split([layout.tiles for layout in layouts])])
    starts = accumulate((layout.tiles for layout in layouts), initial=0)
    rows = [start + (layout.whole or 0) for start, layout in zip(starts, layouts, strict=False)]
    return values[torch.tensor(rows, device=values.device)]


def in_order(tokens: Tensor, layouts: Sequence[Layout], grid: Grid | None, newline: Tensor | None) -> Tensor:
    """Return images' visual tokens ``(N, D)``, one image after another, of those of their tiles ``(U, Q, D)``.

    Args:
        tokens: of the tiles.
        layouts: of the images.
        grid: rows and columns of a tile's tokens, or None.
        newline: the token ``(D,)`` that ends a row, or None where no layout has rows.
    """
    parts = tokens.split([layout.tiles for layout in layouts])
    arranged = [layout.arranged(part, grid, newline) for part, layout in zip(parts, layouts, strict=True)]
    return torch.cat(arranged)
