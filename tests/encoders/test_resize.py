"""Test how images become squares: as in the image processors of `transformers`, by default the model's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    LevitImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
)

import mllm
from mllm.build import encoder_of
from mllm.config import loading
from mllm.config.messages import checked
from mllm.config.parts import EncoderSpec
from mllm.encoders.preprocess import normalized_pixels, square
from mllm.errors import MLLMError
from mllm.testing import ENCODER_FAMILIES, tiny_image

RANDOM = np.random.default_rng(0)
SIZES = [(40, 31), (31, 40), (97, 33), (33, 98), (15, 9), (7, 200), (64, 64), (32, 32), (1, 3)]
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
SIDE: dict[str, Any] = {"height": 32, "width": 32}
SHORTEST: dict[str, Any] = {"shortest_edge": 32}


def built(**values: Any) -> Any:
    return encoder_of(checked(EncoderSpec, values), seed=0)


def expected_pixels(processor: Any) -> Tensor:
    return torch.cat([processor(images=[image], return_tensors="pt")["pixel_values"] for image in IMAGES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that returns the folder of a tiny model, with another image processor if one is given."""
    vit = ENCODER_FAMILIES["vit"](tmp_path_factory.mktemp("vit"))

    def of(processor: Any = None, family: str = "vit") -> str:
        if family != "vit":
            return ENCODER_FAMILIES[family](tmp_path_factory.mktemp(family))
        place = tmp_path_factory.mktemp("other")
        shutil.copytree(vit, place, dirs_exist_ok=True)
        if processor is not None:
            processor.save_pretrained(place)
        return str(place)

    return of


OWN = {
    "CLIP-crops": (CLIPImageProcessorPil(size=SHORTEST, crop_size=SIDE), "crop"),
    "CLIP-crops-a-part": (CLIPImageProcessorPil(size={"shortest_edge": 37}, crop_size=SIDE), "own"),
    "CLIP-without-crop": (CLIPImageProcessorPil(size=SIDE, do_center_crop=False), "stretch"),
    "SigLIP-stretches": (SiglipImageProcessorPil(size=SIDE), "stretch"),
    "LLaVA-pads": (LlavaImageProcessorPil(size=SHORTEST, crop_size=SIDE, do_pad=True), "pad"),
    "LLaVA-pads-with-another-color": (
        LlavaImageProcessorPil(size=SHORTEST, crop_size=SIDE, do_pad=True, image_mean=[0.1, 0.9, 0.3]),
        "pad",
    ),
    "LLaVA-crops": (LlavaImageProcessorPil(size=SHORTEST, crop_size=SIDE), "crop"),
    "DeiT-stretches-and-crops": (DeiTImageProcessorPil(size={"height": 36, "width": 36}, crop_size=SIDE), "own"),
    "ConvNeXt-crops-by-percentage": (ConvNextImageProcessorPil(size=SHORTEST), "own"),
    "LeViT": (LevitImageProcessorPil(size=SHORTEST, crop_size=SIDE), "own"),
}


@pytest.mark.parametrize("name", OWN)
def test_by_default_the_pixels_are_those_of_the_models_own_processor(name: str, folder: Callable[..., str]) -> None:
    processor, resize = OWN[name]
    encoder = built(model=folder(processor))
    assert torch.equal(encoder.preprocess(IMAGES), expected_pixels(processor))
    assert encoder.resize == encoder.settings()["resize"] == resize


@pytest.mark.parametrize("family", sorted({*ENCODER_FAMILIES} - {"siglip2-naflex", "dinov3", "dinov3-convnext"}))
def test_every_family_has_its_own_pixels(family: str, folder: Callable[..., str]) -> None:
    path = folder(family=family)
    expected = expected_pixels(AutoImageProcessor.from_pretrained(path, backend="pil"))
    encoder = built(model=path)
    assert torch.equal(encoder.preprocess(IMAGES), expected)
    prepared = torch.cat([encoder.prepared([image]) for image in IMAGES])  # one by one, as threads do
    assert prepared.dtype == (torch.float32 if encoder.resize == "own" else torch.uint8)
    assert torch.equal(encoder(prepared), encoder(expected))


