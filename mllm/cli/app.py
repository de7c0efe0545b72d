"""The commands. Each reads its arguments, calls the library, and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli.options import DataFolder, Overrides, RecipeName, RunPath, SuiteName, SuiteOverrides, Tokens
from mllm.errors import MLLMError
from mllm.version import __version__

app = typer.Typer(
    name="mllm",
    help="Build a multimodal language model from a frozen encoder, a frozen language model and a trained connector.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="The recipes that come with the package.", invoke_without_command=True)
parts_app = typer.Typer(
    help="The embedded parts: small real models and data, out of pinned packages.", no_args_is_help=True
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(parts_app, name="parts")
data_app = typer.Typer(help="A recipe's data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
index_app = typer.Typer(help="Pictures that a model finds.", no_args_is_help=True)
app.add_typer(index_app, name="index")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog="`--debug` anywhere shows the traceback of an error.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """List everything in a recipe that does not fit, from configurations only; status 1 if there is anything."""
    from mllm.planning.check import problems

    found = problems(recipe, overrides or [])
    for problem in found:
        typer.echo(f"- {problem}")
    if found:
        raise MLLMError(f"{recipe}: {len(found)} problem{'s' if len(found) > 1 else ''}.")
    typer.echo(f"{recipe}: nothing found against it.")


@app.command()
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


@app.command()
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


@app.command("eval")
def evaluate(
    run: RunPath,
    suite: SuiteName,
    overrides: SuiteOverrides = None,
    data: DataFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; RUN/eval/SUITE if left out.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="Of blind, shuffled (usual), mean-image, random-connector; with commas, or all, or none."),
    ] = None,
) -> None:
    """Run a suite on a model, beside baselines; one that was killed goes on."""
    from mllm.build import load
    from mllm.evaluation import evaluate as run_suite

    every = {"all": ["blind", "shuffled", "mean-image", "random-connector"], "none": []}
    report = run_suite(
        load(run),
        suite,
        data,
        limit=limit,
        out=out or run / "eval" / Path(suite).stem,
        run=str(run),
        baselines=None if baselines is None else every.get(baselines, baselines.split(",")),
        overrides=overrides or [],
    )
    if report.page:  # of several processes the main one alone
        _print_table(report)
        typer.echo(f"Report: {report.page}")


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(metavar="FILE", help="JSON or lines of JSON: an id and an answer.")],
    suite: SuiteName,
    overrides: SuiteOverrides = None,
    data: DataFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first items only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; beside FILE if left out.")] = None,
) -> None:
    """Score a file of predictions that any system wrote."""
    from mllm.evaluation import score as run_score

    place = out or predictions.with_name(f"{predictions.stem}-{Path(suite).stem}")
    report = run_score(predictions, suite, data, limit=limit, out=place, overrides=overrides or [])
    _print_table(report)
    typer.echo(f"Report: {report.page}")


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(metavar="EVAL", help="An evaluation's folder, RUN/eval/SUITE.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The one it is held against.")],
    data: DataFolder = None,
    out: Annotated[Path | None, typer.Option(help="Where the report goes; EVAL/against-OTHER if left out.")] = None,
) -> None:
    """Hold one evaluation against another of the same items and metrics, item by item."""
    from mllm.evaluation import compare as run_compare

    name = "-".join(part for part in other.parts if part not in ("/", "..", ".", "eval"))
    report = run_compare(one, other, data, out=out or one / f"against-{name}")
    _print_table(report)
    typer.echo(f"Report: {report.page}")


Index = Annotated[Path | None, typer.Option(help="What `mllm index build` wrote: answers show images of it.")]
Eager = Annotated[float, typer.Option(help="Above 0 more images are shown, below 0 fewer.")]
Shown = Annotated[Path, typer.Option(help="Where images that are made are saved; found ones are named where they are.")]
Lines = Annotated[bool, typer.Option("--jsonl", help="A line of JSON for each picture: image, and text or error.")]


@app.command()
def caption(
    run: RunPath,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files, folders or patterns.")],
    max_new_tokens: Tokens = None,
    jsonl: Lines = False,
    index: Index = None,
    eager: Eager = 0.0,
    show: Shown = Path("shown"),
) -> None:
    """Describe pictures."""
    from mllm.build import load

    options = _showing(run, index, eager)
    model = load(run)
    _tell(model, images, model.spec.prompt.caption, jsonl, show, **options, **_decoding(max_new_tokens))


@app.command()
def ask(
    run: RunPath,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file, a folder or a pattern.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION")],
    max_new_tokens: Tokens = None,
    jsonl: Lines = False,
    index: Index = None,
    eager: Eager = 0.0,
    show: Shown = Path("shown"),
) -> None:
    """Ask about a picture, or the same about several."""
    from mllm.build import load

    options = _showing(run, index, eager)
    model = load(run)
    text = model.spec.prompt.question.format(question=question)
    _tell(model, [image], text, jsonl, show, **options, **_decoding(max_new_tokens))


@app.command()
def chat(
    run: RunPath,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures of the first turn.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    history: Annotated[Path | None, typer.Option(help="A conversation that /save wrote, to go on with.")] = None,
    max_new_tokens: Tokens = None,
    index: Index = None,
    eager: Eager = 0.0,
    show: Shown = Path("shown"),
) -> None:
    """Talk about pictures; /help lists what else can be typed."""
    from mllm.build import load
    from mllm.cli.terminal import converse, read_history

    messages = read_history(history) if history else []
    options = _showing(run, index, eager)
    model = load(run)
    shown = {"folder": show, **options} if options or model.draws else None
    converse(model.chat(system, messages), images or [], shown, **_decoding(max_new_tokens))


@app.command()
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
    eager: Eager = 0.0,
) -> None:
    """Serve a model over HTTP: OpenAI's chat completions, and a chat page at /."""
    from mllm.build import load

    try:
        import uvicorn

        from mllm.serve.app import Limits, create_app
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
    options = _showing(run, index, eager)
    model = load(run)
    show = {"index": None, "eager": 0.0, **options} if options or model.draws else None
    server = create_app(model, run.resolve().name, limits, show)
    uvicorn.run(server, host=host, port=port, log_level="info", timeout_keep_alive=5)


