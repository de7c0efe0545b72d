"""Define the arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or the path of a YAML file.")]


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Overrides of recipe keys, by dotted path.")
]


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run or of a saved model.")]


Tokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Maximum tokens of an answer.")]


SuiteName = Annotated[str, typer.Option(help="A suite's name, or the path of its YAML file.")]


SuiteOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Overrides of suite keys, by dotted path.")
]


DataFolder = Annotated[
    Path | None, typer.Option(help="The folder of the suite's files, unless they are an embedded part.")
]


Index = Annotated[Path | None, typer.Option(help="An index file of `mllm index build`: answers show its images.")]


ImageLogitBias = Annotated[
    float,
    typer.Option(help="Added to the logit of an image's first token: above 0 more images are shown."),
]


Eager = Annotated[float | None, typer.Option("--eager", hidden=True, help="The former name of --image-logit-bias.")]


Shown = Annotated[Path, typer.Option(help="The folder for generated images; retrieved images are not copied.")]


Lines = Annotated[bool, typer.Option("--jsonl", help="Print a line of JSON for each image: image, and text or error.")]


RunOption = Annotated[Path, typer.Option(help="The folder of a run or saved model with a retrieval head.")]


Words = Annotated[bool, typer.Option("--words", help="Also print the nearest word of each visual token.")]


DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="Where to compute: cuda, cuda:1, mps or cpu; a GPU where there is one by default."),
]


DTypeName = Annotated[
    str | None,
    typer.Option("--dtype", help="Of the frozen weights: float32, bfloat16 or float16; as in training by default."),
]


Trusted = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-remote-code", help="A part (encoder or lm) that may run Python code from its model's repository."
    ),
]


EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="What runs the language model's layers: transformers, vllm, or URLs of vLLM's server, with commas.",
    ),
]
