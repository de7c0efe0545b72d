"""Check, train and plan a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli.options import DeviceName, Overrides, RecipeName
from mllm.errors import MLLMError


def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """List all problems of a recipe, or else print its first training example; the exit status is 1 with a problem.

    No weight is loaded. Of the example, what is learned is between « and ».
    """
    from mllm.planning.check import problems
    from mllm.planning.examples import epochs, first_examples

    messages = problems(recipe, overrides or [])
    for message in messages:
        typer.echo(f"- {message}")
    if messages:
        raise MLLMError(f"{recipe}: {len(messages)} problem{'s' if len(messages) > 1 else ''}.")
    _name_missing(recipe, overrides)
    try:
        for stage, (example,) in first_examples(recipe, overrides or [])[:1]:
            typer.echo(f"{stage}, first example, {example}")
        for line in epochs(recipe, overrides or []):
            typer.echo(line)
    except MLLMError as error:  # of the data, which `mllm data check` checks
        typer.echo(f"The first training example cannot be shown: {error}")
    typer.echo(f"{recipe}: no problems.")


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/NAME.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="The folder of an interrupted run, to continue, or one of its checkpoints.")
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Continue although the recipe has changed since the run was started."),
    ] = False,
    device: DeviceName = None,
) -> None:
    """Train a recipe, and first the runs that it needs and that are not there."""
    from mllm.training.signals import Interrupted
    from mllm.training.train import train as run_training

    if _name_missing(recipe, overrides):  # before they are trained, which may take long
        check(recipe, overrides)
    options: dict[str, Any] = {"out": out, "resume": resume, "accept_changes": accept_changes, "device": device}
    try:
        run = run_training(recipe, overrides or [], **options)
    except Interrupted as error:
        typer.echo(f"mllm: {error}", err=True)
        raise typer.Exit(error.status) from None
    plot = run.path / "loss.png"
    typer.echo(f"Trained: {run.path}" + (f" (losses in {plot})" if plot.is_file() else ""))


def features(recipe: RecipeName, overrides: Overrides = None, device: DeviceName = None) -> None:
    """Compute the features of a recipe's images and keep them, before anything is trained.

    It can be interrupted and started again. With `accelerate launch`, every process takes a share of the images.
    """
    from mllm.processes import processes
    from mllm.training.features import make_features
    from mllm.training.signals import Interrupted

    command = ["mllm", "features", recipe, *(overrides or [])]
    try:
        passes = make_features(recipe, overrides or [], device=device, command=command)
    except Interrupted as error:
        typer.echo(f"mllm: {error}", err=True)
        raise typer.Exit(error.status) from None
    for line in map(str, passes) if processes().is_main_process else ():
        typer.echo(line)


def _name_missing(recipe: str, overrides: list[str] | None) -> bool:
    """Print which runs that a recipe needs are not there yet, and return whether there are any."""
    from mllm.config import loading
    from mllm.training.needs import missing

    needs = missing(loading.load(recipe, overrides or []))
    for need in needs:
        typer.echo(need.note)
    return bool(needs)


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="cpu or gpu; on a CPU, batches are computed in parts.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Number of processes, one per device.")] = 1,
    sharding: Annotated[str, typer.Option(help="How the model is sharded: none (DDP) or fsdp.")] = "none",
    memory: Annotated[
        str | None, typer.Option(help="A device's memory (24GiB): print the changes with which the recipe fits.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Peak FLOP/s of a device (312e12), to estimate the time.")] = None,
    utilisation: Annotated[
        float, typer.Option(min=0, max=1, help="The fraction of the peak FLOP/s that is reached (MFU).")
    ] = 0.4,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model and measure a few steps on this machine's device instead.")
    ] = False,
    images: Annotated[int | None, typer.Option(min=1, help="Images in the data; default: counted.")] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=2, help="Text tokens of an example; default: those of the data, or 64.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processor cores of a process that open and preprocess images.")
    ] = 8,
    image_ms: Annotated[
        float, typer.Option(min=0, help="Milliseconds that a core takes to open and preprocess an image.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Estimate a recipe's parameters, memory, FLOPs, feature cache and time, without loading weights."""
    from mllm.cli.plan import run as run_plan

    options = {"device": device, "processes": processes, "sharding": sharding, "flops": flops}
    options |= {"utilisation": utilisation, "images": images, "text": text_tokens}
    options |= {"workers": workers, "image_seconds": image_ms / 1000}
    run_plan(recipe, overrides or [], options, memory=memory, probe=probe, as_json=as_json)