@app.command()
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


RunOption = Annotated[Path, typer.Option(help="A run, or a saved model, with a retrieval head.")]


@index_app.command("build")
def build_index(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Picture files, folders or patterns.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The index's file.")],
    run: RunOption,
) -> None:
    """Build an index of pictures, which the model's retrieval head searches."""
    from mllm.build import load
    from mllm.media.images import find_pictures
    from mllm.scorers.index import ImageIndex

    paths = find_pictures(images)
    ImageIndex.build(load(run), paths).save(out)
    typer.echo(f"{out}: {len(paths)} pictures.")


@index_app.command("find")
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


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="train|generate|eval|matrix", help="What is measured.")],
    out: Annotated[Path, typer.Option(help="Folder of the figures, as JSON.")] = Path("runs/bench"),
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs; medians are shown.")] = 3,
    only: Annotated[str | None, typer.Option(help="Of train: llava, heavy, target or share.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of train: steps of an epoch, 4 by default.")] = None,
) -> None:
    """Measure speed beside the alternatives, or try all parts together (matrix). Speed wants a quiet machine."""
    from importlib import import_module

    modules = {"train": "train", "generate": "generate", "eval": "evaluate", "matrix": "matrix"}
    if what not in modules:
        raise MLLMError(f"No bench is called {what!r}. There are: {', '.join(modules)}.")
    own = {key: value for key, value in (("only", only), ("steps", steps)) if value is not None}
    if own and what != "train":
        raise MLLMError(f"--{next(iter(own))} is for `mllm bench train`. Leave it out.")
    import_module(f"mllm.eval.bench.{modules[what]}").run(out=out, repeats=repeats, progress=typer.echo, **own)


