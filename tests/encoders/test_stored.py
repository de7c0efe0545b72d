"""Test precomputed features as an encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mllm
from mllm.build import encoder_of
from mllm.config.messages import checked
from mllm.config.parts import EncoderSpec
from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.testing import tiny_encoder, tiny_image, tiny_lm


def built(**values: Any) -> Any:
    return encoder_of(checked(EncoderSpec, {"type": "features", **values}), seed=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two images and, for each way to name tensors, a file of their features."""
    (tmp_path / "images" / "val").mkdir(parents=True)
    rows: dict[str, dict[str, torch.Tensor]] = {"name": {}, "stem": {}, "path": {}, "content": {}}
    for index, name in enumerate(("cat.png", "dog.png")):
        path = tmp_path / "images" / "val" / name
        tiny_image(index).save(path)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        names = {"name": name, "stem": name[:3], "path": f"val/{name}", "content": content}
        for by in names:
            rows[by][names[by]] = torch.full((4, 6), float(index))
    for by, tensors in rows.items():
        save_file(tensors, tmp_path / f"{by}.safetensors")
    return tmp_path


@pytest.mark.parametrize("by", ["name", "stem", "path", "content"])
def test_features_of_an_image_are_looked_up(folder: Path, by: str) -> None:
    encoder = built(path=f"{folder}/{by}.safetensors", by=by, root=f"{folder}/images", grid=[2, 2])
    images = [folder / "images" / "val" / name for name in ("dog.png", "cat.png")]
    items = [encoder.open(image) for image in images]
    features = encoder(encoder.preprocess(items))
    assert features[:, 0, 0].tolist() == [1.0, 0.0]
    assert (encoder.num_patches, encoder.dim, encoder.grid) == (4, 6, (2, 2))
    assert torch.equal(encoder.open(ImageFile(images[0])), items[0])
    assert encoder.open(items[0]) is items[0]


def test_a_model_trains_on_stored_features_with_the_same_readers(folder: Path) -> None:
    rows = "".join(f"val/{name}.png,a {name}\n" for name in ("cat", "dog"))
    (folder / "train.csv").write_text(f"image,caption\n{rows}")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"""
name: stored
encoder: {{type: features, path: {folder}/name.safetensors}}
lm: {{model: {tiny_lm(folder / "lm")}}}
connector: {{type: linear}}
data: {{train: {{format: table, path: {folder}/train.csv, images: {folder}/images}}}}
stages: [{{name: align, train: {{connector: 1.0e-2}}, steps: 2, batch_size: 2}}]
""")
    from mllm.planning.check import problems

    assert problems(str(recipe)) == []
    run = mllm.train(str(recipe), out=folder / "run")
    model = mllm.load(run.path)
    assert str(model.generate([[folder / "images" / "val" / "cat.png", "It is"]], max_new_tokens=2)[0]) is not None


def test_features_written_by_the_cache_can_be_used(folder: Path, tmp_path: Path) -> None:
    from mllm.encoders.feature_store import FeatureStore

    model = mllm.assemble(tiny_encoder(tmp_path / "encoder"), tiny_lm(tmp_path / "lm"))
    store = FeatureStore(model, folder=tmp_path / "cached")
    images = sorted((folder / "images" / "val").iterdir())
    features = store(images)
    store.flush()
    encoder = built(path=str(tmp_path / "cached"), by="content")
    assert torch.equal(encoder.preprocess([encoder.open(image) for image in images]), features)


def test_missing_features_are_named(folder: Path) -> None:
    encoder = built(path=f"{folder}/name.safetensors")
    with pytest.raises(MLLMError, match=r"no features called 'cat\.jpg' .*Did you mean 'cat\.png'"):
        encoder.open(Path("cat.jpg"))
    with pytest.raises(MLLMError, match=r"in memory has no name.*encoder\.by=content"):
        encoder.open(tiny_image())
    with pytest.raises(MLLMError, match=r"outside of encoder\.root"):
        built(path=f"{folder}/path.safetensors", by="path", root="/else").open(Path("cat.png"))
    for values, message in (
        ({"path": f"{folder}/none"}, "no such file"),
        ({"path": f"{folder}/images"}, r"a folder without \*\.safetensors files"),
        ({"path": f"{folder}/images/val/cat.png"}, "not a readable safetensors file"),
        ({"path": str(folder), "by": "nam"}, "encoder.by is 'nam'"),
        ({"path": f"{folder}/name.safetensors", "grid": [3, 3]}, "has 4 features per image"),
    ):
        with pytest.raises(MLLMError, match=message):
            built(**values)
    save_file({"cat.png": torch.zeros(1)}, folder / "duplicate.safetensors")
    with pytest.raises(MLLMError, match=r"both contain features of 'cat\.png'"):
        built(path=str(folder))
