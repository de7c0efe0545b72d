"""Export a model as an equivalent class of `transformers`, and verify the result.

The exported folder is loaded again with transformers alone, and both models run on the same probes. The folder is
written atomically, with the probes and the comparison in its model card.

The comparison is on the CPU in float32. In memory there are never more than two copies of the weights: the transformers
model shares those of the original until it is saved, and is gone before the folder is loaded.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from mllm.errors import MLLMError, near
from mllm.export.blip2 import blip2
from mllm.export.card import card
from mllm.export.compare import (
    EXACT,
    MERGED,
    Comparison,
    check,
    check_rounded,
    compare_all,
    references,
    rounding,
)
from mllm.export.files import let_others_read, write_files, write_json
from mllm.export.llava import llava
from mllm.export.probes import make_probes, save_images
from mllm.export.processors import read_processor
from mllm.export.stock import StockModel
from mllm.export.tiled import internvl, llava_next, llava_onevision
from mllm.model import Model

CONVERTERS: dict[str, Callable[[Model], StockModel]] = {
    "hf-llava": llava,
    "hf-llava-next": llava_next,
    "hf-llava-onevision": llava_onevision,
    "hf-internvl": internvl,
    "hf-blip2": blip2,
}
PRECISIONS = ("float32", "bfloat16", "float16")


def export(model: Model, folder: str | Path, *, to: str, dtype: str = "float32") -> list[Comparison]:
    """Write a model as a class of `transformers`, load that, and compare the two.

    Args:
        model: the model; during the export it is on the CPU in float32, in which the comparison is made.
        folder: the new folder.
        to: one of `CONVERTERS`, by the class's name in `transformers`.
        dtype: of the weights in the folder: ``float32``, ``bfloat16`` or ``float16``.

    Returns:
        The comparison on each probe, which is also in the folder's ``README.md`` and ``probes/``.

    Raises:
        MLLMError: the model is not equivalent to that class (with all reasons), the two differ on a probe, or the
            folder exists already. Nothing is written then.
    """
    _check_arguments(model, to, dtype)
    half = dtype != "float32"
    exact = MERGED if model.spec.adapters else EXACT
    with _new_folder(Path(folder)) as temporary:
        save_images(temporary, model)
        with _on_cpu_in_float32(model):
            stock = _converted(model, to)
            gc.collect()  # the language model of which it was made, and which may hold merged weights
            kind, several = type(stock.processor), stock.several
            probes = make_probes(model, several=not several)
            expected = references(model, probes, stock.model.config.image_token_id)
            allowed = exact
            if half:  # the class is compared before its weights are rounded, and once more from the folder
                check(compare_all(model, stock.model, stock.processor, probes, expected), exact)
                allowed = rounding(model, probes, expected, getattr(torch, dtype))
            write_files(stock, temporary, getattr(torch, dtype))
            del stock
            gc.collect()
        loaded = AutoModelForImageTextToText.from_pretrained(
            temporary, dtype=getattr(torch, dtype), trust_remote_code=False
        ).eval()
        processor = read_processor(temporary, kind)
        comparisons = compare_all(model, loaded, processor, probes, expected)
        (check_rounded if half else check)(comparisons, allowed)
        write_json(temporary / "probes" / "probes.json", [asdict(comparison) for comparison in comparisons])
        (temporary / "README.md").write_text(
            card(model, to, loaded, comparisons, allowed=allowed, exact=exact, several=several), encoding="utf-8"
        )
        let_others_read(temporary)
    return comparisons


def _check_arguments(model: Model, to: str, dtype: str) -> None:
    """Raise an `MLLMError` for an unknown format or precision, and for a model that lacks a part or is quantized."""
    if to not in CONVERTERS:
        raise MLLMError(f"There is no export to {to!r}. {near(to, CONVERTERS)}")
    if dtype not in PRECISIONS:
        raise MLLMError(f"There is no export in {dtype!r}. {near(dtype, PRECISIONS)}")
    absent = [part for part in ("encoder", "connector", "lm") if model.slot(part) is None]
    if absent:
        raise MLLMError(
            f"This model has no {' and no '.join(absent)}, so no transformers class is equivalent. Export a complete "
            "model."
        )
    if model.spec.lm.quantize is not None:
        raise MLLMError(
            "The language model is quantized (lm.quantize): its weights are not those of the transformers class. "
            "Train or load the model with the language model in its stored precision."
        )


def _converted(model: Model, to: str) -> StockModel:
    """Return the transformers model that is equivalent."""
    try:
        return CONVERTERS[to](model)
    except MLLMError as error:
        raise MLLMError(f"This model is not equivalent to {to}, so it is not exported:\n{error}") from None


@contextmanager
def _on_cpu_in_float32(model: Model) -> Iterator[None]:
    """Keep a model on the CPU in float32; afterwards it is where and as precise as it was, with the same values."""
    before: list[tuple[Any, torch.device, torch.dtype]] = []
    try:
        for tensor in (*model.parameters(), *model.buffers()):
            before.append((tensor, tensor.device, tensor.dtype))
            tensor.data = tensor.data.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        yield
    finally:
        for tensor, device, dtype in before:
            tensor.data = tensor.data.to(device, dtype)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to the given one if no error occurs, and removed otherwise."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MLLMError(f"{folder} exists already. Give a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield temporary
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise MLLMError(f"{folder} could not be written: {error}. Free some space, or give another folder.") from error
