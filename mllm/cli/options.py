"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a path to a YAML file.")]


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Dotted overrides of the recipe.")]


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a saved model.")]


Tokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer, at most.")]


SuiteName = Annotated[str, typer.Option(help="A suite's name, or the path of its YAML file.")]


SuiteOverrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Overrides of the suite.")]


DataFolder = Annotated[Path | None, typer.Option(help="The folder of the suite's files, if not embedded.")]


Index = Annotated[Path | None, typer.Option(help="What `mllm index build` wrote: answers show images of it.")]


ImageLogitBias = Annotated[
    float, typer.Option(help="Added to the logit of an image's first token: above 0 more images are shown.")
]


Eager = Annotated[float | None, typer.Option("--eager", hidden=True, help="The former name of --image-logit-bias.")]


Shown = Annotated[Path, typer.Option(help="Where images that are made are saved; found ones are named where they are.")]


Lines = Annotated[bool, typer.Option("--jsonl", help="A line of JSON for each picture: image, and text or error.")]


RunOption = Annotated[Path, typer.Option(help="A run, or a saved model, with a retrieval head.")]
