"""Answer with a trained model: the commands caption, ask, chat and serve; and export it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mllm.assembly import Assembly

from mllm.cli.loading import load_run
from mllm.cli.options import (
    DeviceName,
    DTypeName,
    Eager,
    EngineOption,
    ImageLogitBias,
    Index,
    Lines,
    RunPath,
    Shown,
    Tokens,
    Trusted,
    Words,
)
from mllm.errors import MLLMError, warn_renamed
from mllm.system import share_heap

if TYPE_CHECKING:  # imported by the commands that need it
    from mllm.assembly import Assembly


def caption(
    run: RunPath,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, folders or glob patterns.")],
    max_new_tokens: Tokens = None,
    jsonl: Lines = False,
    words: Words = False,
    index: Index = None,
    image_logit_bias: ImageLogitBias = 0.0,
    eager: Eager = None,
    show: Shown = Path("shown"),
    device: DeviceName = None,
    dtype: DTypeName = None,
    engine: EngineOption = None,
    trust_remote_code: Trusted = None,
) -> None:
    """Caption images."""
    options = _image_options(run, index, image_logit_bias, eager)
    model = load_run(run, device, dtype, trust_remote_code, engine)
    options |= {"kind": "caption", **_decoding(max_new_tokens)}
    _print_answers(model, images, model.spec.prompt.caption, jsonl, words, show, **options)


def ask(
    run: RunPath,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file, a folder or a glob pattern.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    max_new_tokens: Tokens = None,
    jsonl: Lines = False,
    words: Words = False,
    index: Index = None,
    image_logit_bias: ImageLogitBias = 0.0,
    eager: Eager = None,
    show: Shown = Path("shown"),
    device: DeviceName = None,
    dtype: DTypeName = None,
    engine: EngineOption = None,
    trust_remote_code: Trusted = None,
) -> None:
    """Ask a question about one image or several."""
    options = _image_options(run, index, image_logit_bias, eager)
    model = load_run(run, device, dtype, trust_remote_code, engine)
    text = model.spec.prompt.question.format(question=question)
    options |= {"kind": "question", **_decoding(max_new_tokens)}
    _print_answers(model, [image], text, jsonl, words, show, **options)


def chat(
    run: RunPath,
    images: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Images of the first turn.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    history: Annotated[Path | None, typer.Option(help="A conversation file of /save, to continue.")] = None,
    max_new_tokens: Tokens = None,
    index: Index = None,
    image_logit_bias: ImageLogitBias = 0.0,
    eager: Eager = None,
    show: Shown = Path("shown"),
    device: DeviceName = None,
    dtype: DTypeName = None,
    engine: EngineOption = None,
    trust_remote_code: Trusted = None,
) -> None:
    """Chat about images; /help lists the commands of the chat."""
    from mllm.cli.terminal import converse, read_history
    from mllm.readout.tokens import can_draw

    messages = read_history(history) if history else []
    options = _image_options(run, index, image_logit_bias, eager)
    model = load_run(run, device, dtype, trust_remote_code, engine)
    with_images = {"folder": show, **options} if options or can_draw(model) else None
    converse(model.chat(system, messages), images or [], with_images, **_decoding(max_new_tokens))


def serve(
    run: RunPath,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="MLLM_TOKEN", help="A bearer token that requests must send.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Maximum batch size; with an engine, requests at the same time.")
    ] = 16,
    waiting: Annotated[int, typer.Option(min=1, help="Maximum queued requests; more get status 429.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 512,
    max_images: Annotated[int, typer.Option(min=0, help="Maximum images of a request.")] = 8,
    max_body: Annotated[int, typer.Option(min=1, help="Maximum size of a request in MB.")] = 32,
    max_bodies: Annotated[int, typer.Option(min=1, help="Maximum size of all requests being read in MB.")] = 256,
    max_pixels: Annotated[int, typer.Option(min=1, help="Maximum megapixels of the images of all requests.")] = 128,
    max_text: Annotated[int, typer.Option(min=1, help="Maximum characters of the texts of a request.")] = 2**19,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds in which a request must be sent.")] = 30.0,
    allow_host: Annotated[list[str] | None, typer.Option(help="A host that images may be downloaded from.")] = None,
    allow_folder: Annotated[list[Path] | None, typer.Option(help="A folder that images may be read from.")] = None,
    index: Index = None,
    image_logit_bias: ImageLogitBias = 0.0,
    eager: Eager = None,
    device: DeviceName = None,
    dtype: DTypeName = None,
    engine: EngineOption = None,
    trust_remote_code: Trusted = None,
) -> None:
    """Serve a model over HTTP: OpenAI's chat completions API, and a chat page at /."""
    from mllm.readout.tokens import can_draw

    try:
        from mllm.serve.app import create_app
        from mllm.serve.connection import bind
        from mllm.serve.connection import run as run_server
        from mllm.serve.schema import Limits
    except ImportError as error:
        raise MLLMError(
            f"The server needs {error.name}, which is not installed: pip install 'mllm-assembly[serve]'."
        ) from None
    limits = Limits(
        body=max_body * 2**20,
        bodies=max_bodies * 2**20,
        pixels=max_pixels * 10**6,
        characters=max_text,
        deadline=deadline,
        images=max_images,
        max_new_tokens=max_new_tokens,
        batch=batch,
        waiting=waiting,
        hosts=allow_host or (),
        folders=allow_folder or (),
        token=os.environ.get("MLLM_TOKEN") if token is None else token,  # an empty variable is no option
    )
    options = _image_options(run, index, image_logit_bias, eager)
    share_heap()
    with bind(host, port) as bound:  # before the model is loaded, which takes a while
        model = load_run(run, device, dtype, trust_remote_code, engine)
        show = {"index": None, "image_logit_bias": 0.0, **options} if options or can_draw(model) else None
        run_server(create_app(model, run.resolve().name, limits, show), limits, bound)


