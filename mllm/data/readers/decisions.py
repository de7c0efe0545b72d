"""Read prompts labelled with the source of an image: retrieved or generated."""

from __future__ import annotations

from pathlib import Path

from mllm.capabilities import DECISIONS
from mllm.data.files import json_lines
from mllm.data.items import Item
from mllm.errors import MLLMError


def decisions(*, path: str) -> list[Item]:
    """Read GILL's decision data: JSON lines with a ``prompt`` and its ``label``, ``retrieve`` or ``generate``.

    Args:
        path: the JSON Lines file.

    Raises:
        MLLMError: the file cannot be read, or a row has no prompt or no valid label.
    """
    items = []
    for number, row in enumerate(json_lines(Path(path)), start=1):
        prompt, label = (row.get("prompt"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(prompt, str) or not prompt.strip() or label not in DECISIONS:
            raise MLLMError(
                f"{path}, row {number}: prompt {prompt!r}, label {label!r}. Expected a text, and one of "
                f"{', '.join(DECISIONS)}. Correct the row."
            )
        items.append(Item(str(number), (), (label,), prompt.strip(), kind=label))
    return items
