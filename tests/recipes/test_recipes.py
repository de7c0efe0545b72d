"""Every recipe that comes with the package trains: its own stages, parts and objectives, made tiny by overrides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

import mllm
from mllm.config import loading as recipe
from mllm.testing import tiny_encoder, tiny_image, tiny_lm
from mllm.testing.lms import tiny_tokenizer

results: Any = import_module("mllm.eval.results")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}
QFORMER = {"dim": 16, "layers": 2, "heads": 2, "tokens": 4, "init": None}
MERGE = {"type": "token-merge", "merge": 2, "layers": 2, "dim": 16, "heads": 2}
CONDITION = {"length": 1, "width": 32}
MAKERS = {"generation": {**CONDITION, "dim": 16, "layers": 1, "heads": 2}, "affine": CONDITION}
LORA = [{"type": "lora", "r": 2}]

# What is too large for a test by its own arguments, and not by the parts it stands between.
SMALLER: dict[str, dict[str, Any]] = {
    "demo-long": {"connector.tokens": 7, "connector.texts": 400, "adapters": LORA},  # captions alone, two layers
    "mapl": {"connector": {"type": "mapper", "tokens": 4, "dim": 16, "layers": 1, "heads": 2, "ffn": 16}},
    "mapl-cpu": {"connector": {"type": "mapper", "tokens": 4, "dim": 16, "layers": 1, "heads": 2, "ffn": 16}},
    "simvlg": {"connector": MERGE},
    "simvlg-cpu": {"connector": MERGE},
    "simvlg-video": {"connector": {"type": "temporal", "frames": 2, "dim": 16, "heads": 2, "then": MERGE}},
    "emoji-decoder": {"heads.0.side": 16, "heads.0.features": 64},
    "llava": {"stages.1.adapters": LORA},
    "blip2-caption": {"init.from": None},
    "blip2-retrieval": {"init.from": None},
    "blip2-vqa": {"init.from": None},
    "sitta-cpu": {"scorer": None},  # a run of emoji-scorer, which training does not read
    "esper": {"connector.tokens": 4},
    "text-to-concept": {"scorer": None},
    "text-to-concept-cpu": {"scorer": None},  # a run of emoji-scorer, too
    "ziya-vl": {"stages.0.init.from": None},
    "llava-cpu": {"adapters": LORA},
    "peft-captioning": {"init.from": None, "adapters": [*LORA, {"type": "lora", "r": 3}]},
    "peft-captioning-cpu": {"init.from": None, "adapters": LORA},
    "cg-vlm-cpu": {"adapters": LORA},
    "internvl": {"data.pack": None},
    "llava-next": {"prompt.system": ""},
    "viecap": {"connector.then": {"type": "mapper", "tokens": 4, "expand": 2, "dim": 16, "layers": 1, "heads": 2}},
    "maccap": {"connector.then": {"type": "mapper", "tokens": 4, "dim": 16, "layers": 1, "heads": 2, "ffn": 16}},
    "synth2": {"connector": {"type": "resampler", "tokens": 4, "depth": 1, "heads": 2}},
    "yi-vl": {"prompt.system": ""},  # longer than the tiny language model's context
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: str, tiny_clip: str) -> dict[str, str]:
    """The folders of tiny parts, and tables of captions, of videos and of conversations."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny_tokenizer().save_pretrained(folder / "words")
    captions, talks = [], []
    for index in range(8):
        name, colour = list(COLOURS.items())[index % 4]
        picture = tiny_image(index)
        picture.paste(colour, (0, 0, 40, 28))
        picture.save(folder / f"{index}.png")
        picture.save(folder / f"{index}.gif", save_all=True, append_images=[Image.new("RGB", picture.size, colour)])
        captions.append({"image": f"{index}.png", "caption": f"a {name} wall"})
        asked = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": name}]
        talks.append({"id": str(index), "image": f"{index}.png", "conversations": asked})
    (folder / "captions.json").write_text(json.dumps(captions))
    videos = [{**row, "image": row["image"].replace("png", "gif")} for row in captions]
    (folder / "videos.json").write_text(json.dumps(videos))
    (folder / "talks.json").write_text(json.dumps(talks))
    labels = [{**row, "caption": ("retrieve", "generate")[index % 2]} for index, row in enumerate(captions)]
    (folder / "labels.json").write_text(json.dumps(labels))
    encoder, lm = tiny_encoder(folder / "encoder"), tiny_lm(folder / "lm")
    words = str(folder / "words")
    parts = {"encoder": encoder, "lm": lm, "decoder": tiny_decoder, "clip": tiny_clip}
    return {"folder": str(folder), "words": words, **parts}


