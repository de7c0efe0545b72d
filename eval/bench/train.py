"""Time `mllm train` next to `transformers`' Trainer: same parts, tokens and batch, each run in its own process."""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mllm.eval.bench import gpu, plain
from mllm.eval.bench.costs import shape_of
from mllm.eval.bench.setups import Setup, agree, captions, setup, source
from mllm.eval.bench.shapes import LM, llava_class, noise_images, save_vision
from mllm.eval.bench.shapes_8b import Place
from mllm.eval.bench.share import share
from mllm.eval.bench.table import Row, ratio, report
from mllm.eval.bench.watched import POLL, Watched, watch

from mllm.assembly import Assembly
from mllm.config.data import DataSpec
from mllm.data.sources import read
from mllm.errors import MLLMError, near
from mllm.hub import embedded as parts
from mllm.system import cache_dir

PARTS = ("llava", "heavy", "target", "share")
BATCH = 8
EPOCHS = 2
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}  # ViT-L
SMALL_BATCH = 8
FITTED = 1500  # images of the closed-form fit
RATES = (1e-4, 3e-4, 1e-3)  # learning rates of the alternative
PROMPT = {"template": "A photo of{images}.\n{prompt}", "caption": "A picture of"}

Progress = Callable[[str], None]


def run(
    *,
    out: Path | None = None,
    repeats: int = 3,
    progress: Progress = print,
    only: str | None = None,
    steps: int | None = None,
    device: str | None = None,
) -> list[Row]:
    """Run the measurements, print the table, and write it to ``out``.

    Args:
        out: the folder of the results.
        repeats: pairs of runs of the two shapes.
        progress: called with a line on each finished measurement.
        only: one of ``llava``, ``heavy``, ``target``, ``share``; None: all.
        steps: of an epoch (4 by default); for ``target`` the alternative trains 75 times as many. On a GPU:
            of each run.
        device: a GPU, on which LLaVA's stages are timed, at an 8B's shapes (`mllm.eval.bench.gpu`); None: the CPU.

    Raises:
        MLLMError: there is no such part, or the sides' losses differ.
    """
    if device is not None:
        if only is not None:
            raise MLLMError("bench train --device measures one part: leave out --only.")
        with tempfile.TemporaryDirectory() as folder:
            place = Place(Path(folder), device=device).write()
            measured: list[Row] = gpu.measure(place, steps=steps or 12, progress=progress)
        report("train-gpu", measured, out)
        return measured
    if only is not None and only not in PARTS:
        raise MLLMError(f"bench train has no part {only!r}. {near(only, PARTS)}")
    rows: list[Row] = []
    for part in PARTS if only is None else (only,):
        with tempfile.TemporaryDirectory() as folder:
            measure = {"llava": llava, "heavy": heavy, "target": target, "share": share}[part]
            rows += measure(Path(folder), repeats=repeats, steps=steps or 4, progress=progress)
    report("train" if only is None else f"train-{only}", rows, out)
    return rows


def llava(
    folder: Path,
    *,
    repeats: int,
    steps: int,
    progress: Progress,
    size: dict[str, Any] | None = None,
    lm: str = LM,
) -> list[Row]:
    """Time ViT-B/16 and a two-layer MLP next to LlavaForConditionalGeneration, and measure both sides' memory."""
    vision = save_vision(folder / "encoder", size)
    made, ours = _llava_setup(folder, vision, lm, steps)
    stock = llava_class(ours, folder / "encoder", lm)
    progress(f"LLaVA shape: both have a loss of {agree(made, ours, stock):.4f} on one batch")
    stock.save_pretrained(folder / "stock")
    shape = shape_of(ours, made)
    del ours, stock
    gc.collect()
    pairs = _pairs(folder, made, repeats, progress)
    note = f"{shape.visual} visual tokens, batch {BATCH}"
    memory = [(a.memory, b.memory) for a, b in pairs]
    return [
        _rate("LLaVA, epoch 2", note, pairs, (steps, EPOCHS * steps), 1.45, shape.bound(cached=True)),
        _rate("LLaVA, epoch 1", note, pairs, (0, steps), 1.1, shape.bound(cached=False)),
        Row(
            name="LLaVA, peak memory",
            unit="MB",
            ours=statistics.median(a for a, _ in memory) / 1e6,
            alternative=statistics.median(b for _, b in memory) / 1e6,
            ratio=statistics.median(b / a for a, b in memory),
            wanted=1 / 0.6,
            note="above the imports",
        ),
    ]


