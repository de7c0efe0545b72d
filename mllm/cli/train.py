"""Commands that check and train a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli.options import Overrides, RecipeName
from mllm.errors import MLLMError


def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """List everything in a recipe that does not fit, from configurations only; status 1 if there is anything."""
    from mllm.planning.check import problems

    found = problems(recipe, overrides or [])
    for problem in found:
        typer.echo(f"- {problem}")
    if found:
        raise MLLMError(f"{recipe}: {len(found)} problem{'s' if len(found) > 1 else ''}.")
    typer.echo(f"{recipe}: nothing found against it.")


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME if left out.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run that was interrupted, to go on with.")] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although the recipe changed since the run was started.")
    ] = False,
) -> None:
    """Train a recipe."""
    from mllm.training.train import train as run_training

    run = run_training(recipe, overrides or [], out=out, resume=resume, accept_changes=accept_changes)
    typer.echo(f"Trained: {run.path} (losses in {run.path / 'loss.png'})")


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="cpu or gpu: on a CPU batches pass in parts.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Processes, one for each device.")] = 1,
    sharding: Annotated[str, typer.Option(help="What processes divide: none (DDP) or fsdp.")] = "none",
    memory: Annotated[str | None, typer.Option(help="Of a device (24GiB): what to change if it is too little.")] = None,
    flops: Annotated[float | None, typer.Option(help="FLOP/s a device can do (312e12): gives the time.")] = None,
    utilisation: Annotated[float, typer.Option(min=0, max=1, help="The share of them that is reached.")] = 0.4,
    probe: Annotated[bool, typer.Option("--probe", help="Load the model and time a few steps here instead.")] = False,
    images: Annotated[int | None, typer.Option(min=1, help="Pictures in the data; counted if left out.")] = None,
    text_tokens: Annotated[int | None, typer.Option(min=2, help="Of an example; counted if left out, or 64.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a recipe will take: parameters, memory, FLOPs, features, time. Nothing is loaded."""
    from mllm.cli.plan import run as run_plan

    options = {"device": device, "processes": processes, "sharding": sharding, "flops": flops}
    options |= {"utilisation": utilisation, "images": images, "text": text_tokens}
    run_plan(recipe, overrides or [], options, memory=memory, probe=probe, as_json=as_json)
