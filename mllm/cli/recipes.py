"""Commands on the recipes that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.errors import MLLMError


def recipes(context: typer.Context) -> None:
    """List the recipes: paper, parts, trained weights, what they reached."""
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

    typer.echo(recipe.find(name).read_text(), nl=False)


def verify_recipe(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every recipe that names suites.")] = False,
    seeds: Annotated[int, typer.Option(help="Runs a recipe, with seeds 0, 1, ...", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the results, and of their table, index.md.")] = Path(
        "runs/verify/results"
    ),
    runs: Annotated[Path, typer.Option(help="Folder of the runs; a finished one is not trained again.")] = Path(
        "runs/verify"
    ),
) -> None:
    """Train recipes with several seeds and hold them against their baselines."""
    from mllm.config import loading as recipe
    from mllm.evaluation import results_table, verify

    if every:
        names = [name for name in recipe.names() if recipe.load(name).eval.suites]
    if not names:
        raise MLLMError("Name a recipe to verify, or say --all.")
    for name in names:
        verify(name, out=out, seeds=range(seeds), runs=runs)
    typer.echo(results_table(recipe.names(), out))


def _part_names(config: Any) -> tuple[str | None, ...]:
    encoder, lm, connector = config.encoder, config.lm, config.connector
    return encoder and encoder.label, connector and connector.type, lm and lm.model
