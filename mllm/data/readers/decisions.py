"""Read prompts labelled with the source of an image: retrieved or generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm.capabilities import DECISIONS
from mllm.data.files import records_of
from mllm.data.items import Item
from mllm.data.reading import Reading, reader
from mllm.data.values import text_in
from mllm.errors import MLLMError


@reader
def decisions(rows: Reading, *, path: str) -> Sequence[Item]:
    """Read GILL's decision data: JSON lines with a ``prompt`` and its ``label``, ``retrieve`` or ``generate``.

    Args:
        rows: the reading.
        path: the JSON Lines file.

    Raises:
        MLLMError: the file cannot be read, or a row has no prompt or no valid label.
    """

    def item_of(row: Any, number: int) -> Item:
        prompt, label = text_in(row["prompt"], "prompt"), row["label"]
        if label not in DECISIONS:
            raise MLLMError(f"the label is {label!r}; expected one of {', '.join(DECISIONS)}. Correct it.")
        return Item(str(number), (), (label,), prompt.strip(), kind=label)

    return rows.items(records_of(Path(path)), item_of, "lines of {prompt, label}")
