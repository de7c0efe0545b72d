"""Write the evaluation report: one self-contained HTML page with the results and a gallery of the items.

The page (``page.html`` next to this file) renders the JSON that is put into it here. It makes no requests: the
thumbnails are data URLs, and its content security policy forbids anything else.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mllm.media.images import ImageSource

THUMBNAIL_SIDE = 224  # pixels, the longer side at most
ROWS_WITH_IMAGES = 500  # rows whose images are embedded; about 10 kB each


def write_page(
    folder: Path,
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
    images: Mapping[str, Sequence[ImageSource]],
) -> Path:
    """Write ``folder/report.html`` and return its path.

    Args:
        folder: where the page goes; made if it is missing.
        summary: ``suite``, ``run``, ``n``, ``settings`` and ``versions`` (name to value), ``baselines`` (names),
            ``metrics``, and ``kinds`` (kind to ``n`` and each metric's value by its name). A metric has ``name``,
            ``version``, ``better`` (``higher`` or ``lower``), ``value``, its 95 % interval ``low`` and ``high``, and
            ``baselines`` (name to ``value``, ``gain``, and the gain's ``low`` and ``high``).
        rows: the items in their original order: ``id``, ``kind``, ``question`` (or None), ``references``,
            ``prediction``, ``baselines`` (name to its answer), ``scores`` (metric to the item's score), and, if the
            connector has a vocabulary, ``words``, those nearest to the visual tokens of its images.
        images: a row's id to its images; rows that are missing here are text only.

    A number that is not finite is shown as a dash.
    """
    content = json.dumps(_finite({"summary": summary, **_gallery(rows, images)}), allow_nan=False)
    template, style = (
        files("mllm.eval").joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css")
    )
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    # Inside a script element only "<" can end it early ("</script>", "<!--").
    page.write_text(
        template.replace("{{style}}", style).replace("{{data}}", content.replace("<", "\\u003c")), encoding="utf-8"
    )
    return page


def _gallery(rows: list[dict[str, Any]], images: Mapping[str, Sequence[ImageSource]]) -> dict[str, Any]:
    """Return the rows with indices into one table of thumbnails, where equal images are stored once."""
    numbers: dict[str, int] = {}  # an image's key -> its index in the table
    thumbnails: list[str] = []
    with_thumbnails: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        sources = images.get(row["id"], ())
        row = {**row, "images": len(sources), "thumbnails": None}
        if index < ROWS_WITH_IMAGES:
            row["thumbnails"] = []
            for source in sources:
                key = source.key()
                if key not in numbers:
                    numbers[key] = len(thumbnails)
                    thumbnails.append(_thumbnail(source))
                row["thumbnails"].append(numbers[key])
        with_thumbnails.append(row)
    return {"rows": with_thumbnails, "thumbnails": thumbnails, "rows_with_images": ROWS_WITH_IMAGES}


def _thumbnail(source: ImageSource) -> str:
    """Return the image as a data URL of a JPEG, scaled down if it is too large."""
    image = source.open().copy()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _finite(value: Any) -> Any:
    """Return ``value`` with None for every number that JSON cannot represent (NaN, the infinities)."""
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
