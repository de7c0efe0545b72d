"""Test augmented images: drawn from a seed alone, as torchvision draws them, and different in each step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageOps

from mllm.config import loading
from mllm.config.data import AugmentSpec, Data, DataSpec
from mllm.config.prompt import PromptSpec
from mllm.data.augmentation import Augmented, augmented, random_box
from mllm.data.items import Item
from mllm.data.sources import Source
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.prompts.pieces import images_of
from mllm.testing import tiny_image


@pytest.fixture
def file(tmp_path: Path) -> ImageFile:
    tiny_image(0).save(tmp_path / "a.png")
    return ImageFile(tmp_path / "a.png")


def test_crops_have_a_uniform_area_and_a_log_uniform_aspect_ratio() -> None:
    draws, size = 4000, (120, 80)
    boxes = [random_box(size, (0.5, 1.0), random.Random(seed)) for seed in range(draws)]
    ours = np.array([(left, top, right - left, bottom - top) for left, top, right, bottom in boxes])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    numbers = np.random.default_rng(0)
    area, aspect = (
        9600 * numbers.uniform(0.5, 1, 9 * draws),
        np.exp(numbers.uniform(np.log(3 / 4), np.log(4 / 3), 9 * draws)),
    )
    sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1).round()
    sides = sides[(sides <= size).all(1)][:draws]
    corners = (numbers.uniform(size=(draws, 2)) * (np.array(size) - sides + 1)).astype(int)
    theirs = np.concatenate([corners, sides], 1)
    deviation = theirs.std(0) * (2 / draws) ** 0.5  # of the difference of two means
    assert (abs(ours.mean(0) - theirs.mean(0)) < 4 * deviation).all()
    assert (abs(ours.std(0) - theirs.std(0)) < 4 * deviation).all()


@pytest.mark.parametrize(("size", "box"), [((400, 10), (193, 0, 206, 10)), ((10, 400), (0, 193, 10, 206))])
def test_an_image_that_no_crop_fits_into_is_cropped_at_its_center(size: Any, box: Any) -> None:
    assert random_box(size, (1.0, 1.0), random.Random(0)) == box  # aspect ratios 4:3 and 3:4


def test_an_image_is_mirrored_as_often_as_it_is_asked(file: ImageFile) -> None:
    whole = file.open()
    opened = [Augmented(file, str(seed), None, 0.3).open() for seed in range(400)]
    mirrored = [image.tobytes() == ImageOps.mirror(whole).tobytes() for image in opened]
    assert all(image.tobytes() == whole.tobytes() or flipped for image, flipped in zip(opened, mirrored, strict=True))
    assert 0.22 < sum(mirrored) / 400 < 0.38


def test_equal_keys_are_equal_pixels(file: ImageFile) -> None:
    images = [Augmented(file, str(seed), (0.3, 0.9), 0.5) for seed in (1, 1, 2, 3)]
    keys = [image.key() for image in images]
    pixels = [image.open().tobytes() for image in images]
    assert keys[0] == keys[1] and pixels[0] == pixels[1]
    assert len(set(keys)) == len(set(pixels)) == 3


def test_texts_stay_and_each_image_of_an_example_is_changed_differently(file: ImageFile) -> None:
    pieces = augmented([file, "a", file], AugmentSpec(crop=(0.5, 1.0)), "seed")
    assert pieces[1] == "a" and pieces[0] != pieces[2]


def test_a_stream_repeats_its_images_and_changes_them_in_every_epoch(file: ImageFile) -> None:
    items = [Item(str(index), (file,), ("a",)) for index in range(3)]
    data = Data.model_validate({"augment": {"crop": [0.5, 1.0], "flip": 0.5}})

    def images(done: int) -> list[Any]:
        stream = Stream([Source(DataSpec(format="x"), items)], PromptSpec(), seed=4, data=data)
        stream.skip(done, 3)
        return [images_of(row)[0] for row in stream.take(6)]

    assert images(0) == images(0)
    assert images(1)[:3] == images(0)[3:]
    assert len({image.key() for image in images(0)}) == 6


@pytest.mark.parametrize("augment", [{"crop": [0.9, 0.5]}, {"crop": [0, 1]}, {"flip": 2}, {"rotate": 1}])
def test_what_cannot_be_is_refused_when_the_recipe_is_read(augment: dict[str, Any]) -> None:
    with pytest.raises(MLLMError, match="augment"):
        loading.load("mapl", {"data.augment": augment})


def test_features_of_changed_images_are_not_cached() -> None:
    stage = loading.load("mapl", {"data.augment": {"flip": 0.5}}).stages[0]
    assert stage.feature_cache.mode == "off"
    with pytest.raises(MLLMError, match=r"data\.augment"):
        loading.load("mapl", {"data.augment": {"flip": 0.5}, "cache": "on"})
