"""Encode images at their native resolution: SigLIP 2 NaFlex, the towers of Qwen2-VL and Qwen2.5-VL, Pixtral.

The image processor of `transformers` decides the size that an image is resized to, so the number of its patches. It is
asked for it without any pixels: `measuring` returns a copy of it whose resizing makes an empty image.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses import FakeTensor
from transformers import AutoImageProcessor, AutoModel
from transformers.image_processing_backends import PilBackend

from mllm.encoders.base import PretrainedEncoder, layer_of
from mllm.encoders.native_forms import Form, form_of
from mllm.encoders.truncate import run_truncated, truncate
from mllm.errors import MLLMError
from mllm.hub import identity
from mllm.hub import loading as hub
from mllm.media.native import NativeResolution, cells_of, from_cells, most_cells, to_cells
from mllm.media.tiles import Grid, Size
from mllm.registry import Count

AT_ONCE = 4096  # patches of images of one size that are encoded together; a larger image is encoded alone


class NativeEncoder(PretrainedEncoder):
    """A vision tower that takes images of any size, as many patches as their size asks for, truncated after a layer.

    Features are those of the patches, in cells of ``merge`` x ``merge`` (`mllm.media.native`): ``(U, P, D_vis)`` with P
    the patches of a cell. Its inputs are patches, each followed by the rows and columns of its image's grid.

    Args:
        model: a Hub id or a folder.
        layer: an index into the hidden states; None: the model's last hidden state.
        max_patches: the most patches of an image; None: the image processor's.
        merge: the side of a cell, of which a connector with ``shuffle: merge`` makes one token; None: the model's own,
            else 1.
        init: ``random`` uses the architecture with randomly initialized weights (a control).
        seed: the seed of the random weights.
        trust_remote_code: run Python code from the model's repository.

    Raises:
        MLLMError: the model cannot be loaded, takes images of one size only, has no such layer, or cells of another
            size.
    """

    tiling: NativeResolution

    def __init__(
        self,
        *,
        model: str,
        layer: int | None = None,
        max_patches: Count | None = None,
        merge: Count | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        folder = hub.resolve(model, group="encoders")
        code: Any = {"trust_remote_code": trust_remote_code}
        load = partial(hub.load_model, AutoModel, folder, init=init, seed=seed, **code)
        self.model = load().get_encoder(modality="image").requires_grad_(False).eval()
        self.processor = hub.load_processor(AutoImageProcessor, folder, **code)
        self.form = form_of(self.model, model)
        self.merge = self._checked_merge(merge)
        budget, self.options = _budget(self.processor, max_patches, self.form.patch)
        most = most_cells(budget, self.merge, aligned=self.form.merge is not None)
        self.tiling = NativeResolution(self.merge, most, _measure(self.processor, self.form, self.options, budget))
        self.set_fingerprint(
            folder,
            init,
            configuration=identity.configuration(self.model.config),
            preprocessing=identity.preprocessing(self.processor),
        )
        self._states = {} if layer is None else {"output_hidden_states": True}
        self.grid, self.num_patches = (self.merge, self.merge), self.merge**2
        blank = self._blank()
        self.shape = tuple(blank.shape[1:])
        grid = self._grids(blank)[0]
        patches = self._patches(blank, grid)[None]
        if _has_values(blank) or not self.form.reads_values:
            _, truncated = truncate(self.model, lambda: self._raw(patches, grid))
            self._states = {} if truncated else self._states  # the forward pass ends before it returns them
        self.dim = int(self._encoded(patches, grid).shape[-1])

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features."""
        settings = {"layer": self.layer, "merge": self.merge, "options": self.options}
        return {**settings, "processor": self.processor.to_dict()}

    def preprocess(self, items: Sequence[Image.Image]) -> Tensor:
        """Return the cells ``(U, m * m, K + 2)`` of RGB images: patches, and the rows and columns of their grid."""
        return torch.cat([self._cells(image) for image in items])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(U, m * m, D_vis)`` of cells of whole images; images of one grid are encoded together."""
        grids = self._grids(pixels)
        cells = pixels.split([math.prod(cells_of(grid, self.merge)) for grid in grids])
        features: list[Tensor | None] = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            numbers = [number for number, other in enumerate(grids) if other == grid]
            size = max(1, AT_ONCE // math.prod(grid))
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                patches = torch.stack([self._patches(cells[number], grid) for number in part])
                states = self._as_cells(self._encoded(patches, grid), grid)
                for number, each in zip(part, states, strict=True):
                    features[number] = each
        return torch.cat([each for each in features if each is not None])

    def _encoded(self, patches: Tensor, grid: Grid) -> Tensor:
        """Return hidden states ``(B, n, D_vis)`` of patches ``(B, n, K)`` of images of one grid."""
        if not _has_values(patches) and self.form.reads_values:
            return self._estimated(patches)
        return self.form.states(run_truncated(partial(self._raw, patches, grid)), grid)

    def _raw(self, patches: Tensor, grid: Grid) -> Tensor:
        """Return the tower's output in use, of patches ``(B, n, K)`` of images of one grid."""
        patches = patches.to(self.model.device, self.model.dtype)
        output = self.model(**self.form.arguments(patches, grid), **self._states)
        return output.last_hidden_state if self.layer is None else layer_of(output.hidden_states, self.layer)

    def _estimated(self, patches: Tensor) -> Tensor:
        """Return hidden states without values, at the cost of the tower's matrices, of a tower that needs values."""
        states = patches.new_empty(patches.shape[0] * patches.shape[1], 1)
        for matrix in (weights.flatten(1) for weights in self.model.parameters() if weights.dim() > 1):
            states = states[:, :1].expand(-1, matrix.shape[1]) @ matrix.T
        return states[:, :1].expand(-1, self.form.width).unflatten(0, patches.shape[:2])

    def _cells(self, image: Image.Image) -> Tensor:
        self.tiling.of(image)  # which says what is wrong with a size that the processor refuses
        with torch.device("cpu"):
            inputs = _processed(self.processor, image, self.options)
            grid = self.form.grid(inputs)
            cells = self._as_cells(self.form.patches(inputs).float(), grid)
            return torch.cat([cells, torch.tensor(grid).expand(*cells.shape[:2], 2)], dim=-1)

    def _as_cells(self, patches: Tensor, grid: Grid) -> Tensor:
        """Return patches ``(..., n, K)`` in the tower's order as cells."""
        if self.form.merge is not None:
            return patches.unflatten(-2, (-1, self.merge**2))
        return to_cells(patches, grid, self.merge)

    def _patches(self, cells: Tensor, grid: Grid) -> Tensor:
        """Return an image's patches ``(n, K)`` in the tower's order, of its cells ``(U, m * m, K + 2)``."""
        values = cells[..., :-2]
        return values.flatten(0, 1) if self.form.merge is not None else from_cells(values, grid, self.merge)

    def _grids(self, pixels: Tensor) -> list[Grid]:
        """Return the grids of the images whose cells these are; without values, they are those of one image."""
        if not _has_values(pixels):
            return [(self.merge, self.merge * len(pixels))]
        sides = pixels[:, 0, -2:].round().long().tolist()
        grids: list[Grid] = []
        start = 0
        while start < len(sides):
            rows, columns = sides[start]
            grids.append((rows, columns))
            start += math.prod(cells_of((rows, columns), self.merge))
        return grids

    def _blank(self) -> Tensor:
        """Return the cells of a blank image, on the meta device without values."""
        if self.processor is not None:
            side = 2 * self.form.patch * self.merge
            cells = self._cells(Image.new("RGB", (side, side)))
            return cells.to(torch.get_default_device())
        config, patch = self.model.config, self.form.patch
        channels = getattr(config, "num_channels", getattr(config, "in_channels", 3))
        values = channels * patch**2 * getattr(config, "temporal_patch_size", 1)
        return torch.zeros(1, self.merge**2, values + 2)

    def _checked_merge(self, merge: int | None) -> int:
        own = self.form.merge
        if own is not None and merge not in (None, own):
            raise MLLMError(f"encoder.merge is {merge}, and this model's patches are in cells of {own}. Leave it out.")
        return own or merge or 1


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor is neither on the meta device nor one that a plan computes with."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _processed(processor: Any, image: Any, options: dict[str, Any]) -> Any:
    return processor(images=[image], return_tensors="pt", input_data_format="channels_last", **options)


