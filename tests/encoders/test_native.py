"""Test encoders of native resolution: the features that classes of `transformers` give, in batches, views, training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PixtralVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

import mllm
from mllm.build import encoder_of
from mllm.config.messages import checked
from mllm.config.parts import EncoderSpec
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.media.native import from_cells, most_cells, to_cells
from mllm.media.sizes import size_of
from mllm.planning.plan import plan
from mllm.slots import Inputs
from mllm.testing import tiny_encoder, tiny_lm

RANDOM = np.random.default_rng(0)
SIZES = [(97, 33), (40, 31), (31, 40), (64, 64), (20, 90), (300, 200), (7, 9), (1, 1), (6, 200), (200, 6), (33, 32)]
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
}


def qwen_processor(**size: int) -> Any:
    return Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 4 * 64, "longest_edge": 24 * 64, **size})


def siglip2() -> tuple[Any, Any]:
    shape: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    model = Siglip2VisionModel(Siglip2VisionConfig(**shape, patch_size=8, num_patches=16))
    return model, Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24)


def qwen2() -> tuple[Any, Any]:
    vision: dict[str, Any] = {
        "depth": 3,
        "embed_dim": 24,
        "hidden_size": 16,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 8,
    }
    return Qwen2VLModel(Qwen2VLConfig(vision_config=vision, text_config=TEXT)), qwen_processor()


def qwen25() -> tuple[Any, Any]:
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 24,
        "out_hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 48,
    }
    vision |= {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT)), qwen_processor()


def pixtral() -> tuple[Any, Any]:
    shape: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    model = PixtralVisionModel(PixtralVisionConfig(**shape, patch_size=8, image_size=48))
    return model, PixtralImageProcessorPil(patch_size={"height": 8, "width": 8}, size={"longest_edge": 48})


TOWERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "siglip2": siglip2,
    "qwen2": qwen2,
    "qwen2.5": qwen25,
    "pixtral": pixtral,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of the tiny models, whose weights are large enough for every patch to matter."""
    made = {}
    for name, tower in TOWERS.items():
        torch.manual_seed(0)
        model, processor = tower()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        folder = tmp_path_factory.mktemp("tower") / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        made[name] = str(folder)
    return made


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_lm(tmp_path_factory.mktemp("lm"), context=2048)


def encoder(folder: str, **options: Any) -> Any:
    return encoder_of(checked(EncoderSpec, {"type": "native", "model": folder, **options}), seed=0)


def merged(folder: str) -> dict[str, Any]:
    """Return the options of a connector that makes a token of each cell."""
    return {"type": "mlp", "shuffle": encoder(folder).merge}


