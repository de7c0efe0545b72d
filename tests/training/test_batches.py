"""A batch in parts gives the sums of the whole, and each part its own pictures."""

from __future__ import annotations

import pytest
import torch

from mllm.prompts.batch import IGNORED, collate
from mllm.prompts.pieces import Target, images_of
from mllm.testing import tiny_image
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
