"""Commands on what is stored: an index of images, a recipe's data, embedded parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli.options import Overrides, RecipeName, RunOption
from mllm.errors import MLLMError


def build_index(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Picture files, folders or patterns.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The index's file.")],
    run: RunOption,
) -> None:
    """Build an index of pictures, which the model's retrieval head searches."""
    from mllm.build import load
    from mllm.media.images import find_images
    from mllm.scorers.index import ImageIndex

    paths = find_images(images)
    ImageIndex.build(load(run), paths).save(out)
    typer.echo(f"{out}: {len(paths)} pictures.")


def find_images(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="What `mllm index build` wrote.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is looked for: 'A picture of a red apple'.")],
    run: RunOption,
    count: Annotated[int, typer.Option(min=1, help="Pictures, the closest first.")] = 5,
) -> None:
    """Find pictures by words."""
    from mllm.build import load
    from mllm.scorers.index import opened

    found = opened(index, run)  # another model's is refused before anything is loaded
    for image in load(run).retrieve([[text]], found, count)[0]:
        typer.echo(f"{image.score:.3f}  {image.source}")


def check_data(
    recipe: RecipeName,
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="The folder of the suites' files, if not embedded.")] = None,
) -> None:
    """Open every picture and count every example of a recipe's data; status 1 if anything is wrong."""
    from rich.console import Console
    from rich.table import Table

    from mllm.planning.data_check import inspect
    from mllm.processes import progress

    with progress() as bar:
        task = bar.add_task("reading", total=None, note="")
        found, shared = inspect(recipe, overrides or [], lambda items: bar.track(items, task_id=task), data=data)
    table = Table("source", "items", "answers", "images", "tokens", "examples")
    for source in found:
        bins = source.histogram()
        most = max((count for _, _, count in bins), default=0)
        ranges = "\n".join(f"{start}-{end}" for start, end, _ in bins)
        bars = "\n".join(f"{count:>7} {'#' * -(-20 * count // most)}" for _, _, count in bins)
        table.add_row(source.name, *map(str, (source.items, source.answers, source.images)), ranges, bars)
    Console().print(table)
    problems = [problem for source in found for problem in source.problems] + shared
    for problem in problems:
        typer.echo(f"- {problem}")
    if problems:
        raise MLLMError(f"{recipe}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the data.")
    typer.echo(f"{recipe}: nothing found against its data.")


def list_parts() -> None:
    """List the embedded parts."""
    from rich.console import Console
    from rich.table import Column, Table

    from mllm.hub import embedded as parts

    table = Table(Column("part", no_wrap=True), "group", "licence", "MB", "installed", "what it is")
    for row in parts.listing():
        table.add_row(row.name, row.group, row.licence, str(row.size), "yes" if row.installed else "", row.source)
    Console().print(table)


def install_parts(names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None) -> None:
    """Download, check and convert embedded parts (all of them, if none is named)."""
    from mllm.hub import embedded as parts

    parts.install(names or None, report=typer.echo)
