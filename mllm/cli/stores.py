"""Manage stored data: build and search an image index, check a recipe's data, install embedded parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli.loading import load_run
from mllm.cli.options import DeviceName, DTypeName, Overrides, RecipeName, RunOption, Trusted
from mllm.errors import MLLMError


def build_index(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Image files, folders or glob patterns.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The index's file.")],
    run: RunOption,
    device: DeviceName = None,
    dtype: DTypeName = None,
    trust_remote_code: Trusted = None,
) -> None:
    """Build an index of images for the model's retrieval head."""
    from mllm.media.images import find_images
    from mllm.scorers.index import ImageIndex

    paths = find_images(images)
    ImageIndex.build(load_run(run, device, dtype, trust_remote_code), paths).save(out)
    typer.echo(f"{out}: {len(paths)} images.")


def find_images(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="The index file of `mllm index build`.")],
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="The description of the image: 'A picture of a red apple'.")
    ],
    run: RunOption,
    count: Annotated[int, typer.Option(min=1, help="How many images, the closest first.")] = 5,
    device: DeviceName = None,
    dtype: DTypeName = None,
    trust_remote_code: Trusted = None,
) -> None:
    """Find images of an index by a text."""
    from mllm.scorers.index import opened

    loaded = opened(index, run)  # another model's index is refused before the model is loaded
    for image in load_run(run, device, dtype, trust_remote_code).retrieve([[text]], loaded, count)[0]:
        typer.echo(f"{image.score:.3f}  {image.source}")


def check_data(
    recipe: RecipeName,
    overrides: Overrides = None,
    data: Annotated[
        Path | None, typer.Option(help="The folder of the suites' files, unless they are embedded parts.")
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print so many training examples as they are tokenized, what is learned marked.")
    ] = 0,
) -> None:
    """Open every image and count every example of a recipe's data; the exit status is 1 if there is a problem."""
    from rich.console import Console
    from rich.table import Table

    from mllm.planning.data_check import inspect
    from mllm.planning.examples import first_examples
    from mllm.processes import progress

    for stage, examples in first_examples(recipe, overrides or [], show) if show else []:
        for number, example in enumerate(examples, start=1):
            typer.echo(f"{stage}, example {number}, {example}")
    with progress() as bar:
        task = bar.add_task("reading", total=None, note="")
        sources, shared = inspect(recipe, overrides or [], lambda items: bar.track(items, task_id=task), data=data)
    table = Table("source", "items", "answers", "images", "tokens", "examples")
    for source in sources:
        bins = source.histogram()
        highest = max((count for _, _, count in bins), default=0)
        ranges = "\n".join(f"{start}-{end}" for start, end, _ in bins)
        bars = "\n".join(f"{count:>7} {'#' * -(-20 * count // highest)}" for _, _, count in bins)
        table.add_row(source.name, *map(str, (source.items, source.answers, source.images)), ranges, bars)
    Console().print(table)
    for note in (note for source in sources for note in source.notes):
        typer.echo(f"- {note}")
    problems = [problem for source in sources for problem in source.problems] + shared
    for problem in problems:
        typer.echo(f"- {problem}")
    if problems:
        raise MLLMError(f"{recipe}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the data.")
    typer.echo(f"{recipe}: no problems in the data.")


def list_parts() -> None:
    """List the embedded parts."""
    from rich.console import Console
    from rich.table import Column, Table

    from mllm.hub import embedded as parts

    table = Table(Column("part", no_wrap=True), "group", "licence", "MB", "installed", "source")
    for row in parts.listing():
        table.add_row(row.name, row.group, row.licence, str(row.size), "yes" if row.installed else "", row.source)
    Console().print(table)


def install_parts(names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None) -> None:
    """Download, verify and convert embedded parts (all of them, if none is named)."""
    from mllm.hub import embedded as parts

    parts.install(names or None, report=typer.echo)
