"""Time LLaVA's first stage on a GPU next to a plain loop of `transformers`: CLIP-L/336 and an 8B Llama's shapes.

Both sides open the same JPEGs, the plain loop in the workers of torch's `DataLoader`.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from mllm.eval.bench.shapes_8b import CAPTION, Place, drawn_on
from mllm.eval.bench.table import Row
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mllm.assembling import assemble
from mllm.encoders.feature_store import FeatureStore
from mllm.media.images import ImageFile
from mllm.training import loop
from mllm.training.throughput import peak_flops
from mllm.training.train import train

IMAGE_TOKEN, WORKERS, WARM = 300, 8, 3

RECIPE = """
name: stage
encoder: {{model: {folder}/vision, layer: -2, init: random}}
lm: {{model: {folder}/text, init: random{lm}}}
connector: {{type: mlp}}
adapters: {adapters}
prompt: {{template: "{{images}}\\n{{prompt}}", caption: "Describe the picture:"}}
data: {{train: {{format: llava, path: {folder}/rows.json, images: {folder}/images, task: captions}}}}
cache: "off"
stages:
  - name: align
    train: {train}
    steps: {steps}
    batch_size: {batch}
    checkpoint_every: 100000
    optim: {{warmup: 2, schedule: constant, checkpointing: {checkpointing}, compile: {compile}}}
"""


@dataclass(frozen=True)
class Side:
    """What was measured of one side.

    Args:
        images: a second.
        peak: bytes of the GPU.
    """

    images: float
    peak: int


def measure(
    place: Place, *, steps: int = 12, progress: Callable[[str], None] = print, compiled: bool = True
) -> list[Row]:
    """Measure the first stage, LoRA, the frozen encoder, and what the main thread and the processor do for an image.

    The arguments are those of `stage`.
    """
    rows = stage(place, steps=steps, progress=progress, compiled=compiled)
    lora = {"adapters": "[{type: lora, r: 128}]", "trains": "{connector: 2.0e-5, adapters: 2.0e-4}"}
    tuned = ours(place, steps=steps, batch=8, checkpointing="true", **lora)
    rows.append(_wanted("stage 2, LoRA r=128, batch 8", "images/s", tuned.images))
    if tuned.peak:
        rows.append(_wanted("  peak memory", "GB", tuned.peak / 1e9, most=40))
    rate, main, processor = encoder_pass(place)
    progress(f"the encoder: {rate:.0f} images/s")
    return [
        *rows,
        _wanted("the frozen encoder's features", "images/s", rate, least=800),
        _wanted("  main thread", "ms/image", main, most=0.3),
        _wanted("  all threads", "ms/image", processor, most=8),
    ]


def _wanted(name: str, unit: str, value: float, *, least: float | None = None, most: float | None = None) -> Row:
    """Return the row of a figure without an alternative: ``ratio`` is that to what is wanted."""
    ratio = value / least if least else most / value if most else None
    return Row(name=name, unit=unit, ours=value, alternative=None, ratio=ratio, wanted=least or most)


def stage(
    place: Place, *, steps: int = 12, progress: Callable[[str], None] = print, compiled: bool = True
) -> list[Row]:
    """Measure the first stage, and return a row for each figure.

    Args:
        place: the shapes, written.
        steps: of each run; the first three are not timed.
        progress: called with a line on each finished measurement.
        compiled: also with compiled layers.
    """
    text = len(CAPTION) + len("\nDescribe the picture:") + 1
    tokens = place.visual + text
    flops = 4 * place.parameters() * tokens + 2 * place.tower() * (place.visual + 1)  # of an image
    peak = peak_flops(torch.cuda.get_device_name()) if place.device == "cuda" else None
    rows: list[Row] = []
    for label, batch, options in (
        ("batch 8", 8, {}),
        *((("batch 8, compiled", 8, {"compile": "true"}),) if compiled else ()),
        ("batch 16, checkpointing", 16, {"checkpointing": "true"}),
    ):
        mine = ours(place, steps=steps, batch=batch, **options)
        theirs = plain(place, steps=steps, batch=batch, text=text, checkpointing="checkpointing" in options)
        progress(f"{label}: ours {mine.images:.1f} images/s, {mine.peak / 1e9:.1f} GB; the plain loop {theirs}")
        rows.append(_row(f"stage 1, {label}", "images/s", mine.images, theirs.images, mine.images / theirs.images, 1.3))
        if peak is not None:
            own, other = (side.images * flops / peak for side in (mine, theirs))
            rows.append(_row(f"  of the peak's FLOP/s (MFU), {label}", "", own, other, own / other, 1.3))
        if mine.peak:
            used = (mine.peak / 1e9, theirs.peak / 1e9)
            rows.append(_row(f"  peak memory, {label}", "GB", used[0], used[1], used[1] / used[0], 1 / 0.7))
    return rows


def _row(name: str, unit: str, mine: float, theirs: float, ratio: float, wanted: float) -> Row:
    return Row(name=name, unit=unit, ours=mine, alternative=theirs, ratio=ratio, wanted=wanted)


def ours(place: Place, *, steps: int, batch: int, trains: str = "{connector: 1.0e-3}", **options: str) -> Side:
    """Return the speed and memory of `mllm train`; ``options`` are those of the recipe's stage."""
    values = {"adapters": "[]", "lm": "", "checkpointing": "false", "compile": "false", **options}
    number = len(list(place.folder.glob("*.yaml")))
    recipe = place.folder / f"{number}.yaml"
    recipe.write_text(RECIPE.format(folder=place.folder, steps=steps, batch=batch, train=trains, **values))
    times: list[float] = []
    step = loop.Loop.step

    def timed(*args: Any, **keywords: Any) -> Any:
        result = step(*args, **keywords)
        times.append(_now(place.device))
        return result

    _free(place.device)
    with drawn_on(place.device), mock.patch.object(loop.Loop, "step", timed):
        train(str(recipe), out=place.folder / f"run-{number}", device=place.device)
    return _side(place.device, times, batch)


