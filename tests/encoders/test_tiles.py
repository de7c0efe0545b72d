"""Test images that are cut into tiles: as `transformers` cuts and joins them, in batches, views, chats and training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AddedToken,
    AutoModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    ViTImageProcessorPil,
)

import mllm
from mllm.build import build
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.media.images import ImageBytes, ImageFile, open_image
from mllm.media.sizes import size_of
from mllm.model import Model
from mllm.objectives.contrastive import PatchContrastive
from mllm.planning.data_check import inspect
from mllm.planning.plan import plan
from mllm.prompts.pieces import Target
from mllm.slots import Inputs
from mllm.testing import tiny_lm

SIDE = 32
RANDOM = np.random.default_rng(0)
# Landscape, portrait, square, smaller than a tile, a pixel, both ends of what is accepted, and equally good grids.
SIZES = [(97, 33), (40, 31), (31, 40), (64, 64), (20, 90), (300, 200), (7, 9), (1, 1), (400, 2), (2, 400), (33, 32)]
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # LLaVA-NeXT's, for tiles of 32 pixels
SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def randomized(module: Any, seed: int = 0) -> Any:
    """Draw all weights anew, biases and newline tokens too, which are zero or small otherwise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_lm(tmp_path_factory.mktemp("lm"), context=4096)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    randomized(CLIPVisionModel(CLIPVisionConfig(**SHAPE, image_size=SIDE, patch_size=8))).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def internvit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("internvit")
    config = InternVLVisionConfig(**SHAPE, image_size=[SIDE, SIDE], patch_size=[8, 8])
    randomized(InternVLVisionModel(config)).save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def anyres(clip: str, lm: str) -> Any:
    encoder = {"model": clip, "layer": -2, "tiles": {"kind": "anyres"}}
    model = mllm.assemble(encoder, lm, {"type": "mlp"}, device="cpu")
    randomized(model.connector, seed=1)
    return model


@pytest.fixture(scope="module")
def dynamic(internvit: str, lm: str) -> Any:
    encoder = {"model": internvit, "layer": -1, "tiles": {"kind": "dynamic", "most": 6}}
    connector = {"type": "mlp", "shuffle": 2, "input_norm": True}
    model = mllm.assemble(encoder, lm, connector, device="cpu")
    randomized(model.connector, seed=1)
    return model


def with_tokens(model: Model, names: list[str]) -> tuple[Any, int]:
    """Return a copy of the tokenizer with further tokens, and the id of the first."""
    tokenizer = copy.deepcopy(model.lm.tokenizer)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(names[0]))


def fill(stock: Any, model: Model) -> None:
    """Give a class of `transformers` the model's weights."""
    stock.model.vision_tower.load_state_dict(AutoModel.from_pretrained(model.spec.encoder.model).state_dict())
    stock.resize_token_embeddings(model.lm.model.config.vocab_size)
    stock.model.language_model.load_state_dict(model.lm.model.model.state_dict())
    stock.lm_head.load_state_dict(model.lm.model.lm_head.state_dict())
    projector = stock.model.multi_modal_projector
    layers = [layer for layer in model.connector.body if isinstance(layer, torch.nn.Linear)]
    projector.linear_1.load_state_dict(layers[0].state_dict())
    projector.linear_2.load_state_dict(model.connector.project.state_dict())


@pytest.fixture(scope="module")
def llava_next(anyres: Any) -> tuple[Any, Any]:
    tokenizer, image = with_tokens(anyres, ["<image>"])
    text = anyres.lm.model.config.to_dict()
    config = LlavaNextConfig(
        vision_config=anyres.encoder.whole().config,
        text_config={**text, "vocab_size": len(tokenizer)},
        image_token_index=image,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    stock = LlavaNextForConditionalGeneration(config).eval()
    fill(stock, anyres)
    stock.resize_token_embeddings(len(tokenizer))
    stock.model.image_newline.data.copy_(anyres.connector.newline)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    return stock, LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="module")
def internvl(dynamic: Any) -> Any:
    config = InternVLConfig(
        vision_config=dynamic.encoder.whole().config,
        text_config={**dynamic.lm.model.config.to_dict(), "vocab_size": dynamic.lm.model.config.vocab_size + 1},
        image_token_id=dynamic.lm.model.config.vocab_size,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        vision_feature_layer=-1,
    )
    stock = InternVLForConditionalGeneration(config).eval()
    fill(stock, dynamic)
    stock.resize_token_embeddings(config.image_token_id + 1)
    (norm,) = [layer for layer in dynamic.connector.body if isinstance(layer, torch.nn.LayerNorm)]
    stock.model.multi_modal_projector.layer_norm.load_state_dict(norm.state_dict())
    return stock