def heavy(
    folder: Path, *, repeats: int, steps: int, progress: Progress, size: dict[str, Any] | None = None, lm: str = LM
) -> list[Row]:
    """Time ViT-L/14, its patches average-pooled to 16 tokens, next to a hand-written module with Trainer."""
    vision = save_vision(folder / "encoder", {**LARGE, "patch_size": 14} if size is None else size)
    annotations = captions(folder / "data", noise_images(steps * BATCH))
    recipe = _recipe(vision, lm, {"type": "linear", "tokens": 16}, annotations, steps)
    made, ours = _joined_setup(folder, recipe, vision, lm, cells=4, steps=EPOCHS * steps, progress=progress)
    shape = shape_of(ours, made)
    del ours
    gc.collect()
    pairs = _pairs(folder, made, repeats, progress)
    note = f"{shape.patches} patches, 16 visual tokens, batch {BATCH}"
    return [
        _rate("encoder-heavy, epoch 2", note, pairs, (steps, EPOCHS * steps), 7.0, shape.bound(cached=True)),
        _rate("encoder-heavy, epoch 1", note, pairs, (0, steps), 1.0, shape.bound(cached=False)),
    ]


def target(
    folder: Path,
    *,
    repeats: int,
    steps: int,
    progress: Progress,
    encoder: str = "mllm/mobilenet-v2",
    lm: str = LM,
    rates: Sequence[float] = RATES,
) -> list[Row]:
    """Time both sides, with all loading included, until they have the alternative's final validation loss."""
    steps = 75 * steps
    encoder_folder = str(parts.locate(encoder)) if encoder.startswith("mllm/") else encoder
    recipe = _target_recipe(folder, encoder, lm, steps)
    made, _ = _joined_setup(folder, recipe, encoder_folder, lm, cells=2, steps=steps, progress=progress)
    description = json.loads(made.plain.read_text())
    results = []
    for rate in rates:
        made.plain.write_text(json.dumps({**description, "rate": rate}))
        watched = watch("plain", made.plain, folder / f"plain-{rate}")
        results.append((watched.lines[-1][1]["val_loss"], watched.at(steps) - watched.began))
        progress(f"the alternative at {rate:g}: {results[-1][0]:.3f} after {steps} steps, {results[-1][1]:.0f} s")
    loss, theirs = min(results)

    def reached(row: dict[str, Any]) -> bool:
        return float(row.get("val_loss", float("inf"))) <= loss

    watched = watch("ours", made.recipe, folder / "ours", environment=_cache(folder / "cache"), until=reached)
    last, row = watched.lines[-1]
    if not reached(row):
        raise MLLMError(f"Ours did not reach the alternative's loss of {loss:.3f}: it ended at {row}.")
    mine = last - watched.began
    progress(f"ours: {row['val_loss']:.3f} after {row['step']} steps, {mine:.0f} s")
    note = f"{loss:.3f}: the best of {len(rates)} learning rates after {steps} steps; ours after {row['step']}"
    return [Row("time to the same loss", "s", mine, theirs, theirs / mine, 5.0, note=note)]


def _target_recipe(folder: Path, encoder: str, lm: str, steps: int) -> dict[str, Any]:
    """Return our recipe for ``target``: a closed-form fit on few images, then steps with frequent validation."""
    train = _scenes(folder / "train", "train", steps * SMALL_BATCH)
    few = _scenes(folder / "few", "train", min(FITTED, steps * SMALL_BATCH))
    recipe = _recipe(encoder, lm, {"type": "linear", "tokens": 4}, train, steps)
    recipe["optim"] = {"precision": "float32", "warmup": 0, "schedule": "constant"}
    recipe["data"]["val"] = source(_scenes(folder / "val", "val", 64))
    fit = {"name": "fit", "fit": {"part": "connector", "solver": "ridge", "strength": 0.1, "targets": "caption-words"}}
    align = {"train": {"connector": 1e-3}, "steps": steps, "batch_size": SMALL_BATCH, "validate_every": 10}
    recipe["stages"] = [{**fit, "data": {"train": source(few)}}, {"name": "align", **align}]
    return recipe