def plain(place: Place, *, steps: int, batch: int, text: int, checkpointing: bool) -> Side:
    """Return the speed and memory of a plain loop on `transformers`' LLaVA, as its documentation writes them."""
    _free(place.device)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_pretrained(place.folder / "vision", trust_remote_code=False),
        text_config=LlamaConfig.from_pretrained(place.folder / "text", trust_remote_code=False),
        image_token_index=IMAGE_TOKEN,
    )
    with torch.device(place.device):
        model: Any = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=1e-3)
    processor = transformers.CLIPImageProcessor.from_pretrained(place.folder / "vision", trust_remote_code=False)
    paths = sorted((place.folder / "images").iterdir())

    def collate(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        images = [Image.open(paths[number % len(paths)]).convert("RGB") for number in numbers]
        ids = torch.randint(0, 250, (len(images), place.visual + text))
        ids[:, : place.visual] = IMAGE_TOKEN
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - len(CAPTION), -100)
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    loader: Any = DataLoader(
        range(steps * batch),  # type: ignore[arg-type]
        batch_size=batch,
        collate_fn=collate,
        num_workers=WORKERS if place.device == "cuda" else 0,
        pin_memory=place.device == "cuda",
    )
    times = []
    for inputs in loader:
        moved = {name: tensor.to(place.device, non_blocking=True) for name, tensor in inputs.items()}
        with torch.autocast(place.device, dtype=torch.bfloat16):
            loss = model(**moved).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
        times.append(_now(place.device))
    return _side(place.device, times, batch)


def encoder_pass(place: Place, *, images: int = 512) -> tuple[float, float, float]:
    """Measure the frozen encoder with images that are opened and prepared in threads.

    Returns:
        Images a second; milliseconds an image of the main thread's processor time, and of all threads'.
    """
    with drawn_on(place.device):
        model = assemble(
            {"model": str(place.folder / "vision"), "layer": -2, "init": "random"},
            {"model": str(place.folder / "text"), "init": "random"},
            device=place.device,
        )
    paths = sorted((place.folder / "images").iterdir())
    store = FeatureStore(model, limit=0)

    def features(count: int) -> None:
        size = len(paths) // 4
        batches = [
            [ImageFile(paths[(start + row) % len(paths)]) for row in range(size)] for start in range(0, count, size)
        ]
        store.expect(batches[0])
        for batch, upcoming in itertools.pairwise([*batches, []]):
            store.expect(upcoming)
            store(batch)

    features(len(paths))
    _free(place.device)
    began = _now(place.device), time.thread_time(), time.process_time()
    features(images)
    ended = _now(place.device), time.thread_time(), time.process_time()
    seconds, main, processor = (end - begin for begin, end in zip(began, ended, strict=True))
    return images / seconds, 1000 * main / images, 1000 * processor / images


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _side(device: str, times: Sequence[float], batch: int) -> Side:
    timed = times[min(WARM, len(times) - 2) :]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Side(batch * (len(timed) - 1) / (timed[-1] - timed[0]), peak)
