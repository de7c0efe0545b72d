"""Cut an image into tiles of an encoder's input size, and put their visual tokens into the image's order.

Two published ways: any resolution (LLaVA-NeXT) and dynamic resolution (InternVL 1.5, arXiv:2404.16821). An image's size
alone decides its tiles and how many tokens it takes, so both are known before anything is decoded.

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
from PIL import Image
from torch import Tensor

from mllm.errors import MLLMError
from mllm.media.sizes import label_of, size_of

ELONGATED = 200  # the largest aspect ratio of an image that is cut into tiles
Size = tuple[int, int]  # width, height
Grid = tuple[int, int]  # rows, columns


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
    """

    size: Size
    grid: Grid
    tiles: int
    whole: int | None
    unpad: bool

    def count(self, tokens: int, grid: Grid | None) -> int:
        """Return how many visual tokens the image takes, where a tile has ``tokens``, in a ``grid`` or in none."""
        if not self.unpad or grid is None:
            return self.tiles * tokens
        rows, columns = self.covered(grid)
        return tokens + len(rows) * (len(columns) + 1)

    def order(self, tokens: int, grid: Grid | None) -> Tensor:
        """Return the image's visual tokens as indices into those of its tiles ``(tiles * tokens)``; -1: a newline."""
        if not self.unpad or grid is None:
            return torch.arange(self.tiles * tokens, device="cpu")
        cells = torch.arange(tokens, self.tiles * tokens, device="cpu").view(*self.grid, *grid)
        whole_grid = cells.transpose(1, 2).reshape(self.grid[0] * grid[0], self.grid[1] * grid[1])
        rows, columns = self.covered(grid)
        kept = whole_grid[rows.start : rows.stop, columns.start : columns.stop]
        lines = torch.cat([kept, kept.new_full((len(rows), 1), -1)], dim=1)
        return torch.cat([torch.arange(tokens, device="cpu"), lines.flatten()])

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


@dataclass(frozen=True)
class AnyResolution(Tiling):
    """LLaVA-NeXT: the image keeps its aspect ratio, and is padded to the grid that keeps most of its pixels.

    Args:
        choices: the grids; of equally good ones the first.
        unpad: see `Layout`.
    """

    choices: tuple[Grid, ...]
    unpad: bool = True

    def grids(self) -> Sequence[Grid]:
        """Return all grids that an image can have."""
        return self.choices

    def grid(self, size: Size) -> Grid:
        """Return the grid that keeps most of the image's pixels, and of those the one with the least padding."""
        width, height = size

        def quality(grid: Grid) -> tuple[int, int]:
            rows, columns = grid[0] * self.side, grid[1] * self.side
            scale = min(columns / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - rows * columns

        return max(self.choices, key=quality)

    def layout(self, size: Size) -> Layout:
        """Return the tiles of an image with a size: the whole image, then the grid."""
        rows, columns = grid = self.grid(size)
        return Layout(size, grid, 1 + rows * columns, 0, self.unpad)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """Return an RGB image's tiles."""
        rows, columns = self.grid(image.size)
        width, height = columns * self.side, rows * self.side
        across, down = width / image.width, height / image.height
        if across < down:
            size = width, min(math.ceil(image.height * across), height)
        else:
            size = min(math.ceil(image.width * down), width), height
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize(size, self.resample), ((width - size[0]) // 2, (height - size[1]) // 2))
        return [self.whole(image), *self._split(canvas)]


@dataclass(frozen=True)
class DynamicResolution(Tiling):
    """InternVL: the image is stretched to the grid whose aspect ratio is closest; several tiles end with a thumbnail.

    Args:
        least: the smallest number of tiles of the grid.
        most: the largest.
    """

    least: int
    most: int

    def grids(self) -> Sequence[Grid]:
        """Return all grids that an image can have, those with few tiles first."""
        return _grids_of(self.least, self.most)

    def grid(self, size: Size) -> Grid:
        """Return the grid of the closest aspect ratio, and of equal ones the largest that is not too large.

        That is the last one with less than twice as many pixels as the image.
        """
        width, height = size
        best, difference = (1, 1), math.inf
        for rows, columns in self.grids():
            other = abs(width / height - columns / rows)
            if other < difference or (other == difference and width * height > 0.5 * self.side**2 * rows * columns):
                best, difference = (rows, columns), other
        return best

    def layout(self, size: Size) -> Layout:
        """Return the tiles of an image with a size: the grid, then the whole image if the grid has several."""
        rows, columns = grid = self.grid(size)
        tiles = rows * columns + (grid != (1, 1))
        return Layout(size, grid, tiles, tiles - 1, unpad=False)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """Return an RGB image's tiles."""
        rows, columns = self.grid(image.size)
        tiles = self._split(image.resize((columns * self.side, rows * self.side), self.resample))
        return tiles if len(tiles) == 1 else [*tiles, self.whole(image)]


@functools.cache
def _grids_of(least: int, most: int) -> list[Grid]:
    """Return all grids of ``least`` to ``most`` tiles, by their number, then by columns."""
    sides = range(1, most + 1)
    grids = [(rows, columns) for columns in sides for rows in sides if least <= rows * columns <= most]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


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
    number, flat = tokens.shape[1], tokens.flatten(0, 1)
    orders, start = [], 0
    for layout in layouts:
        order = layout.order(number, grid)
        orders.append(torch.where(order < 0, len(flat), order + start))
        start += layout.tiles * number
    if newline is not None:
        flat = torch.cat([flat, newline[None].to(flat.dtype)])
    return flat[torch.cat(orders).to(flat.device)]