def ours(model: Model, pieces: list[Any], image: int) -> tuple[list[int], torch.Tensor]:
    """Return the ids of a prompt, with one for each visual token, and its logits."""
    encoded = model.encode(pieces)
    ids = [image if visual else token for token, visual in zip(encoded.ids, encoded.visual, strict=True)]
    embeds, batch = model.prepare([pieces])
    return ids, model.lm.logits(embeds, batch.mask)[0]


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(IMAGES)))
def test_any_resolution_is_that_of_llava_next(anyres: Any, llava_next: Any, number: int) -> None:
    stock, processor = llava_next
    images = [IMAGES[number], IMAGES[0]]
    inputs = processor(images=images, text="See <image> and <image>. It is", return_tensors="pt")
    ids, logits = ours(anyres, ["See ", images[0], " and ", images[1], ". It is"], processor.image_token_id)
    assert ids == inputs["input_ids"][0].tolist()
    tiles = [anyres.encoder.preprocess(anyres.encoder.tiles(image)) for image in images]
    for own, theirs in zip(tiles, inputs["pixel_values"], strict=True):
        torch.testing.assert_close(own, theirs[: len(own)], rtol=0, atol=1e-6)
        assert not theirs[len(own) :].any()  # padding, up to the most tiles of the batch
    torch.testing.assert_close(logits, stock(**inputs).logits[0, :, : logits.shape[1]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(IMAGES)))
def test_dynamic_resolution_is_that_of_internvl(dynamic: Any, internvl: Any, number: int) -> None:
    images = [IMAGES[number], IMAGES[0]]
    processor = GotOcr2ImageProcessorPil.from_pretrained(
        dynamic.spec.encoder.model, crop_to_patches=True, min_patches=1, max_patches=6
    )
    inputs = processor(images=images, return_tensors="pt")
    pixels = torch.cat([dynamic.encoder.preprocess(dynamic.encoder.tiles(image)) for image in images])
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=0, atol=1e-6)
    token = internvl.config.image_token_id
    ids, logits = ours(dynamic, [images[0], "a ", images[1], "b"], token)
    first, second = (4 * int(number) for number in inputs["num_patches"])  # as InternVLProcessor counts them
    assert ids == [token] * first + dynamic.lm.tokenize("a ") + [token] * second + dynamic.lm.tokenize("b")
    theirs = internvl(input_ids=torch.tensor([ids]), pixel_values=inputs["pixel_values"]).logits[0]
    torch.testing.assert_close(logits, theirs[:, : logits.shape[1]], rtol=1e-4, atol=1e-4)


QUESTIONS = [["See ", image, ". It is"] for image in IMAGES] + [[IMAGES[0], "and", IMAGES[5], IMAGES[7], "are"], ["no"]]


