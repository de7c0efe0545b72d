"""Write the training setup of both sides of `mllm bench train`: the same parts, images, captions, tokens and batch."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mllm.eval.bench import plain
from mllm.eval.bench.generate import THINGS
from mllm.eval.bench.shapes import image_token
from PIL import Image
from torch import Tensor, nn

from mllm.assembly import Assembly
from mllm.build import build
from mllm.config import loading as recipes
from mllm.data.items import pieces_of
from mllm.data.sources import read
from mllm.errors import MLLMError
from mllm.prompts.batch import IGNORED, collate
from mllm.prompts.pieces import images_of
from mllm.training.guides import assembly_of

WORDS = 12  # of a caption; COCO's have 11
TOLERANCE = 1e-4  # of the mean loss, float32


@dataclass(frozen=True)
class Setup:
    """Our recipe and the alternative's description, and the lengths that the bound is computed from."""

    recipe: Path
    plain: Path
    tokens: int  # sequence length of an example
    targets: int  # target tokens of an example


def captions(folder: Path, images: Sequence[Image.Image], texts: Sequence[str] | None = None) -> str:
    """Write images and a caption for each (random words if none are given); return the path of the annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    listed: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for number, image in enumerate(images):
        text = texts[number] if texts else " ".join(draw.choice(THINGS) for _ in range(WORDS))
        image.save(folder / f"{number}.png")
        listed["images"].append({"id": number, "file_name": f"{number}.png"})
        listed["annotations"].append({"image_id": number, "caption": text})
    path = folder / "captions.json"
    path.write_text(json.dumps(listed))
    return str(path)


def source(annotations: str) -> dict[str, Any]:
    """Return a recipe's data entry for images and captions."""
    return {"format": "coco-captions", "annotations": annotations, "images": str(Path(annotations).parent)}


def setup(folder: Path, recipe: dict[str, Any], stock: dict[str, Any], *, steps: int) -> tuple[Setup, Assembly]:
    """Write both sides' descriptions.

    Args:
        folder: where they are written.
        recipe: ours; its last stage is compared.
        stock: the alternative's description, without rows and processor options.
        steps: how long the alternative trains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {**recipe, "encoder": {**recipe["encoder"], "resize": "stretch"}}  # both use the whole image
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = recipes.load(str(folder / "recipe.yaml"))
    model = build(assembly_of(config.stages[-1]))
    stage = config.stages[-1]
    train, val = (
        [_row(model, pieces_of(item, stage.prompt, item.answers[0])) for spec in specs for item in read(spec)]
        for specs in (stage.data.train, stage.data.val)
    )
    size = {"height": model.encoder.size, "width": model.encoder.size}
    options: dict[str, Any] = {"size": size}
    if hasattr(model.encoder.processor, "do_center_crop"):
        options["do_center_crop"] = False
    common = {"options": options, "rows": train, "val": val, "batch_size": stage.batch_size, "steps": steps}
    (folder / "plain.json").write_text(json.dumps({"rate": 1e-3, **common, **stock}))
    made = Setup(
        folder / "recipe.yaml",
        folder / "plain.json",
        tokens=round(sum(len(row["ids"]) for row in train) / len(train)),
        targets=round(sum(label != IGNORED for row in train for label in row["labels"]) / len(train)),
    )
    return made, model


def agree(made: Setup, ours: Assembly, stock: nn.Module, *, size: int = 4) -> float:
    """Return the mean loss of one batch, which must be the same on both sides.

    Raises:
        MLLMError: the losses differ.
    """
    description = json.loads(made.plain.read_text())
    rows = description["rows"][:size]
    with torch.no_grad():
        theirs = float(stock.eval()(**plain.collator_of(description)(rows)).loss)
        mine = float(ours_losses(ours, *batch_of(ours, made, size)).mean())
    if not abs(mine - theirs) <= TOLERANCE:
        raise MLLMError(f"The losses of one batch are {mine:.6f} and {theirs:.6f}, so their times cannot be compared.")
    return mine


def batch_of(model: Assembly, made: Setup, size: int) -> tuple[Tensor, Any]:
    """Return the features and the batch of our recipe's first examples."""
    config = recipes.load(str(made.recipe))
    stage = config.stages[-1]
    items = read(stage.data.train[0])[:size]
    rows = [pieces_of(item, stage.prompt, item.answers[0]) for item in items]
    images = [image for pieces in rows for image in images_of(pieces)]
    return model.features(images), collate([model.encode(pieces) for pieces in rows], model.lm.pad)


def ours_losses(model: Assembly, features: Tensor, batch: Any) -> Tensor:
    """Return our losses of the target tokens."""
    return model.lm.losses(model.embed(model.connector(features), batch), batch.mask, batch.labels)


def _row(model: Assembly, pieces: Sequence[Any]) -> dict[str, Any]:
    """Return an example for the alternative: our ids, with its image token in the place of each visual token."""
    encoded = model.encode(pieces)
    token = image_token(model)
    ids = [token if visual else id_ for id_, visual in zip(encoded.ids, encoded.visual, strict=True)]
    (image,) = images_of(pieces)
    return {"image": str(image.path), "ids": ids, "labels": encoded.labels, "visual": encoded.visual}