def _llava_setup(folder: Path, vision: str, lm: str, steps: int) -> tuple[Setup, Assembly]:
    annotations = captions(folder / "data", noise_images(steps * BATCH))
    recipe = _recipe(vision, lm, {"type": "mlp"}, annotations, steps)
    recipe["encoder"]["layer"] = -1
    stock = {"kind": "llava", "model": str(folder / "stock"), "processor": vision}
    return setup(folder, recipe, stock, steps=EPOCHS * steps)


def _joined_setup(
    folder: Path, recipe: dict[str, Any], vision: str, lm: str, *, cells: int, steps: int, progress: Progress
) -> tuple[Setup, Assembly]:
    """Write both descriptions with the hand-written module as the alternative, and check that the losses agree."""
    lm_folder = str(parts.locate(lm)) if lm.startswith("mllm/") else lm
    stock: dict[str, Any] = {"kind": "joined", "processor": vision, "parts": {}}
    made, ours = setup(folder, recipe, stock, steps=steps)
    description = json.loads(made.plain.read_text())
    description["parts"] = {"encoder": vision, "lm": lm_folder, "cells": cells, "dim": ours.encoder.dim}
    made.plain.write_text(json.dumps(description))
    joined = plain.joined(**description["parts"])
    joined.connector.load_state_dict(ours.connector.project.state_dict())
    progress(f"both have a loss of {agree(made, ours, joined):.4f} on one batch")
    return made, ours


def _recipe(encoder: str, lm: str, connector: dict[str, Any], annotations: str, steps: int) -> dict[str, Any]:
    stage = {"name": "align", "train": {"connector": 1e-3}, "steps": EPOCHS * steps, "batch_size": BATCH}
    return {
        "name": "bench",
        "encoder": {"model": encoder},
        "lm": {"model": lm, "dtype": "float32"},
        "connector": connector,
        "prompt": PROMPT,
        "data": {"train": source(annotations)},
        "optim": {"precision": "float32", "warmup": 10},
        "stages": [stage],
    }


def _scenes(folder: Path, split: str, size: int) -> str:
    """Write emoji scenes as files, one caption each."""
    items = read(DataSpec(format="emoji-scenes", split=split, task="captions", size=size))  # type: ignore[call-arg]
    return captions(folder, [item.images[0].open() for item in items], [item.answers[0] for item in items])


def _pairs(folder: Path, made: Setup, repeats: int, progress: Progress) -> list[tuple[Watched, Watched]]:
    """Run both sides in turns, each time with an empty feature cache."""
    pairs = []
    for repeat in range(repeats):
        ours = watch("ours", made.recipe, folder / f"ours-{repeat}", environment=_cache(folder / f"cache-{repeat}"))
        theirs = watch("plain", made.plain, folder / f"plain-{repeat}")
        pairs.append((ours, theirs))
        mine, other = (watched.lines[-1][0] - watched.began for watched in (ours, theirs))
        progress(f"{repeat + 1} of {repeats}: ours {mine:.0f} s, the alternative {other:.0f} s, loading included")
    return pairs


def _rate(
    name: str, note: str, pairs: Sequence[tuple[Watched, Watched]], steps: tuple[int, int], wanted: float, bound: float
) -> Row:
    """Return the row of images per second between the ends of two steps."""
    first, last = steps
    mine, theirs = (  # the log is polled, so no shorter time can be measured
        [max(POLL, watched.at(last) - watched.at(first)) for watched in side] for side in zip(*pairs, strict=True)
    )
    images = (last - first) * BATCH
    return Row(
        name=name,
        unit="images/s",
        ours=images / statistics.median(mine),
        alternative=images / statistics.median(theirs),
        ratio=ratio(mine, theirs),
        wanted=wanted,
        bound=bound,
        note=note,
    )


def _cache(folder: Path) -> dict[str, str]:
    """Return environment variables for a cache that is empty except for the embedded parts."""
    folder.mkdir()
    for name in ("parts", "wheels"):
        if (cache_dir() / name).exists():
            os.symlink(cache_dir() / name, folder / name)
    return {"MLLM_CACHE": str(folder)}