@pytest.fixture(params=["anyres", "dynamic"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_a_batch_of_images_of_different_sizes_equals_its_prompts_one_by_one(model: Any) -> None:
    alone = [str(model.generate([prompt], max_new_tokens=6)[0]) for prompt in QUESTIONS]
    assert len(set(alone)) > 3
    assert list(map(str, model.generate(QUESTIONS, max_new_tokens=6))) == alone
    views = model.see_each([prompt[:-1] or prompt for prompt in QUESTIONS[:-1]])
    asked = views.continue_with([[prompt[-1]] for prompt in QUESTIONS[:-1]], max_new_tokens=6)
    assert [answers[0] for answers in asked] == alone[:-1]
    for prompt, view in zip(QUESTIONS, views, strict=False):
        assert view.continue_with(prompt[-1], max_new_tokens=6) == alone[QUESTIONS.index(prompt)]


def test_a_view_is_continued_with_an_image_of_another_size(model: Any) -> None:
    whole = [IMAGES[0], "and ", IMAGES[4], " differ in"]
    view = model.see([IMAGES[0], "and "]).see([IMAGES[4]])
    assert view.continue_with(" differ in", max_new_tokens=6) == str(model.generate([whole], max_new_tokens=6)[0])


def test_a_chat_has_images_of_different_sizes_in_any_turn(model: Any) -> None:
    """Every answer is that of the whole conversation at once, although the KV cache of earlier turns is kept."""
    chat = model.chat()
    turns = [("What?", [IMAGES[0], IMAGES[3]]), ("And now?", []), ("And this?", [IMAGES[4]]), ("Again?", [IMAGES[7]])]
    for text, images in turns:
        before = list(chat.messages)
        answer = chat.send(text, images, max_new_tokens=5)
        assert answer == model.chat(messages=before).send(text, images, max_new_tokens=5)
    assert chat._cache is not None  # the first turns are in it


def test_objectives_on_whole_images_read_the_tile_that_shows_all_of_it(model: Any) -> None:
    """As an encoder without tiles gives it, whose images are stretched."""
    plain = mllm.assemble(
        {**model.spec.encoder.model_dump(exclude={"tiles"}), "resize": "stretch"},
        model.spec.lm.model,
        model.spec.connector.model_dump(),
        device="cpu",
    )
    plain.connector.load_state_dict(model.connector.state_dict(), strict=False)
    rows = [[image, Target(f" {number}")] for number, image in enumerate(IMAGES)]
    tiles = model.features([tile for image in IMAGES for tile in model.encoder.tiles(image)])
    inputs, others = Inputs(model, rows, tiles, None), Inputs(plain, rows, plain.features(IMAGES), None)
    torch.testing.assert_close(inputs.features, others.features)
    torch.testing.assert_close(PatchContrastive()(inputs), PatchContrastive()(others))
    torch.testing.assert_close(model.features(IMAGES), others.features)
    torch.testing.assert_close(FeatureStore(model).whole(IMAGES), others.features)


def test_features_are_cached_by_image_and_tiling(clip: str, lm: str, tmp_path: Path) -> None:
    def built(**tiles: Any) -> Any:
        return mllm.assemble({"model": clip, "tiles": tiles or None}, lm, "mlp", device="cpu")

    three = [built(kind="anyres"), built(kind="dynamic"), built(kind="dynamic", most=2), built()]
    assert len({features_folder(model) for model in three}) == 4
    model = three[0]
    store = FeatureStore(model, folder=tmp_path)
    computed = store(IMAGES)
    store.flush()
    read = FeatureStore(model, folder=tmp_path, chunk=3)
    model.encoder.forward = None  # nothing is computed again
    torch.testing.assert_close(read([*IMAGES[5:], *IMAGES[:5]]), computed.roll(-model.tiles_of(IMAGES[:5]), 0))


@pytest.fixture
def recipe(clip: str, lm: str, tmp_path: Path) -> str:
    """A recipe on images of all sizes, of which one cannot be cut and one is no image."""
    rows = []
    for number, image in enumerate(IMAGES * 2):
        image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"image {number} " + "word " * (number % 5)})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    Image.new("RGB", (1000, 1)).save(tmp_path / "long.png")
    (tmp_path / "bad.png").write_bytes(b"none")
    bad = [{"image": f"{name}.png", "caption": "x"} for name in ("long", "bad")]
    (tmp_path / "bad.json").write_text(json.dumps([*rows, *bad]))
    text = f"""
name: tiles
encoder: {{model: {clip}, tiles: {{kind: anyres}}}}
lm: {{model: {lm}}}
connector: {{type: mlp}}
data:
  train: {{format: table, path: {tmp_path}/train.json}}
  val: {{format: table, path: {tmp_path}/train.json}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - {FIRST}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


FIRST = "{name: align, train: {connector: 0.01}, steps: 6, batch_size: 4, validate_every: 3}"


def losses(run: Any) -> list[float]:
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_training_learns_the_newline_and_a_saved_model_has_it(recipe: str, tmp_path: Path) -> None:
    run = mllm.train(recipe, out=tmp_path / "a")
    model = mllm.load(run.path, device="cpu")
    fresh = build(model.spec, device="cpu").connector.newline
    assert model.connector.newline.shape == (32,) and not torch.equal(model.connector.newline, fresh)
    again = mllm.load(model.save(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.connector.newline, model.connector.newline, rtol=0, atol=0)
    assert losses(run)[-1] < losses(run)[0]
    assert str(again.generate([QUESTIONS[0]])[0]) == str(model.generate([QUESTIONS[0]])[0])


def test_a_stage_may_begin_to_cut_images(recipe: str, clip: str, tmp_path: Path) -> None:
    """As LLaVA-NeXT is trained: the connector of the stage before is trained further, and not scaled anew."""
    Path(recipe).write_text(
        Path(recipe).read_text().replace(", tiles: {kind: anyres}", ", resize: stretch")
        + f"  - {{name: cut, train: {{connector: 1.0e-9}}, steps: 1, batch_size: 2, "
        f"encoder: {{model: {clip}, tiles: {{kind: anyres}}}}}}\n"
    )
    run = mllm.train(recipe, out=tmp_path / "both")
    first = mllm.train(recipe, [f"stages=[{FIRST}]"], out=tmp_path / "first")
    both, one = mllm.load(run.path, device="cpu"), mllm.load(first.path, device="cpu")
    assert both.encoder.tiling is not None and one.encoder.tiling is None and one.connector.newline is None
    for name, tensor in one.trained_state().items():
        torch.testing.assert_close(both.trained_state()[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [["data.group_by_length=2"], ["data.pack=900"], ["data.max_length=300", "data.truncate=text"], ["cache=off"]],
)
def test_a_batch_is_put_together_in_any_way(recipe: str, tmp_path: Path, changes: list[str]) -> None:
    """Grouping changes the order of examples; packing and the cache change nothing but the speed."""
    run = mllm.train(recipe, changes, out=tmp_path / "changed")
    plain = mllm.train(recipe, out=tmp_path / "plain")
    if changes[0].startswith(("data.pack", "cache")):
        assert losses(run) == pytest.approx(losses(plain), rel=1e-3)
    assert len(losses(run)) == 6


def test_the_encoder_may_train(recipe: str, tmp_path: Path) -> None:
    run = mllm.train(recipe, ["stages.0.train.encoder=0.001", "stages.0.steps=3"], out=tmp_path / "a")
    assert len(losses(run)) == 3


def test_images_that_cannot_be_cut_are_left_out_and_reported(recipe: str, tmp_path: Path) -> None:
    changes = [f"data.train.path={tmp_path}/bad.json", "data.skip=0.2", "data.group_by_length=2", "stages.0.steps=12"]
    run = mllm.train(recipe, changes, out=tmp_path / "a")
    log = (run.path / "log.jsonl").read_text()
    assert "long.png: 1000 x 1 pixels" in log and "bad.png" in log
    reports, _ = inspect(recipe, changes)
    problems = "\n".join(reports[0].problems)
    assert "1 images cannot be cut into tiles" in problems and "1 images cannot be read" in problems


def test_lengths_are_those_of_each_image(recipe: str) -> None:
    """Of the plan, with the data and without them, and of the data's report."""
    reports, _ = inspect(recipe)
    counts = [sum(anyres_tokens(image.size)) for image in IMAGES]
    assert min(reports[0].lengths) >= min(counts) and len(set(reports[0].lengths)) > 5
    planned = plan(recipe, ["cache=on"]).stages[0]
    assert planned.tokens_per_image == 16 + 8 * 9  # 2 x 2 tiles of 4 x 4 patches, a newline after each of the 8 rows
    assert planned.length >= max(counts)
    assert planned.length < plan(recipe, ["data.train.path=/nowhere.json"]).stages[0].length + 100
    assert plan(recipe, ["data.train.path=/nowhere.json"]).stages[0].length == 88 + 64