@pytest.mark.parametrize("family", ["dinov3", "siglip2-naflex"])
def test_a_model_whose_processor_gives_no_square_is_stretched(family: str, folder: Callable[..., str]) -> None:
    path = folder(family=family)
    encoder = built(model=path)
    assert encoder.resize == "stretch"
    assert torch.equal(encoder.preprocess(IMAGES), built(model=path, resize="stretch").preprocess(IMAGES))


@pytest.mark.parametrize(
    ("resize", "processor"),
    [
        ("stretch", SiglipImageProcessorPil(size=SIDE)),
        ("crop", CLIPImageProcessorPil(size=SHORTEST, crop_size=SIDE)),
        ("pad", LlavaImageProcessorPil(size=SHORTEST, crop_size=SIDE, do_pad=True)),
    ],
)
@pytest.mark.parametrize("own", ["stretch", "crop", "pad"])
def test_each_way_is_that_of_a_processor_whatever_the_models_own_is(
    resize: str, processor: Any, own: str, folder: Callable[..., str]
) -> None:
    same = {name: getattr(processor, name) for name in ("image_mean", "image_std", "resample")}
    own_processor = {
        "stretch": SiglipImageProcessorPil(size=SIDE, **same),
        "crop": CLIPImageProcessorPil(size=SHORTEST, crop_size=SIDE, **same),
        "pad": LlavaImageProcessorPil(size=SHORTEST, crop_size=SIDE, do_pad=True, **same),
    }[own]
    encoder = built(model=folder(own_processor), resize=resize)
    assert torch.equal(encoder.preprocess(IMAGES), expected_pixels(processor))