def tiny(name: str, places: dict[str, str]) -> dict[str, Any]:
    """Return overrides that leave a recipe its structure: which parts, stages and objectives, and what trains."""
    folder, config = places["folder"], recipe.load(name)
    encoder: dict[str, Any] | None = None
    if config.encoder:
        own = config.encoder
        encoder = {"model": places["encoder"], "select": own.select, "init": own.init}
        if own.tiles is not None:
            encoder["tiles"] = own.tiles.model_dump(mode="json")
    video = config.encoder is not None and config.encoder.type == "video"
    if config.encoder and video:
        encoder = {"type": "video", "frames": 2, "pool": config.encoder.options()["pool"], "of": encoder}
    captions = {"format": "table", "path": f"{folder}/{'videos' if video else 'captions'}.json", "images": folder}
    found: dict[str, Any] = {"encoder": encoder, "data.train": captions}
    if config.data.train and config.data.train[-1].see == "text":
        of_texts = {"type": "dual-encoder", "model": places["clip"]}
        imagined = config.encoder is not None and config.encoder.type == "imagined"
        found["encoder"] = (
            {"type": "imagined", "of": [{"model": places["encoder"]}, of_texts]} if imagined else of_texts
        )
        found |= {"data.train": {**captions, "see": "text"}, "scorer": of_texts}
    if config.prompt.entities:
        found["prompt.entities.of"] = list(COLOURS)
    if config.lm:
        found |= {"lm.model": places["lm"]}
    found |= {f"guides.{name}": {"type": "dual-encoder", "model": places["clip"]} for name in config.guides}
    if config.data.val:
        found |= {"data.val": captions}
    if config.connector and config.connector.type == "qformer":
        found |= {f"connector.{key}": value for key, value in QFORMER.items()} | {"connector.words": places["words"]}
    widths = [index for index, head in enumerate(config.heads) if head.type in ("contrast", "match")]
    found |= {f"heads.{index}.inside": 16 for index in widths}
    if config.decoder:
        found["decoder"] = {"type": "trained", "model": places["decoder"]}
        maker, kind = next((i, head.type) for i, head in enumerate(config.heads) if head.type in MAKERS)
        found |= {f"heads.{maker}.{key}": value for key, value in MAKERS[kind].items()}
    for index, stage in enumerate(config.stages):
        at = f"stages.{index}"
        found |= {f"{at}.steps": 2, f"{at}.batch_size": 4} if stage.train else {}
        if "data" in _own(name, index):
            talks = {"path": f"{folder}/talks.json", "format": "llava", "images": folder, "task": "conversations"}
            said = stage.data.train[0].format in ("llava", "messages")
            found[f"{at}.data.train"] = talks if said else {**captions, "see": stage.data.train[-1].see}
            if "heads.decision" in (*stage.train, stage.fit and stage.fit.part):
                found[f"{at}.data.train"] = {**captions, "path": f"{folder}/labels.json"}
        if "encoder" in _own(name, index):
            found |= {"encoder.resolution": 32, f"{at}.encoder.resolution": 16}
    return found | SMALLER.get(name, {})


def _own(name: str, index: int) -> set[str]:
    """Return the keys that a recipe's file, or the one it extends, gives a stage itself."""
    path = recipe.find(name)
    content: Any = OmegaConf.load(path)
    while "stages" not in content:
        content = OmegaConf.load(path.parent / f"{content['extends']}.yaml")
    return set(content["stages"][index])


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_trains_as_it_is_built(name: str, places: dict[str, str], tmp_path: Path) -> None:
    overrides = tiny(name, places)
    config = recipe.load(name, overrides)
    run = mllm.train(name, overrides, out=tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    stages = [stage.name for stage in config.stages]
    assert list(dict.fromkeys(row["stage"] for row in rows if row["stage"])) == stages
    assert {bool(row.keys() & {"loss", "explained", "correlation"}) for row in rows if row["stage"] == stages[-1]} >= {
        True
    }
    assert (run.path / "loss.png").is_file() == any(stage.train for stage in config.stages)
    frozen = json.loads((run.path / "frozen.json").read_text())
    assert all(found["before"] == found["after"] for found in frozen.values())


@pytest.mark.installed
@pytest.mark.parametrize("name", recipe.names())
def test_a_recipes_trained_weights_are_those_that_are_told(name: str, need: Callable[..., None]) -> None:
    config = recipe.load(name)
    models = [part.model for part in (config.encoder, config.lm) if part and part.model]
    need(*[model for model in models if model.startswith("mllm/")])
    assert [f"{weights:,}" for weights in results.trained_weights(name)] == re.findall(r"[\d,]*\d", results.size(name))


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_is_short(name: str) -> None:
    assert len(recipe.find(name).read_text().splitlines()) <= 60