def anyres_tokens(size: tuple[int, int]) -> tuple[int, int]:
    """Return an image's tokens as LlavaNextProcessor counts them: of the base image, and of the grid."""
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    counting = LlavaNextProcessor.__new__(LlavaNextProcessor)
    counting.image_processor, counting.patch_size, counting.num_additional_image_tokens = processor, 8, 0
    return 16, counting._get_number_of_features(size[1], size[0], SIDE, SIDE) - 16


def loaded(path: Path) -> Image.Image:
    """Return an image that was not rotated by its orientation."""
    with Image.open(path) as image:
        image.load()
        return image


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "file": ImageFile,
    "bytes": lambda path: ImageBytes(path.read_bytes(), path.name),
    "image": loaded,
    "array": lambda path: np.asarray(loaded(path)),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_is_that_of_the_opened_image(source: str, orientation: int | None, tmp_path: Path) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / "image.jpg"
    IMAGES[0].save(path, exif=exif)
    image = SOURCES[source](path)
    sideways = orientation in (6, 8) and source != "array"
    assert size_of(image) == open_image(image).size == ((33, 97) if sideways else (97, 33))
    IMAGES[3].save(path)
    assert size_of(SOURCES[source](path)) == (64, 64)  # the file is another now


def test_the_header_is_read_and_not_the_pixels(tmp_path: Path) -> None:
    IMAGES[5].save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert size_of(tmp_path / "cut.png") == (300, 200)
    with pytest.raises(MLLMError, match=r"cut\.png"):
        open_image(tmp_path / "cut.png")


