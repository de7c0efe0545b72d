"""Labels that say of prompts whether an image is looked up or made."""

from __future__ import annotations

from pathlib import Path

from mllm.capabilities import DECISIONS
from mllm.data.files import json_lines
from mllm.data.items import Item
from mllm.errors import MLLMError


def decisions(*, path: str) -> list[Item]:
    """Read lines of JSON with a ``prompt`` and its ``label``, ``retrieve`` or ``generate``, as GILL has them.

    Args:
        path: the file.

    Raises:
        MLLMError: the file cannot be read, or a row lacks one of the two.
    """
    items = []
    for number, row in enumerate(json_lines(Path(path)), start=1):
        prompt, label = (row.get("prompt"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(prompt, str) or not prompt.strip() or label not in DECISIONS:
            raise MLLMError(
                f"{path}, row {number}: prompt {prompt!r}, label {label!r}. Expected a text, and one of "
                f"{', '.join(DECISIONS)}."
            )
        items.append(Item(str(number), (), (label,), prompt.strip(), kind=label))
    return items
