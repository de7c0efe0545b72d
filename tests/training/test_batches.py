"""A batch in parts gives the sums of the whole, and each part its own pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm
from mllm.objectives.caption import Caption
from mllm.prompts.batch import IGNORED, collate
from mllm.prompts.pieces import Target, images_of
from mllm.testing import ENCODER_FAMILIES, tiny_image
from mllm.training.batches import POSITIONS, rows_at_once, split


def rows():
    one, two = tiny_image(1), tiny_image(2)
    return [
        ["a", one, Target(" cat")],
        ["no picture", Target(" at all")],
        [one, "and", two, Target(" dogs")],
        [two, Target(" x")],
        ["b", one, Target(" y")],
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_sum_to_the_whole(tiny_model, size):
    assembly = tiny_model()
    examples = rows()
    batch = collate([assembly.encode(pieces) for pieces in examples], assembly.lm.pad)
    features = assembly.features([image for pieces in examples for image in images_of(pieces)])

    def summed(features, batch):
        visual = None if features is None else assembly.connector(features)
        return assembly.lm.losses(assembly.embed(visual, batch), batch.mask, batch.labels).sum()

    parts = split(examples, features, batch, size=size)
    assert [pieces for part, _, _ in parts for pieces in part] == examples
    assert all(len(own.ids) <= size for _, _, own in parts)
    total = sum(summed(own, ids) for _, own, ids in parts)
    torch.testing.assert_close(total, summed(features, batch), atol=1e-4, rtol=1e-5)


VARYING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows of tiles": ({"tiles": {"kind": "anyres"}}, {"type": "linear"}),
    "one tile after another": ({"tiles": {"kind": "dynamic", "most": 4}}, {"type": "linear", "tokens": 4}),
    "frames": ({"type": "video", "most": 4}, {"type": "linear", "tokens": 4}),
    "cells": ({"type": "native", "merge": 2}, {"type": "mlp", "shuffle": 2}),
    "cells that are read together": ({"type": "native"}, {"type": "resampler", "tokens": 3, "heads": 2, "depth": 1}),
}


@pytest.mark.parametrize("name", VARYING)
def test_each_part_has_the_tiles_of_its_images(name, tiny_parts, tmp_path):
    """Images of different sizes, or videos of different lengths, have different numbers of them."""
    encoder, connector = VARYING[name]
    kind = encoder.get("type")
    folder = ENCODER_FAMILIES["siglip2-naflex"](tmp_path / "encoder") if kind == "native" else tiny_parts[0]
    named = {"of": {"model": folder}} if kind == "video" else {"model": folder}
    model: Any = mllm.assemble({**encoder, **named}, tiny_parts[1], connector, device="cpu")
    sizes = [(97, 33), (40, 31), (64, 64), (20, 90), (7, 9), (1, 1), (33, 32)]
    images: list[Any] = [tiny_image(seed, size) for seed, size in enumerate(sizes)]
    if kind == "video":
        images = [images[: number % 5 + 1] for number in range(len(images))]
    rows = [["See ", image, Target(" x y")] for image in images]
    rows += [[images[0], "and", images[2], Target(" z")], ["none", Target(" w")]]
    batch = collate([model.encode(pieces) for pieces in rows], model.lm.pad)
    shown = [image for pieces in rows for image in images_of(pieces)]
    features = torch.cat([model.encoded(model.encoder.tiles(image)) for image in shown])
    assert len(features) == model.tiles_of(shown) and len({model.tiles_of([image]) for image in images}) > 1

    def loss(rows, features, batch):
        return model(rows, features, batch, [Caption()])[0]

    parts = split(rows, features, batch, size=2, tiles=model.tiles_of)
    assert len(parts) == 5
    torch.testing.assert_close(sum(loss(*part) for part in parts), loss(rows, features, batch), atol=1e-3, rtol=1e-5)


def test_a_part_without_a_picture_has_no_features(tiny_model):
    assembly = tiny_model()
    text = [["no picture", Target(" at all")]] * 2
    batch = collate([assembly.encode(pieces) for pieces in text], assembly.lm.pad)
    assert [own for _, own, _ in split(text, None, batch, size=1)] == [None, None]
    assert (batch.labels != IGNORED).any()


def test_parts_are_even_and_no_larger_than_what_is_computed_at_once():
    for rows_, length in ((8, 230), (5, 400), (7, 3000), (1, 10), (33, 100)):
        full, half = (rows_at_once(rows_, length, dtype) for dtype in (torch.float32, torch.bfloat16))
        assert full == 1 or full * length <= POSITIONS
        assert half == 1 or half * length <= 2 * POSITIONS
        assert 1 <= full <= half <= rows_
        number = -(-rows_ // full)
        assert full - (rows_ - full * (number - 1)) < number  # the last is short by less than one row of each other