def export(
    run: RunPath,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The new folder.")],
    to: Annotated[
        str, typer.Option(help="The format: hf-llava, hf-llava-next, hf-llava-onevision, hf-internvl or hf-blip2.")
    ],
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    trust_remote_code: Trusted = None,
) -> None:
    """Export a model as an equivalent transformers class, and compare the two."""
    from mllm.build import load
    from mllm.export.export import export as export_model

    comparisons = export_model(
        load(run, device="cpu", trust_remote_code=trust_remote_code or ()), folder, to=to, dtype=dtype
    )
    largest = max(comparison.difference for comparison in comparisons)
    equal = sum(comparison.tokens == comparison.stock for comparison in comparisons)
    typer.echo(
        f"{folder}: on {len(comparisons)} probes logits differ by at most {largest:.3g}, and {equal} of the answers "
        "are equal."
    )


def _image_options(run: Path, index: Path | None, bias: float, eager: float | None) -> dict[str, Any]:
    """Return the options of answers with images; another model's index is refused before a model is loaded."""
    from mllm.scorers.index import opened

    if eager is not None:
        warn_renamed("The option --eager", "--image-logit-bias")
        bias = eager
    return ({} if index is None else {"index": opened(index, run)}) | ({"image_logit_bias": bias} if bias else {})


def _print_answers(
    model: Assembly, images: list[str], text: str, jsonl: bool, words: bool, show: Path, **decoding: Any
) -> None:
    """Print the answer for every image; an image that cannot be read does not stop the others."""
    from mllm.answering.generate import answer_each
    from mllm.media.images import find_images
    from mllm.outputs import with_files

    errors = []
    paths = find_images(images)
    for path, answer in zip(paths, answer_each(model, paths, text, **decoding), strict=True):
        if isinstance(answer, MLLMError):
            errors.append(answer)
            if jsonl:
                _print_line(image=str(path), error=str(answer))
            continue
        nearest = {"words": model.words([path])[0]} if words else {}
        line = with_files(answer, show)
        if jsonl:
            _print_line(image=str(path), text=line, **nearest)
        else:
            typer.echo(f"{path}: {line}")
            _print_words(**nearest)
    if errors and len(paths) == 1:
        raise MLLMError(str(errors[0]))
    if errors:
        details = "".join(f"\n  {error}" for error in errors)
        raise MLLMError(
            f"{len(errors)} of {len(paths)} images could not be read; the others were answered. Check these files:"
            f"{details}"
        )


def _print_line(**values: Any) -> None:
    """Print a line of JSON."""
    typer.echo(json.dumps(values, ensure_ascii=False))


def _print_words(words: list[str] | None = None) -> None:
    """Print an image's words below its answer, if there are any to print."""
    from mllm.readout.words import readable

    if words is not None:
        typer.echo(f"  words: {readable(words)}")


def _decoding(max_new_tokens: int | None) -> dict[str, Any]:
    """Return the decoding options that were given."""
    return {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
