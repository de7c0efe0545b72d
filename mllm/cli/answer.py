"""Commands that answer: captions, questions, chat, the server; and the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mllm.assembly import Assembly

from mllm.cli.options import Eager, ImageLogitBias, Index, Lines, RunPath, Shown, Tokens
from mllm.errors import MLLMError, warn_renamed


def caption(
    run: RunPath,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files, folders or patterns.")],
    max_new_tokens: Tokens = None,
    jsonl: Lines = False,
    index: Index = None,
    image_logit_bias: ImageLogitBias = 0.0,
    eager: Eager = None,
    show: Shown = Path("shown"),
) -> None:
    """Describe pictures."""
    from mllm.build import load

    options = _showing(run, index, image_logit_bias, eager)
    model = load(run)
    _tell(model, images, model.spec.prompt.caption, jsonl, show, **options, **_decoding(max_new_tokens))


def ask(
    run: RunPath,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file, a folder or a pattern.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    max_new_tokens: Tokens = None,
    jsonl: Lines = False,
    index: Index = None,
    image_logit_bias: ImageLogitBias = 0.0,
    eager: Eager = None,
    show: Shown = Path("shown"),
) -> None:
    """Ask about a picture, or the same about several."""
    from mllm.build import load

    options = _showing(run, index, image_logit_bias, eager)
    model = load(run)
    text = model.spec.prompt.question.format(question=question)
    _tell(model, [image], text, jsonl, show, **options, **_decoding(max_new_tokens))


def chat(
    run: RunPath,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures of the first turn.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    history: Annotated[Path | None, typer.Option(help="A conversation that /save wrote, to go on with.")] = None,
    max_new_tokens: Tokens = None,
    index: Index = None,
    image_logit_bias: ImageLogitBias = 0.0,
    eager: Eager = None,
    show: Shown = Path("shown"),
) -> None:
    """Talk about pictures; /help lists what else can be typed."""
    from mllm.build import load
    from mllm.cli.terminal import converse, read_history
    from mllm.readout.tokens import can_draw

    messages = read_history(history) if history else []
    options = _showing(run, index, image_logit_bias, eager)
    model = load(run)
    shown = {"folder": show, **options} if options or can_draw(model) else None
    converse(model.chat(system, messages), images or [], shown, **_decoding(max_new_tokens))


def serve(
    run: RunPath,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="MLLM_TOKEN", help="A bearer token that requests must carry.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are decoded together, at most.")] = 16,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get status 429.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    max_images: Annotated[int, typer.Option(min=0, help="Images of a request, at most.")] = 8,
    max_body: Annotated[int, typer.Option(min=1, help="MB of a request, at most.")] = 32,
    allow_host: Annotated[list[str] | None, typer.Option(help="A host that pictures may be downloaded from.")] = None,
    allow_folder: Annotated[list[Path] | None, typer.Option(help="A folder that pictures may be read from.")] = None,
    index: Index = None,
    image_logit_bias: ImageLogitBias = 0.0,
    eager: Eager = None,
) -> None:
    """Serve a model over HTTP: OpenAI's chat completions, and a chat page at /."""
    from mllm.build import load
    from mllm.readout.tokens import can_draw

    try:
        import uvicorn

        from mllm.serve.app import create_app
        from mllm.serve.schema import Limits
    except ImportError as error:
        raise MLLMError(f"The server needs {error.name}: pip install 'mllm-assembly[serve]'.") from None
    limits = Limits(
        body=max_body * 2**20,
        images=max_images,
        max_new_tokens=max_new_tokens,
        batch=batch,
        waiting=waiting,
        hosts=allow_host or (),
        folders=allow_folder or (),
        token=token,
    )
    options = _showing(run, index, image_logit_bias, eager)
    model = load(run)
    show = {"index": None, "image_logit_bias": 0.0, **options} if options or can_draw(model) else None
    server = create_app(model, run.resolve().name, limits, show)
    uvicorn.run(server, host=host, port=port, log_level="info", timeout_keep_alive=5)


def export(
    run: RunPath,
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    to: Annotated[str, typer.Option(help="hf-llava or hf-blip2.")],
) -> None:
    """Write a stock class of transformers, where the model equals it exactly; compare the two."""
    from mllm.build import load
    from mllm.export.export import export as write_stock

    found = write_stock(load(run), folder, to=to)
    worst = max(one.difference for one in found)
    typer.echo(f"{folder}: on {len(found)} probes logits differ by at most {worst:.3g}, and all tokens are equal.")


def _showing(run: Path, index: Path | None, bias: float, eager: float | None) -> dict[str, Any]:
    """Return the options of answers with images; another model's index is refused before anything is loaded."""
    from mllm.scorers.index import opened

    if eager is not None:
        warn_renamed("The option --eager", "--image-logit-bias")
        bias = eager
    return ({} if index is None else {"index": opened(index, run)}) | ({"image_logit_bias": bias} if bias else {})


def _tell(model: Assembly, images: list[str], text: str, jsonl: bool, show: Path, **decoding: Any) -> None:
    """Print what the model says to every picture; one that cannot be read costs the others nothing."""
    from mllm.answering.generate import answer_each
    from mllm.media.images import find_images
    from mllm.outputs import with_files

    wrong = []
    paths = find_images(images)
    for path, answer in zip(paths, answer_each(model, paths, text, **decoding), strict=True):
        bad = isinstance(answer, MLLMError)
        if bad:
            wrong.append(answer)
        said = str(answer) if isinstance(answer, MLLMError) else with_files(answer, show)
        if jsonl:
            typer.echo(json.dumps({"image": str(path), "error" if bad else "text": said}, ensure_ascii=False))
        elif not bad:
            typer.echo(f"{path}: {said}")
    if wrong and len(paths) == 1:
        raise MLLMError(str(wrong[0]))
    if wrong:
        listed = "".join(f"\n  {error}" for error in wrong)
        raise MLLMError(
            f"{len(wrong)} of {len(paths)} pictures could not be read, the others have their answer:{listed}"
        )


def _decoding(max_new_tokens: int | None) -> dict[str, Any]:
    return {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
