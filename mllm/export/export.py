"""Export a model as an equivalent class of `transformers`, and verify the result.

The exported folder is loaded again with transformers alone, and both models run on the same probes. The folder is
written atomically, with the probes and the comparison in its model card.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from mllm.errors import MLLMError, near
from mllm.export.blip2 import blip2
from mllm.export.card import card
from mllm.export.compare import Comparison, compare
from mllm.export.llava import llava
from mllm.export.stock import StockModel
from mllm.model import Model

CONVERTERS: dict[str, Callable[[Model], StockModel]] = {"hf-llava": llava, "hf-blip2": blip2}


def export(model: Model, folder: str | Path, *, to: str) -> list[Comparison]:
    """Write a model as a class of `transformers`, load that, and compare the two.

    Args:
        model: the model; it is moved to the CPU and converted to float32, in which the comparison is made.
        folder: the new folder.
        to: ``hf-llava`` (`LlavaForConditionalGeneration`) or ``hf-blip2`` (`Blip2ForConditionalGeneration`).

    Returns:
        The comparison on each probe, which is also in the folder's ``README.md`` and ``probes/``.

    Raises:
        MLLMError: the model is not equivalent to that class (with all reasons), the two differ on a probe, or the
            folder exists already. Nothing is written then.
    """
    if to not in CONVERTERS:
        raise MLLMError(f"There is no export to {to!r}. {near(to, CONVERTERS)}")
    absent = [part for part in ("encoder", "connector", "lm") if model.slot(part) is None]
    if absent:
        raise MLLMError(
            f"This model has no {' and no '.join(absent)}, so no transformers class is equivalent. Export a complete "
            "model."
        )
    with _new_folder(Path(folder)) as temporary:
        try:
            stock = CONVERTERS[to](model.cpu().float())
        except MLLMError as error:
            raise MLLMError(f"This model is not equivalent to {to}, so it is not exported:\n{error}") from None
        stock.model.save_pretrained(temporary)
        stock.processor.save_pretrained(temporary)
        comparisons = compare(model, stock, temporary)
        rows = [asdict(comparison) for comparison in comparisons]
        (temporary / "probes" / "probes.json").write_text(json.dumps(rows, indent=2) + "\n")
        (temporary / "README.md").write_text(card(model, to, stock, rows), encoding="utf-8")
    return comparisons


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
            temporary.chmod(0o755)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise MLLMError(f"{folder} could not be written: {error}. Free some space, or give another folder.") from error
