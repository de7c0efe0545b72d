"""Compute what objectives read of a batch: features, visual tokens, ids; each once for all of them.

Shapes: I images, U tiles of them (each image is one, unless `encoder.tiles` cuts it), P patches and Q visual tokens of
a tile, N visual tokens of all images, D_vis and D_lm the widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mllm.media.tiles import Layout, whole_images
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece, images_of
from mllm.prompts.questions import for_units

if TYPE_CHECKING:  # named in signatures alone: the model stands above this page
    from mllm.model import Model


class Inputs:
    """A batch as objectives see it.

    Args:
        model: the model that trains.
        rows: the training examples, as interleaved prompts.
        tiles: features ``(U, P, D_vis)`` of all tiles of their images in reading order, or None where there are none.
        batch: the rows as ids, padded; None where the model has no language model.
    """

    def __init__(self, model: Model, rows: Sequence[Sequence[Piece]], tiles: Tensor | None, batch: Batch | None):
        self.model, self.rows, self.tiles, self.batch = model, rows, tiles, batch
        self.shared: dict[str, Any] = {}  # what one objective computed and another needs too

    @cached_property
    def layouts(self) -> list[Layout] | None:
        """The tiles of each image; None where images are not cut."""
        return self.model.layouts([image for pieces in self.rows for image in images_of(pieces)])

    @cached_property
    def questions(self) -> list[str] | None:
        """The question of each image; None where the connector reads images alone."""
        return self.model.questions(self.rows)

    @cached_property
    def features(self) -> Tensor | None:
        """The features ``(I, P, D_vis)`` of the whole images."""
        return self.tiles if self.tiles is None else whole_images(self.tiles, self.layouts)

    @cached_property
    def visual(self) -> Tensor | None:
        """The visual tokens in the sequence, ``(I, Q, D_lm)`` or, of images that are cut, ``(N, D_lm)``."""
        return self._connected if self._connected is None else self.model.in_order(self._connected, self.layouts)

    @cached_property
    def overview(self) -> Tensor | None:
        """The visual tokens ``(I, Q, D_lm)`` of the whole images."""
        return self._whole(self._connected)

    @cached_property
    def before_words(self) -> Tensor | None:
        """The same before the connector's vocabulary, if it has one, replaces them."""
        return self._whole(self._unreplaced)

    def _whole(self, tokens: Tensor | None) -> Tensor | None:
        return tokens if tokens is None else self.model.whole(tokens, self.layouts)

    @cached_property
    def _connected(self) -> Tensor | None:
        """The connector's output ``(U, Q, D_lm)``, computed once for all objectives."""
        vocabulary = getattr(self.model.connector, "vocabulary", None)
        if self.tiles is None or vocabulary is None:
            return None if self.tiles is None else self.model.connect(self.tiles, self.layouts, self.questions)
        return vocabulary(self._unreplaced)

    @cached_property
    def _unreplaced(self) -> Tensor | None:
        connector = self.model.connector
        if self.tiles is None or getattr(connector, "vocabulary", None) is None:
            return self._connected
        asked = for_units(connector, self.questions, self.layouts)
        return connector.before_words(self.model.arranged(self.tiles, self.layouts), *asked)