@pytest.mark.parametrize("resolution", [16, 48])
@pytest.mark.parametrize("name", ["CLIP-crops", "CLIP-crops-a-part", "SigLIP-stretches", "LLaVA-pads"])
def test_the_models_own_way_at_another_resolution(name: str, resolution: int, folder: Callable[..., str]) -> None:
    processor, resize = OWN[name]
    scaled = processor.to_dict()
    for key in ("size", "crop_size"):
        if scaled.get(key):
            scaled[key] = {edge: round(length * resolution / 32) for edge, length in scaled[key].items()}
    encoder = built(model=folder(processor), resolution=resolution)
    assert torch.equal(encoder.preprocess(IMAGES), expected_pixels(type(processor).from_dict(scaled)))
    assert encoder.resize == resize


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_models_of_other_libraries_get_the_pixels_of_transformers(resize: Any) -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    processor = {
        "stretch": CLIPImageProcessorPil(size=SIDE, do_center_crop=False),
        "crop": CLIPImageProcessorPil(size=SHORTEST, crop_size=SIDE),
        "pad": LlavaImageProcessorPil(size=SHORTEST, crop_size=SIDE, do_pad=True),
    }[resize]
    pixels = normalized_pixels(IMAGES, 32, resize, mean, std, "bicubic")
    torch.testing.assert_close(pixels, expected_pixels(processor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_an_image_of_any_shape_takes_little_memory(resize: Any, folder: Callable[..., str]) -> None:
    thin = Image.new("RGB", (1, 64_000_000), (10, 20, 30))
    assert square(thin, 32, resize, None).size == (32, 32)
    wide = Image.new("RGB", (20_000, 3_000), (10, 20, 30))
    middle = square(wide, 32, resize, None, (0.5, 0.5, 0.5)).getpixel((16, 16))
    assert middle == (10, 20, 30)
    own = built(model=folder(OWN["CLIP-crops-a-part"][0])).preprocess([thin, wide])
    assert own.shape == (2, 3, 32, 32)


def test_the_features_of_each_way_have_a_cache_of_their_own(folder: Callable[..., str]) -> None:
    path = folder(OWN["CLIP-crops-a-part"][0])
    keys = {
        json.dumps(built(model=path, resize=way).settings(), default=str) for way in ("stretch", "crop", "pad", None)
    }
    assert len(keys) == 4


def test_an_unknown_way_is_named(folder: Callable[..., str]) -> None:
    with pytest.raises(MLLMError, match=r"resize.*'stretch', 'crop' or 'pad'"):
        built(model=folder(), resize="squash")


def test_the_members_of_a_fused_encoder_have_their_own(folder: Callable[..., str], tmp_path: Path) -> None:
    path = folder(OWN["CLIP-crops"][0])
    encoder = built(fuse="sequence", of=[{"model": path, "resize": "pad"}, {"model": path}])
    assert [member.resize for member in encoder.of] == ["pad", "crop"]


def without_resize(values: Any) -> Any:
    """Return the content of a file as it was written before there was the key."""
    if isinstance(values, dict):
        return {key: without_resize(value) for key, value in values.items() if key != "resize"}
    return [without_resize(value) for value in values] if isinstance(values, list) else values


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_that_was_saved_before_there_was_a_choice_stays_stretched(
    fused: bool, folder: Callable[..., str], tiny_parts: tuple[str, str], tmp_path: Path
) -> None:
    encoder: dict[str, Any] = {"model": folder(OWN["CLIP-crops"][0])}
    if fused:
        encoder = {"fuse": "width", "of": [encoder, encoder]}
    model = mllm.assemble(encoder, tiny_parts[1], {"type": "linear", "tokens": 4})
    label = model.save(tmp_path / "model") / "assembly.json"

    def ways() -> list[str]:
        opened = mllm.load(tmp_path / "model").encoder
        return [member.resize for member in (opened.of if fused else [opened])]

    assert set(ways()) == {"crop"}
    label.write_text(json.dumps(without_resize(json.loads(label.read_text()))))
    assert set(ways()) == {"stretch"}
    if not fused:
        pixels = mllm.load(tmp_path / "model").encoder.preprocess(IMAGES)
        processor = CLIPImageProcessorPil(size=SIDE, do_center_crop=False)
        assert torch.equal(pixels, expected_pixels(processor))


def test_a_run_that_was_started_before_there_was_a_choice_is_continued_stretched(
    folder: Callable[..., str], tiny_parts: tuple[str, str], tmp_path: Path
) -> None:
    tiny_image(1).save(tmp_path / "1.png")
    (tmp_path / "train.json").write_text(json.dumps([{"image": "1.png", "caption": "one"}]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: old
encoder: {{model: {folder(OWN["CLIP-crops"][0])}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{train: {{format: table, path: {tmp_path}/train.json}}}}
stages: [{{name: one, train: {{connector: 0.01}}, steps: 1, batch_size: 1}}]
""")

    def interrupted(name: str) -> Path:
        """Return a run that was stopped before its first checkpoint."""
        run = tmp_path / name
        run.mkdir()
        (run / "recipe.yaml").write_text(loading.dump(loading.load(str(recipe))))
        return run

    def way(run: Path) -> str:
        return str(mllm.load(run).encoder.resize)

    new, old, changed = (interrupted(name) for name in ("new", "old", "changed"))
    for run in (old, changed):
        written = yaml.safe_load((run / "recipe.yaml").read_text())
        (run / "recipe.yaml").write_text(yaml.safe_dump(without_resize(written)))
    mllm.train(str(recipe), resume=new)
    mllm.train(str(recipe), resume=old)
    assert (way(new), way(old)) == ("crop", "stretch")
    with pytest.raises(MLLMError, match=r"encoder\.resize: 'stretch' -> 'crop'"):
        mllm.train(str(recipe), ["encoder.resize=crop"], resume=changed)
