"""Write what a comparison of variations resulted in: JSON, a table in Markdown, and an HTML page of runs by suites."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path

from mllm.errors import MLLMError
from mllm.system import write
from mllm.training.run import environment


@dataclass(frozen=True)
class Entry:
    """A metric of one combination on one suite. Intervals are 95 %, by bootstrap over items, pooled over the seeds."""

    metric: str
    better: str  # higher or lower
    values: list[float]  # by seed
    value: float  # their mean
    low: float | None
    high: float | None
    gain: float | None  # over the recipe as it stands; None: of that itself, or where other items were scored
    gain_low: float | None
    gain_high: float | None


@dataclass(frozen=True)
class Result:
    """One combination on one suite: its items, the folders of its evaluations by seed, and its metrics."""

    items: int
    evaluations: list[str]
    metrics: list[Entry]


@dataclass(frozen=True)
class Row:
    """One combination, and its results by suite."""

    label: str
    results: dict[str, Result]


@dataclass(frozen=True)
class Comparison:
    """Runs by suites; the first row is the recipe as it stands."""

    recipe: str
    about: str
    seeds: list[int]
    limit: int | None
    suites: list[str]
    rows: list[Row]


def table(comparison: Comparison) -> str:
    """Return the first metric of each suite as a Markdown table."""
    heads = ["run"]
    for suite in comparison.suites:
        heads += [f"{suite}: {comparison.rows[0].results[suite].metrics[0].metric}", f"gain over {comparison.recipe}"]
    lines = [heads, ["---"] * len(heads)]
    for row in comparison.rows:
        first = [row.results[suite].metrics[0] for suite in comparison.suites]
        lines.append([row.label, *(cell for entry in first for cell in (_value(entry), _gain(entry)))])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def notes(comparison: Comparison) -> str:
    """Return how the figures were made, in one sentence each."""
    seeds = ", ".join(map(str, comparison.seeds))
    items = ", ".join(f"{suite} {result.items}" for suite, result in comparison.rows[0].results.items())
    return (
        f"Means over the seeds {seeds}; items: {items}. The gain is over {comparison.recipe} as it stands, with the "
        "same seeds; 95 % intervals are by bootstrap over items, pooled over the seeds."
    )


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write ``report.html``, ``table.md`` and ``comparison.json`` into a folder, and return the first.

    Raises:
        MLLMError: they cannot be written.
    """
    content = {**asdict(comparison), "versions": environment()}
    texts = {
        "comparison.json": json.dumps(content, indent=2) + "\n",
        "table.md": f"{table(comparison)}\n{notes(comparison)}\n",
        "report.html": page(comparison, folder),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    except OSError as error:
        raise MLLMError(f"The comparison in {folder} cannot be written: {error.strerror or error}.") from None
    return folder / "report.html"


def page(comparison: Comparison, folder: Path) -> str:
    """Return the HTML page, whose links to the reports of single evaluations are relative to its folder."""
    template = files("mllm.eval").joinpath("comparison.html").read_text(encoding="utf-8")
    style = files("mllm.eval").joinpath("page.css").read_text(encoding="utf-8")
    sections = "\n".join(_section(comparison, suite, folder) for suite in comparison.suites)
    parts = {"title": escape(comparison.recipe), "about": escape(comparison.about), "notes": escape(notes(comparison))}
    parts |= {"style": style, "overview": _overview(comparison), "suites": sections}
    for name, text in parts.items():
        template = template.replace(f"{{{{{name}}}}}", text)
    return template


def _overview(comparison: Comparison) -> str:
    """Return the table of runs by suites, with the first metric of each."""
    heads = ["Run"]
    for suite in comparison.suites:
        metric = comparison.rows[0].results[suite].metrics[0]
        heads += [f"{suite}: {_name(metric)}", f"gain over {comparison.recipe}"]
    rows = []
    for row in comparison.rows:
        first = [row.results[suite].metrics[0] for suite in comparison.suites]
        rows.append([escape(row.label), *(cell for entry in first for cell in _cells(entry))])
    return _table(heads, rows)


def _section(comparison: Comparison, suite: str, folder: Path) -> str:
    """Return a suite's table of all its metrics, with links to the evaluations."""
    metrics = comparison.rows[0].results[suite].metrics
    heads = ["Run", *(head for entry in metrics for head in (_name(entry), "gain")), "Evaluations by seed"]
    rows = []
    for row in comparison.rows:
        result = row.results[suite]
        cells = [cell for entry in result.metrics for cell in _cells(entry)]
        rows.append([escape(row.label), *cells, _links(result, comparison.seeds, folder)])
    return f"<section><h2>{escape(suite)}</h2>{_table(heads, rows)}</section>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in the style of the reports; ``rows`` are HTML."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="panel"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(entry: Entry) -> tuple[str, str]:
    """Return a metric's value and its gain as HTML, each with its interval."""
    seeds = ", ".join(f"{value:.3f}" for value in entry.values)
    value = f'<span class="value" title="by seed: {seeds}">{entry.value:.3f}</span>{_small(entry.low, entry.high)}'
    if entry.gain is None:
        return value, ""
    sign = "+.3f"
    return value, f"{entry.gain:+.3f}{_small(entry.gain_low, entry.gain_high, sign)}{_mark(entry)}"


def _small(low: float | None, high: float | None, form: str = ".3f") -> str:
    return "" if low is None or high is None else f" <small>[{low:{form}}, {high:{form}}]</small>"


def _mark(entry: Entry) -> str:
    """Return an arrow where the interval of the gain excludes 0."""
    if entry.gain_low is None or entry.gain_high is None or entry.gain_low <= 0 <= entry.gain_high:
        return ""
    higher = entry.gain_low > 0
    kind = "good" if higher == (entry.better == "higher") else "bad"
    return f' <span class="{kind}">{"▲" if higher else "▼"}</span>'


def _links(result: Result, seeds: Sequence[int], folder: Path) -> str:
    reports = [os.path.relpath(Path(each) / "report.html", folder) for each in result.evaluations]
    return " ".join(f'<a href="{escape(path)}">{seed}</a>' for seed, path in zip(seeds, reports, strict=True))


def _name(entry: Entry) -> str:
    return entry.metric + (", lower is better" if entry.better == "lower" else "")


def _value(entry: Entry) -> str:
    return f"{entry.value:.3f}"


def _gain(entry: Entry) -> str:
    if entry.gain is None:
        return ""
    interval = "" if entry.gain_low is None else f" [{entry.gain_low:+.3f}, {entry.gain_high:+.3f}]"
    return f"{entry.gain:+.3f}{interval}"