def _budget(processor: Any, patches: int | None, patch: int) -> tuple[int, dict[str, Any]]:
    """Return the most patches of an image, and the options with which an image processor makes no more.

    Processors limit the number of patches (``max_num_patches``), the area in pixels (``size.longest_edge`` beside
    ``size.shortest_edge``), or the longest side (``size.longest_edge`` alone).

    Raises:
        MLLMError: there is no limit, or it cannot be set.
    """
    if processor is None and patches is not None:  # on the meta device
        return patches, {}
    if (own := getattr(processor, "max_num_patches", None)) is not None:
        return patches or int(own), {} if patches is None else {"max_num_patches": patches}
    size = dict(getattr(processor, "size", None) or {})
    longest, shortest = size.get("longest_edge"), size.get("shortest_edge")
    if longest is None:
        raise MLLMError(
            "The most patches of an image are unknown: the image processor of encoder.model has no limit. Set "
            "encoder.max_patches, or choose another model."
        )
    if shortest is not None:
        area = longest if patches is None else patches * patch**2
        return area // patch**2, {} if patches is None else {"size": {**size, "longest_edge": area}}
    side = longest if patches is None else math.isqrt(patches) * patch
    return math.ceil(side / patch) ** 2, {} if patches is None else {"size": {"longest_edge": side}}


def _measure(processor: Any, form: Form, options: dict[str, Any], most: int) -> Callable[[Size], Grid]:
    """Return a function from an image's size to its grid of patches, which remembers sizes."""
    measured = None if processor is None else measuring(processor)

    @functools.lru_cache(maxsize=65536)
    def grid_of(size: Size) -> Grid:
        if measured is None:  # without the processor's file, an image takes the most
            return 1, most
        with torch.device("cpu"):
            pixels = np.broadcast_to(np.zeros((), dtype=np.uint8), (size[1], size[0], 3))
            return form.grid(_processed(measured, pixels, options))

    return grid_of


def measuring(processor: Any) -> Any:
    """Return a copy of an image processor whose resizing makes an empty image of the new size."""
    copied = copy.copy(processor)
    copied.__class__ = type(type(processor).__name__, (type(processor), _Blank), {})
    return copied


class _Blank(PilBackend):
    def resize(self, image: Any, size: Any, *_: Any, **__: Any) -> Any:
        """Return zeros of the new size ``(C, H, W)``."""
        return np.zeros((image.shape[0], size.height, size.width), dtype=np.uint8)