@data_app.command("check")
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
    table = Table("source", "items", "answers", "pictures", "positions", "examples")
    for source in found:
        bins = source.histogram()
        most = max((count for _, _, count in bins), default=0)
        ranges = "\n".join(f"{start}-{end}" for start, end, _ in bins)
        bars = "\n".join(f"{count:>7} {'#' * -(-20 * count // most)}" for _, _, count in bins)
        table.add_row(source.name, *map(str, (source.items, source.answers, source.pictures)), ranges, bars)
    Console().print(table)
    problems = [problem for source in found for problem in source.problems] + shared
    for problem in problems:
        typer.echo(f"- {problem}")
    if problems:
        raise MLLMError(f"{recipe}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the data.")
    typer.echo(f"{recipe}: nothing found against its data.")


@recipes_app.callback()
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


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a recipe's YAML."""
    from mllm.config import loading as recipe

    typer.echo(recipe.find(name).read_text(), nl=False)


@recipes_app.command("verify")
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


@parts_app.command("list")
def list_parts() -> None:
    """List the embedded parts."""
    from rich.console import Console
    from rich.table import Column, Table

    from mllm.hub import embedded as parts

    table = Table(Column("part", no_wrap=True), "group", "licence", "MB", "installed", "what it is")
    for row in parts.listing():
        table.add_row(row.name, row.group, row.licence, str(row.size), "yes" if row.installed else "", row.source)
    Console().print(table)


@parts_app.command("install")
def install_parts(names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None) -> None:
    """Download, check and convert embedded parts (all of them, if none is named)."""
    from mllm.hub import embedded as parts

    parts.install(names or None, report=typer.echo)


def _showing(run: Path, index: Path | None, eager: float) -> dict[str, Any]:
    """Return what makes answers show images; another model's index is refused before anything is loaded."""
    from mllm.scorers.index import opened

    return ({} if index is None else {"index": opened(index, run)}) | ({"eager": eager} if eager else {})


def _tell(model: Any, images: list[str], text: str, jsonl: bool, show: Path, **decoding: Any) -> None:
    """Print what the model says to every picture; one that cannot be read costs the others nothing."""
    from mllm.answering.generate import answer_each
    from mllm.media.images import find_pictures
    from mllm.outputs import with_files

    wrong = []
    paths = find_pictures(images)
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


def _part_names(config: Any) -> tuple[str | None, ...]:
    encoder, lm, connector = config.encoder, config.lm, config.connector
    return encoder and encoder.label, connector and connector.type, lm and lm.model


def _decoding(max_new_tokens: int | None) -> dict[str, Any]:
    return {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}


def _print_table(report: Any) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    summary = report.summary
    table = Table(Column("metric", no_wrap=True), "of", Column("value", no_wrap=True), "gain over it")
    for entry in summary["metrics"]:
        table.add_row(entry["name"], "the model", _figure(entry), "")
        for name, other in entry["baselines"].items():
            table.add_row("", name, f"{other['value']:.3f}", _signed(other))
        table.add_section()
    Console().print(table)
    first = summary["metrics"][0]["name"] if summary["metrics"] else None
    if first and 1 < len(summary["kinds"]) <= 10:  # of more the report tells
        for kind, found in summary["kinds"].items():
            typer.echo(f"{kind}: {first} {found[first]:.3f}, {found['n']} items" if first in found else kind)
    typer.echo(f"{summary['suite']}: {summary['n']} items; intervals are 95 %, by bootstrap over items.")


def _figure(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.3f}" + ("" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]")


def _signed(other: dict[str, Any]) -> str:
    return f"{other['gain']:+.3f}" + ("" if other["low"] is None else f" [{other['low']:+.3f}, {other['high']:+.3f}]")
