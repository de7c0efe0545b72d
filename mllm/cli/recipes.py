"""List, show, verify and compare the recipes of the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm.cli.options import DataFolder, DeviceName, Overrides, RecipeName
from mllm.errors import MLLMError

if TYPE_CHECKING:  # imported by the commands that need it
    from mllm.config.recipe import Recipe


def recipes(context: typer.Context) -> None:
    """List the recipes: paper, parts, trained weights, and results."""
    if context.invoked_subcommand is not None:
        return
    from mllm.config import loading as recipe
    from mllm.evaluation import result_lines

    for name in recipe.names():
        config = recipe.load(name)
        parts = " + ".join(str(part) for part in _part_names(config) if part)
        typer.echo(f"{name:<22}{config.about}")
        for line in filter(None, (config.paper, parts, *result_lines(name))):
            typer.echo(f"{'':<22}{line}")


def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a recipe's YAML."""
    from mllm.config import loading as recipe
    from mllm.config.yaml_text import read_text

    typer.echo(read_text(recipe.find(name)), nl=False)


def verify_recipe(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    every: Annotated[bool, typer.Option("--all", help="Verify every recipe whose suites are embedded.")] = False,
    seeds: Annotated[int, typer.Option(help="Runs per recipe, with the seeds 0, 1, ...", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="The folder of the results and of their table, index.md.")] = Path(
        "runs/verify/results"
    ),
    runs: Annotated[Path, typer.Option(help="The folder of the runs; a finished run is not trained again.")] = Path(
        "runs/verify"
    ),
    device: DeviceName = None,
) -> None:
    """Train recipes with several seeds, and compare the results with their baselines."""
    from mllm.config import loading as recipe
    from mllm.devices import use_device
    from mllm.evaluation import has_embedded_suites, results_table, verify

    use_device(device)
    if every:
        names = [name for name in recipe.names() if has_embedded_suites(name)]
    if not names:
        raise MLLMError("There is no recipe to verify: expected names or --all. Name a recipe, or pass --all.")
    for name in names:
        verify(name, out=out, seeds=range(seeds), runs=runs)
    typer.echo(results_table(recipe.names(), out))


def compare_recipe(
    recipe: RecipeName,
    overrides: Overrides = None,
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=V,V",
            help="A key and its values, as a YAML list with or without brackets; all combinations are compared. Keys "
            "that change together: KEY,KEY=[V,V],[V,V].",
        ),
    ] = [],  # noqa: B006
    suites: Annotated[
        str | None, typer.Option(help="Suites with commas, or mappings as in eval.suites; by default the recipe's.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs per combination, with the seeds 0, 1, ...", min=1)] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items of each suite only.")] = None,
    data: DataFolder = None,
    baselines: Annotated[
        str, typer.Option(help="Baselines of each evaluation's own report: names with commas, all, or none.")
    ] = "none",
    out: Annotated[
        Path | None, typer.Option(help="The folder of the page and the table; default: runs/compare/NAME.")
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="The folder of the runs, by default inside --out; what is finished there is not repeated."),
    ] = None,
    device: DeviceName = None,
) -> None:
    """Train and evaluate variations of a recipe, and compare them with the recipe as it stands.

    A comparison that was interrupted continues. Combinations that differ only in decoding share a run.
    """
    from mllm.devices import use_device
    from mllm.evaluation import compare_variations
    from mllm.training.signals import Interrupted

    use_device(device)
    options: dict[str, Any] = {"vary": vary, "suites": suites, "seeds": range(seeds), "limit": limit, "data": data}
    options |= {"baselines": [] if baselines == "none" else baselines.split(","), "runs": runs, "out": out}
    try:
        typer.echo(compare_variations(recipe, overrides or [], progress=typer.echo, **options))
    except Interrupted as error:
        typer.echo("mllm: interrupted; the same command continues.", err=True)
        raise typer.Exit(error.status) from None


def _part_names(config: Recipe) -> tuple[str | None, ...]:
    """Return the names of a recipe's encoder, connector and language model."""
    encoder, lm, connector = config.encoder, config.lm, config.connector
    return (
        None if encoder is None else encoder.label,
        None if connector is None else connector.type,
        None if lm is None else lm.model,
    )
