"""Define the commands that evaluate models, score predictions and measure speed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm.cli.loading import load_run
from mllm.cli.options import (
    DataFolder,
    DeviceName,
    DTypeName,
    EngineOption,
    RunPath,
    SuiteName,
    SuiteOverrides,
    Trusted,
)
from mllm.errors import MLLMError

if TYPE_CHECKING:
    from mllm.config.suites import SuiteSpec
    from mllm.evaluation import Report


def evaluate(
    run: RunPath,
    suite: Annotated[
        str | None, typer.Option(help="A suite's name, or the path of its YAML file; the recipe's suites by default.")
    ] = None,
    overrides: SuiteOverrides = None,
    data: DataFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; RUN/eval/SUITE by default.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="Names with commas (blind,nearest), all, or none; the suite's usual ones by default."),
    ] = None,
    device: DeviceName = None,
    dtype: DTypeName = None,
    engine: EngineOption = None,
    trust_remote_code: Trusted = None,
) -> None:
    """Run a suite on a model and its baselines; an evaluation that was stopped or killed continues."""
    from mllm.config.suites import SuiteSpec
    from mllm.evaluation import evaluate as run_suite

    suites = [SuiteSpec(suite=suite)] if suite else _suites_of(run)
    with _stoppable():
        model = load_run(run, device, dtype, trust_remote_code, engine)
        for each in suites:
            folder = run / "eval" / each.folder if out is None else out if suite else out / each.folder
            report = run_suite(
                model,
                each.suite,
                data or each.data,
                limit=limit,
                out=folder,
                run=str(run),
                baselines=[] if baselines == "none" else baselines and baselines.split(","),
                overrides=[*each.overrides, *(overrides or [])],
            )
            if report.page:  # only in the main process
                _print_table(report)
                typer.echo(f"Report: {report.page}")


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """End the command with a message when a signal stops it; what is answered is on disk, batch by batch."""
    from mllm.training.signals import Signals

    signals = Signals()
    try:
        with signals:
            yield
    except KeyboardInterrupt:
        stopped = signals.stopped("between two batches; what is answered is kept", ["mllm", *sys.argv[1:]])
        typer.echo(f"mllm: {stopped}", err=True)
        raise typer.Exit(stopped.status) from None


def _suites_of(run: Path) -> list[SuiteSpec]:
    """Return the suites that a run's recipe names.

    Raises:
        MLLMError: it names none, or this is no run.
    """
    from mllm.config import loading

    recipe = run / "recipe.yaml"
    suites = loading.load(str(recipe)).eval.suites if recipe.is_file() else []
    if not suites:
        raise MLLMError(f"The recipe of {run} names no suites (eval.suites). Name one: --suite coco-karpathy.")
    return suites


def score(
    predictions: Annotated[Path, typer.Argument(metavar="FILE", help="JSON or lines of JSON: an id and an answer.")],
    suite: SuiteName,
    overrides: SuiteOverrides = None,
    data: DataFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; next to FILE by default.")] = None,
    device: DeviceName = None,
) -> None:
    """Score a file of predictions that any system wrote."""
    from mllm.devices import use_device
    from mllm.evaluation import score as run_score

    use_device(device)  # of models that metrics ask
    folder = out or predictions.with_name(f"{predictions.stem}-{Path(suite).stem}")
    report = run_score(predictions, suite, data, limit=limit, out=folder, overrides=overrides or [])
    _print_table(report)
    typer.echo(f"Report: {report.page}")


def compare(
    one: Annotated[Path, typer.Argument(metavar="EVAL", help="An evaluation's folder, RUN/eval/SUITE.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The evaluation to compare it with.")],
    data: DataFolder = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; EVAL/against-OTHER by default.")] = None,
) -> None:
    """Compare two evaluations of the same items and metrics, item by item."""
    from mllm.evaluation import compare as run_compare

    name = "-".join(part for part in other.parts if part not in ("/", "..", ".", "eval"))
    report = run_compare(one, other, data, out=out or one / f"against-{name}")
    _print_table(report)
    typer.echo(f"Report: {report.page}")


def bench(
    what: Annotated[str, typer.Argument(metavar="train|generate|eval|serve|matrix", help="What to measure.")],
    out: Annotated[Path, typer.Option(help="Folder of the results, as JSON.")] = Path("runs/bench"),
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs; the table has medians.")] = 3,
    only: Annotated[str | None, typer.Option(help="Only for train: llava, heavy, target or share.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Only for train: steps of an epoch, 4 by default.")] = None,
    engine: Annotated[str | None, typer.Option(help="Only for serve: the engine, vllm by default.")] = None,
    device: DeviceName = None,
) -> None:
    """Measure speed next to the alternatives, on an otherwise idle machine, or try all parts together (matrix)."""
    from mllm.devices import use_device
    from mllm.evaluation import bench as run_bench

    use_device("cpu" if what == "train" and device is None else device)
    options: dict[str, Any] = {key: value for key, value in (("only", only), ("steps", steps)) if value is not None}
    if what == "train" and device not in (None, "cpu"):
        options["device"] = device
    if options and what != "train":
        raise MLLMError(f"--{next(iter(options))} is for `mllm bench train`. Leave it out.")
    if engine is not None:
        if what != "serve":
            raise MLLMError("--engine is for `mllm bench serve`. Leave it out.")
        options["engine"] = engine
    run_bench(what, out=out, repeats=repeats, progress=typer.echo, **options)


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    summary = report.summary
    table = Table(Column("metric", no_wrap=True), "of", Column("value", no_wrap=True), "gain over it")
    for entry in summary["metrics"]:
        table.add_row(entry["name"], "the model", _value(entry), "")
        for name, other in entry["baselines"].items():
            table.add_row("", name, f"{other['value']:.3f}", _gain(other))
        table.add_section()
    Console().print(table)
    first = summary["metrics"][0]["name"] if summary["metrics"] else None
    if first and 1 < len(summary["kinds"]) <= 10:  # the page has them all
        for kind, values in summary["kinds"].items():
            typer.echo(f"{kind}: {first} {values[first]:.3f}, {values['n']} items" if first in values else kind)
    if skipped := summary.get("skipped"):
        item, error = next(iter(skipped["items"].items()))
        typer.echo(f"Skipped, and in no score: {skipped['n']} items that do not fit, the first {item!r}: {error}")
    typer.echo(f"{summary['suite']}: {summary['n']} items; intervals are 95 %, by bootstrap over items.")


def _value(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.3f}" + ("" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]")


def _gain(other: dict[str, Any]) -> str:
    return f"{other['gain']:+.3f}" + ("" if other["low"] is None else f" [{other['low']:+.3f}, {other['high']:+.3f}]")