def test_where_every_image_takes_as_many_tokens_none_is_looked_at(clip: str, lm: str) -> None:
    plain = mllm.assemble(clip, lm, "linear", device="cpu")
    assert plain.encode(["a", Path("no-such-image.png")]).visual.count(True) == 16


BAD: dict[str, tuple[Any, str]] = {
    "too wide": (Image.new("RGB", (1000, 1)), "the image of 1000 x 1 pixels: .*aspect ratio of at most 200"),
    "too high": (Image.new("RGB", (3, 601)), "the image of 3 x 601 pixels: .*Crop it"),
    "no file": (Path("no-such-image.png"), "no-such-image.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_in_one_message(model: Any, name: str) -> None:
    image, message = BAD[name]
    for ask in (
        lambda: model.generate([["See ", image]]),
        lambda: model.see([image]),
        lambda: model.chat().send("What?", [image]),
    ):
        with pytest.raises(MLLMError, match=message):
            ask()
    answers = model.generate([["See ", image], QUESTIONS[0]], errors="return", max_new_tokens=6)
    assert isinstance(answers[0], MLLMError) and str(answers[1]) == str(
        model.generate([QUESTIONS[0]], max_new_tokens=6)[0]
    )


def test_a_prompt_whose_tiles_pass_the_context_names_its_images(clip: str, tmp_path: Path) -> None:
    model = mllm.assemble(
        {"model": clip, "tiles": {"kind": "anyres"}}, tiny_lm(tmp_path / "lm", context=100), "mlp", device="cpu"
    )
    IMAGES[3].save(tmp_path / "large.png")
    with pytest.raises(MLLMError, match=r"large.png: 88 tokens; the image of 20 x 90 pixels: \d+ tokens"):
        model.generate([[tmp_path / "large.png", IMAGES[4], "What?"]])
    assert model.generate([[IMAGES[3]]], max_new_tokens=2)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no grid": ({"kind": "anyres"}, {"connector": {"type": "resampler", "tokens": 4}}, "unpad=false"),
    "cross-attention": ({"kind": "dynamic"}, {"adapters": [{"type": "gated"}]}, "gated.*encoder.tiles"),
    "resize": ({"kind": "dynamic", "resize": "crop"}, {}, "resize is crop"),
    "order": ({"kind": "dynamic", "least": 5, "most": 2}, {}, "least is 5"),
    "no tile": ({"kind": "anyres", "grids": [[0, 1]]}, {}, "grids"),
    "kind": ({"kind": "grid"}, {}, "anyres"),
    "option": ({"kind": "dynamic", "unpad": True}, {}, "unpad"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_message(clip: str, lm: str, name: str) -> None:
    tiles, settings, message = WRONG[name]
    encoder = {"model": clip, **{key: tiles[key] for key in tiles if key == "resize"}}
    encoder["tiles"] = {key: value for key, value in tiles.items() if key != "resize"}
    with pytest.raises(MLLMError, match=message):
        mllm.assemble(encoder, lm, **{"connector": "mlp", **settings}, device="cpu")


def test_any_connector_takes_tiles_that_are_not_unpadded(clip: str, lm: str) -> None:
    for tiles in ({"kind": "anyres", "unpad": False}, {"kind": "dynamic"}):
        model = mllm.assemble(
            {"model": clip, "tiles": tiles}, lm, {"type": "resampler", "tokens": 3, "heads": 2}, device="cpu"
        )
        assert model.encode([IMAGES[3]]).visual.count(True) == 3 * 5
        assert model.connector.newline is None
        assert model.generate([QUESTIONS[0], QUESTIONS[7]], max_new_tokens=2)


def test_an_export_without_tiles_is_refused(anyres: Any, tmp_path: Path) -> None:
    with pytest.raises(MLLMError, match=r"encoder\.tiles"):
        export(anyres, tmp_path / "out", to="hf-llava")
