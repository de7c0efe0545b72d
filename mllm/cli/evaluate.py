"""Commands that evaluate models, score predictions, and measure speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli.options import DataFolder, RunPath, SuiteName, SuiteOverrides
from mllm.errors import MLLMError


def evaluate(
    run: RunPath,
    suite: SuiteName,
    overrides: SuiteOverrides = None,
    data: DataFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; RUN/eval/SUITE if left out.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="Of blind, shuffled (usual), mean-image, random-connector; with commas, or all, or none."),
    ] = None,
) -> None:
    """Run a suite on a model, beside baselines; one that was killed goes on."""
    from mllm.build import load
    from mllm.evaluation import evaluate as run_suite

    every = {"all": ["blind", "shuffled", "mean-image", "random-connector"], "none": []}
    report = run_suite(
        load(run),
        suite,
        data,
        limit=limit,
        out=out or run / "eval" / Path(suite).stem,
        run=str(run),
        baselines=None if baselines is None else every.get(baselines, baselines.split(",")),
        overrides=overrides or [],
    )
    if report.page:  # of several processes the main one alone
        _print_table(report)
        typer.echo(f"Report: {report.page}")


def score(
    predictions: Annotated[Path, typer.Argument(metavar="FILE", help="JSON or lines of JSON: an id and an answer.")],
    suite: SuiteName,
    overrides: SuiteOverrides = None,
    data: DataFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; beside FILE if left out.")] = None,
) -> None:
    """Score a file of predictions that any system wrote."""
    from mllm.evaluation import score as run_score

    place = out or predictions.with_name(f"{predictions.stem}-{Path(suite).stem}")
    report = run_score(predictions, suite, data, limit=limit, out=place, overrides=overrides or [])
    _print_table(report)
    typer.echo(f"Report: {report.page}")


def compare(
    one: Annotated[Path, typer.Argument(metavar="EVAL", help="An evaluation's folder, RUN/eval/SUITE.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The one it is held against.")],
    data: DataFolder = None,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; EVAL/against-OTHER if left out.")] = None,
) -> None:
    """Hold one evaluation against another of the same items and metrics, item by item."""
    from mllm.evaluation import compare as run_compare

    name = "-".join(part for part in other.parts if part not in ("/", "..", ".", "eval"))
    report = run_compare(one, other, data, out=out or one / f"against-{name}")
    _print_table(report)
    typer.echo(f"Report: {report.page}")


def bench(
    what: Annotated[str, typer.Argument(metavar="train|generate|eval|matrix", help="What is measured.")],
    out: Annotated[Path, typer.Option(help="Folder of the figures, as JSON.")] = Path("runs/bench"),
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs; medians are shown.")] = 3,
    only: Annotated[str | None, typer.Option(help="Of train: llava, heavy, target or share.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of train: steps of an epoch, 4 by default.")] = None,
) -> None:
    """Measure speed beside the alternatives, or try all parts together (matrix). Speed wants a quiet machine."""
    from importlib import import_module

    modules = {"train": "train", "generate": "generate", "eval": "evaluate", "matrix": "matrix"}
    if what not in modules:
        raise MLLMError(f"No bench is called {what!r}. There are: {', '.join(modules)}.")
    own = {key: value for key, value in (("only", only), ("steps", steps)) if value is not None}
    if own and what != "train":
        raise MLLMError(f"--{next(iter(own))} is for `mllm bench train`. Leave it out.")
    import_module(f"mllm.eval.bench.{modules[what]}").run(out=out, repeats=repeats, progress=typer.echo, **own)


def _print_table(report: Any) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    summary = report.summary
    table = Table(Column("metric", no_wrap=True), "of", Column("value", no_wrap=True), "gain over it")
    for entry in summary["metrics"]:
        table.add_row(entry["name"], "the model", _figure(entry), "")
        for name, other in entry["baselines"].items():
            table.add_row("", name, f"{other['value']:.3f}", _signed(other))
        table.add_section()
    Console().print(table)
    first = summary["metrics"][0]["name"] if summary["metrics"] else None
    if first and 1 < len(summary["kinds"]) <= 10:  # of more the report tells
        for kind, found in summary["kinds"].items():
            typer.echo(f"{kind}: {first} {found[first]:.3f}, {found['n']} items" if first in found else kind)
    typer.echo(f"{summary['suite']}: {summary['n']} items; intervals are 95 %, by bootstrap over items.")


def _figure(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.3f}" + ("" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]")


def _signed(other: dict[str, Any]) -> str:
    return f"{other['gain']:+.3f}" + ("" if other["low"] is None else f" [{other['low']:+.3f}, {other['high']:+.3f}]")
