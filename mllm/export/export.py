"""Write an assembly as a stock class of `transformers` where it equals it exactly, and prove it.

Notable: what was written is loaded again by stock code alone, and both models answer the same probes. The folder
appears whole, with the probes and the comparison in its model card, or not at all.
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
from mllm.export.stock import Shell
from mllm.model import Model

SHELLS: dict[str, Callable[[Model], Shell]] = {"hf-llava": llava, "hf-blip2": blip2}


def export(model: Model, folder: str | Path, *, to: str) -> list[Comparison]:
    """Write a model as a stock class of `transformers`, load that, and compare the two.

    Args:
        model: the assembly; it is turned to float32, in which the comparison is made.
        folder: the new folder.
        to: ``hf-llava`` (`LlavaForConditionalGeneration`) or ``hf-blip2`` (`Blip2ForConditionalGeneration`).

    Returns:
        The comparison, probe by probe; the folder's ``README.md`` and ``probes/`` hold it too.

    Raises:
        MLLMError: the assembly is not exactly that class (all reasons), the two differ on a probe, or the folder
            exists already. Nothing is written then.
    """
    if to not in SHELLS:
        raise MLLMError(f"There is no export to {to!r}. {near(to, SHELLS)}")
    absent = [part for part in ("encoder", "connector", "lm") if getattr(model, part) is None]
    if absent:
        raise MLLMError(
            f"This model has no {' and no '.join(absent)}, so it is no class of its own. Export a whole one."
        )
    with _whole(Path(folder)) as place:
        try:
            shell = SHELLS[to](model.float())
        except MLLMError as error:
            raise MLLMError(f"This model is not exactly what {to} is, so it is not exported:\n{error}") from None
        shell.model.save_pretrained(place)
        shell.processor.save_pretrained(place)
        found = compare(model, shell, place)
        (place / "probes" / "probes.json").write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
        (place / "README.md").write_text(card(model, to, shell, [asdict(one) for one in found]), encoding="utf-8")
    return found


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write in, which takes its place when all went well."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MLLMError(f"{folder} exists already. Give a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield place
            place.chmod(0o755)
            place.replace(folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise MLLMError(f"{folder} could not be written: {error}. Free some room, or give another folder.") from error