def stock(name: str, folder: str, images: list[Any], layer: int | None = None) -> list[torch.Tensor]:
    """Return the features of images of different sizes in one batch, as the bare class gives them, one tensor each.

    Those of Qwen2.5-VL are compared by its merger's outputs, since its last hidden states are in an order of windows.
    """
    tower = TOWERS[name]
    model_class, processor_class = (type(part) for part in tower())
    model = model_class.from_pretrained(folder).eval()
    inputs = processor_class.from_pretrained(folder)(
        images=images, return_tensors="pt", input_data_format="channels_last"
    )
    with torch.no_grad():
        if name == "siglip2":
            output = model(**inputs, output_hidden_states=True)
            counts = inputs["spatial_shapes"].prod(1).tolist()
            states = output.last_hidden_state if layer is None else output.hidden_states[layer]
            return [row[:count] for row, count in zip(states, counts, strict=True)]
        if name == "pixtral":
            output = model(**inputs, output_hidden_states=True)
            counts = [(int(h) // 8) * (int(w) // 8) for h, w in inputs["image_sizes"]]
            states = output.last_hidden_state if layer is None else output.hidden_states[layer]
            return list(states[0].split(counts))
        output = model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], output_hidden_states=True)
        counts = inputs["image_grid_thw"].prod(1).tolist()
        if name == "qwen2":
            states = output.last_hidden_state if layer is None else output.hidden_states[layer]
            return list(states.split(counts))
        return list(output.pooler_output.split([count // 4 for count in counts]))


def comparable(name: str, folder: str, features: torch.Tensor) -> torch.Tensor:
    """Return our features of an image's cells as `stock` has them."""
    flat = features.flatten(0, 1)
    return Qwen2_5_VLModel.from_pretrained(folder).visual.merger(flat) if name == "qwen2.5" else flat


# Qwen's processor refuses an aspect ratio over 200; none of the sizes here has one.
@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_features_are_those_of_the_bare_class_in_a_batch_of_images_of_different_sizes(
    name: str, folders: dict[str, str]
) -> None:
    ours = encoder(folders[name])
    layouts = [ours.tiling.of(image) for image in IMAGES]
    features = ours(ours.preprocess(IMAGES)).split([layout.tiles for layout in layouts])
    expected = stock(name, folders[name], IMAGES)
    assert len({len(each) for each in expected}) > 3
    for own, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(comparable(name, folders[name], own), theirs, rtol=1e-4, atol=1e-5)
    for image, own in zip(IMAGES, features, strict=True):
        torch.testing.assert_close(ours(ours.preprocess([image])), own)


@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip2", "qwen2", "pixtral"])
@pytest.mark.parametrize("layer", [0, 1, -2])
def test_features_of_a_layer(name: str, layer: int, folders: dict[str, str]) -> None:
    ours = encoder(folders[name], layer=layer)
    features = ours(ours.preprocess(IMAGES[:6])).flatten(0, 1)
    torch.testing.assert_close(features, torch.cat(stock(name, folders[name], IMAGES[:6], layer)), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in encoder(folders[name]).parameters())
    with pytest.raises(MLLMError, match=r"encoder\.layer is 9"):
        encoder(folders[name], layer=9)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("patches", [None, 4, 9, 17, 100])
def test_the_number_of_patches_follows_from_the_size_and_the_budget(
    name: str, patches: int | None, folders: dict[str, str], tmp_path: Path
) -> None:
    ours = encoder(folders[name], max_patches=patches)
    processor = type(TOWERS[name]()[1]).from_pretrained(folders[name])
    options: dict[str, Any] = {}
    if patches is not None and name == "siglip2":
        options = {"max_num_patches": patches}
    elif patches is not None and name == "pixtral":
        options = {"size": {"longest_edge": int(patches**0.5) * 8}}
    elif patches is not None:
        options = {"size": {"shortest_edge": 4 * 64, "longest_edge": patches * 64}}
    for number, image in enumerate(IMAGES):
        image.save(path := tmp_path / f"{number}.png")
        try:
            inputs = processor(images=[image], return_tensors="pt", input_data_format="channels_last", **options)
        except ValueError:  # of Pixtral: an elongated image would have no height
            with pytest.raises(MLLMError, match="resized to none"):
                ours.tiling.of(image)
            continue
        if name == "siglip2":
            expected = int(inputs["spatial_shapes"].prod())
        elif name == "pixtral":
            expected = int(inputs["image_sizes"][0].div(8).prod())
        else:
            expected = int(inputs["image_grid_thw"].prod())
        for form in (image, path):
            assert ours.tiling.of(form).tiles * ours.num_patches == expected
        assert expected <= max(layout.tiles for layout in ours.tiling.fullest) * ours.num_patches
        assert len(ours.preprocess([image])) == ours.tiling.of(image).tiles


def test_cells_have_the_neighbouring_patches_and_zeros_at_the_edge() -> None:
    patches = torch.arange(1.0, 16)[:, None]  # 3 x 5
    cells = to_cells(patches, (3, 5), 2)
    expected = [[1, 2, 6, 7], [3, 4, 8, 9], [5, 0, 10, 0], [11, 12, 0, 0], [13, 14, 0, 0], [15, 0, 0, 0]]
    assert cells.squeeze(-1).tolist() == expected
    assert torch.equal(from_cells(cells, (3, 5), 2), patches)
    assert most_cells(24, 1, aligned=False) == 24 and most_cells(24, 2, aligned=True) == 6
    assert most_cells(7, 2, aligned=False) == 4  # 1 x 7


@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip2", "pixtral"])
def test_a_merge_groups_the_same_patches(name: str, folders: dict[str, str]) -> None:
    one, two = encoder(folders[name]), encoder(folders[name], merge=2)
    for image in IMAGES:
        plain, cells = one(one.preprocess([image])), two(two.preprocess([image]))
        pixels = one.preprocess([image])
        grid = tuple(int(side) for side in pixels[0, 0, -2:])
        torch.testing.assert_close(from_cells(cells, grid, 2), plain.flatten(0, 1))  # type: ignore[arg-type]


QUESTIONS = [["See ", image, ". It is"] for image in IMAGES] + [[IMAGES[0], "and", IMAGES[5], IMAGES[7], "are"], ["no"]]
CONNECTORS: dict[str, dict[str, Any]] = {
    "merged": {"type": "mlp", "shuffle": 2},
    "linear": {"type": "linear"},
    "resampler": {"type": "resampler", "tokens": 3, "heads": 2, "depth": 1},
    "qformer": {"type": "qformer", "tokens": 3, "dim": 16, "layers": 2, "heads": 2},
    "mapper": {"type": "mapper", "tokens": 3, "dim": 16, "layers": 1, "heads": 2, "ffn": 16},
    "crossed": {"type": "mapper", "tokens": 3, "dim": 16, "layers": 1, "heads": 2, "ffn": 16, "attention": "cross"},
    "expanded": {"type": "mapper", "tokens": 3, "dim": 16, "layers": 1, "heads": 2, "ffn": 16, "expand": 2},
}


def assembled(folder: str, lm: str, connector: str, **options: Any) -> Any:
    merge = {"merge": 2} if connector == "merged" else {}
    own = {"type": "native", "model": folder, **merge, **options}
    model = mllm.assemble(own, lm, CONNECTORS[connector], device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.connector.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


PAIRS = [("siglip2", name) for name in CONNECTORS] + [(name, "merged") for name in ("qwen2", "qwen2.5", "pixtral")]
PAIRS += [("qwen2", "resampler"), ("pixtral", "linear")]


@pytest.fixture(scope="module", params=PAIRS, ids=" ".join)
def model(request: pytest.FixtureRequest, folders: dict[str, str], lm: str) -> Any:
    name, connector = request.param
    return assembled(folders[name], lm, connector)


def test_a_batch_of_images_of_different_sizes_equals_its_prompts_one_by_one(model: Any) -> None:
    alone = [str(model.generate([prompt], max_new_tokens=6)[0]) for prompt in QUESTIONS]
    assert len(set(alone)) > 3
    assert list(map(str, model.generate(QUESTIONS, max_new_tokens=6))) == alone
    views = model.see_each([prompt[:-1] or prompt for prompt in QUESTIONS[:-1]])
    asked = views.continue_with([[prompt[-1]] for prompt in QUESTIONS[:-1]], max_new_tokens=6)
    assert [answers[0] for answers in asked] == alone[:-1]
    tokens = model.see_images(IMAGES)
    torch.testing.assert_close(
        tokens.flatten(0, -2), torch.cat([model.see_images([image]).flatten(0, -2) for image in IMAGES])
    )


def test_an_image_takes_as_many_tokens_as_patches_or_a_fixed_number(model: Any) -> None:
    for image in IMAGES:
        layout = model.tiling.of(image)
        expected = 3 if model.connector.reads_whole else layout.tiles
        assert model.encode([image]).visual.count(True) == expected <= model.tokens_per_image


def test_a_chat_has_images_of_different_sizes_in_any_turn(model: Any) -> None:
    """Every answer is that of the whole conversation at once, although the KV cache of earlier turns is kept."""
    chat = model.chat()
    turns = [("What?", [IMAGES[0], IMAGES[3]]), ("And now?", []), ("And this?", [IMAGES[4]]), ("Again?", [IMAGES[7]])]
    for text, images in turns:
        before = list(chat.messages)
        answer = chat.send(text, images, max_new_tokens=5)
        assert answer == model.chat(messages=before).send(text, images, max_new_tokens=5)


def test_what_reads_whole_images_reads_the_mean_of_their_cells(model: Any) -> None:
    features = FeatureStore(model)(IMAGES)
    inputs = Inputs(model, [[image] for image in IMAGES], features, None)
    means = torch.stack([FeatureStore(model)([image]).mean(0) for image in IMAGES])
    torch.testing.assert_close(inputs.features, means)
    torch.testing.assert_close(model.features(IMAGES), means)
    torch.testing.assert_close(model.overview(IMAGES), inputs.overview)
    assert inputs.overview is not None and len(inputs.overview) == len(IMAGES)
    if model.connector.reads_whole:
        torch.testing.assert_close(inputs.overview, inputs.visual)


def test_features_are_cached_by_image_and_budget(folders: dict[str, str], lm: str, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"max_patches": 9}, {"layer": 1}]
    models = [assembled(folders["siglip2"], lm, "linear", **each) for each in options]
    models.append(assembled(folders["siglip2"], lm, "merged"))
    assert len({features_folder(model) for model in models}) == 4
    store = FeatureStore(models[0], folder=tmp_path)
    computed = store(IMAGES)
    store.flush()
    read = FeatureStore(models[0], folder=tmp_path, chunk=3)
    models[0].encoder.forward = None  # nothing is computed again
    torch.testing.assert_close(read([*IMAGES[5:], *IMAGES[:5]]), computed.roll(-models[0].tiles_of(IMAGES[:5]), 0))


def test_saved_and_loaded_it_answers_alike(model: Any, tmp_path: Path) -> None:
    loaded = mllm.load(model.save(tmp_path / "saved"))
    assert list(map(str, loaded.generate(QUESTIONS, max_new_tokens=4))) == list(
        map(str, model.generate(QUESTIONS, max_new_tokens=4))
    )


@pytest.mark.parametrize("trained", ["connector", "encoder"])
@pytest.mark.parametrize("connector", ["merged", "resampler"])
def test_a_run_on_images_of_all_sizes(
    trained: str, connector: str, folders: dict[str, str], lm: str, tmp_path: Path
) -> None:
    """Features are cached, or the encoder is trained, too; an image that cannot be read is left out."""
    rows = []
    for number, image in enumerate(IMAGES * 2):
        image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"image {number} " + "word " * (number % 5)})
    (tmp_path / "bad.png").write_bytes(b"none")
    (tmp_path / "train.json").write_text(json.dumps([*rows, {"image": "bad.png", "caption": "x"}]))
    own = ", ".join(f"{key}: {value}" for key, value in CONNECTORS[connector].items())
    train = "{connector: 1.0e-3}" if trained == "connector" else "{connector: 1.0e-3, encoder.model: 1.0e-4}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: native
encoder: {{type: native, model: {folders["siglip2"]}{", merge: 2" if connector == "merged" else ""}}}
lm: {{model: {lm}}}
connector: {{{own}}}
data:
  train: {{format: table, path: {tmp_path}/train.json}}
  skip: 0.2
stages:
  - {{name: align, train: {train}, steps: 6, batch_size: 4}}
""")
    run = mllm.train(str(recipe), out=tmp_path / "run")
    assert run is not None and (tmp_path / "run/model").exists()
    stage = plan(str(recipe)).stages[0]
    assert stage.tokens_per_image == (3 if connector == "resampler" else most_cells(24, 2, aligned=False))
    assert mllm.load(tmp_path / "run").generate([QUESTIONS[0]], max_new_tokens=2)


@pytest.mark.parametrize("name", TOWERS)
def test_shapes_are_known_without_weights(name: str, folders: dict[str, str]) -> None:
    ours = encoder(folders[name])
    with torch.device("meta"):
        meta = encoder(folders[name])
        features = meta(torch.zeros(6, *meta.shape))
    assert (meta.dim, meta.shape, meta.num_patches, meta.grid) == (ours.dim, ours.shape, ours.num_patches, ours.grid)
    assert features.shape == (6, ours.num_patches, ours.dim) and meta.tiling == ours.tiling


BAD: dict[str, tuple[Any, str, str]] = {
    "too wide": (Image.new("RGB", (1000, 1)), "qwen2", "the image of 1000 x 1 pixels: .*aspect ratio.*Crop it"),
    "too high": (Image.new("RGB", (3, 900)), "qwen2.5", "the image of 3 x 900 pixels: .*aspect ratio"),
    "no file": (Path("no-such-image.png"), "siglip2", "no-such-image.png"),
    "no image": (b"none", "pixtral", "not a readable image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_in_one_message(name: str, folders: dict[str, str], lm: str) -> None:
    image, tower, message = BAD[name]
    model = assembled(folders[tower], lm, "merged")
    with pytest.raises(MLLMError, match=message):
        model.generate([["See ", image]])


def test_an_image_of_one_row_is_read_where_the_processor_takes_it(folders: dict[str, str]) -> None:
    image = Image.new("RGB", (1000, 1))
    ours = encoder(folders["siglip2"])
    assert size_of(image) == (1000, 1) and len(ours.preprocess([image])) == ours.tiling.of(image).tiles
    with pytest.raises(MLLMError, match="1000 x 1 pixels, which are resized to none"):
        encoder(folders["pixtral"]).preprocess([image])


def test_what_does_not_fit_is_one_message(folders: dict[str, str], lm: str, tmp_path: Path) -> None:
    plain = tiny_encoder(tmp_path / "vit")
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"model": plain}, {}, "no encoder of native resolution"),
        ({"model": folders["qwen2"], "merge": 3}, {}, r"encoder\.merge is 3.*cells of 2"),
        ({"model": folders["siglip2"], "max_patches": 0}, {}, "max_patches"),
        ({"model": folders["siglip2"]}, {"connector": {"type": "mapper", "positions": True}}, "Mapper reads a fixed"),
        ({"model": folders["siglip2"]}, {"connector": {"type": "temporal", "frames": 1}}, "Temporal reads a fixed"),
        ({"model": folders["siglip2"]}, {"adapters": [{"type": "gated"}]}, "gated.*number varies"),
        ({"model": folders["siglip2"]}, {"connector": {"type": "linear", "shuffle": 2}}, r"connector\.shuffle is 2"),
    ]
    for own, options, message in cases:
        with pytest.raises(MLLMError, match=message):
            mllm.assemble({"type": "native", **own}, lm, **{"connector": "linear", **options}, device="cpu")
    with pytest.raises(MLLMError, match=r"encoder\.of: .*different numbers of features"):
        encoder_of(
            checked(EncoderSpec, {"type": "video", "of": {"type": "native", "model": folders["siglip2"]}}), seed=0
        )
