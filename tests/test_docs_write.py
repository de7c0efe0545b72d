"""The pages under docs/write: each example is installed as a package, and used to build, train or evaluate a model."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pydantic import BaseModel
from torch.nn.functional import log_softmax

import mllm
from mllm import capabilities, registry, slots
from mllm.assembly import Assembly
from mllm.builtin import BUILT_IN
from mllm.config.data import DataSpec
from mllm.data.items import Item
from mllm.data.sources import read
from mllm.errors import MLLMError
from mllm.evaluation import Report, Score, evaluate, metric
from mllm.guides import contracts
from mllm.objectives.caption import Caption
from mllm.planning.check import problems
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target

PAGES = Path(__file__).parent.parent / "docs" / "write"
NAMES = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "index")
COLOURS = ("red", "blue", "yellow")
TABLE = {"format": "table", "path": "test.csv", "images": "images"}
CSV = "image,caption\n" + "".join(f"a-{colour}-square.png,a {colour} square\n" for colour in COLOURS)


def blocks(page: str, language: str) -> list[str]:
    """Return a page's code blocks of one language."""
    text = (PAGES / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def entry_points(page: str) -> tuple[str, str, str]:
    """Return the group, the name and the target that a page declares."""
    (block,) = blocks(page, "toml")
    ((group, points),) = tomllib.loads(block)["project"]["entry-points"].items()
    ((name, target),) = points.items()
    return group, name, target


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Return a function that installs a page's example, as pip would leave it, and returns the registered part."""
    monkeypatch.chdir(tmp_path)
    site, modules = tmp_path / "site", []
    monkeypatch.syspath_prepend(site)

    def installed(page: str) -> Any:
        group, name, target = entry_points(page)
        module, _, attribute = target.partition(":")
        about = site / f"{module}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
        modules.append(module)
        registry.table.cache_clear()
        if attribute.endswith(".yaml"):
            (site / module).mkdir()
            (site / module / "__init__.py").write_text("")
            (site / module / attribute).write_text(blocks(page, "yaml")[0])
            return None
        (site / f"{module}.py").write_text(blocks(page, "python")[0])
        return registry.lookup(group.removeprefix("mllm."), name)

    yield installed
    registry.table.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of three images, with a table of captions next to it."""
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (24, 24), colour).save(folder / f"a-{colour}-square.png")
    (tmp_path / "test.csv").write_text(CSV)
    return folder


@pytest.fixture
def tiny(tiny_parts: tuple[str, str], images: Path) -> dict[str, Any]:
    """Overrides of a page's recipe: tiny parts, three images."""
    parts = {"encoder.model": tiny_parts[0], "lm.model": tiny_parts[1], "lm.dtype": "float32"}
    return parts | {"data.train": TABLE, "data.val": None}


def trained(page: str, overrides: dict[str, Any], steps: int = 2) -> Assembly:
    """Check and train the recipe of a page, and load the run: the part is named in the recipe that was saved."""
    recipe = f"{page}.yaml"
    Path(recipe).write_text(blocks(page, "yaml")[0])
    fit = {} if "stages" in yaml.safe_load(Path(recipe).read_text()) else {"stages.0.data.train": TABLE}  # limber-cpu's
    last = f"stages.{len(fit)}"
    overrides = {**overrides, **fit, f"{last}.steps": steps, f"{last}.batch_size": 2}
    assert problems(recipe, overrides) == []
    run = mllm.train(recipe, overrides, out=f"runs/{page}")
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in log) == steps
    return mllm.load(run.path)


def evaluated(model: Assembly, page: str, **changes: Any) -> Report:
    """Evaluate the suite of a page, with some of its keys changed."""
    Path("suite.yaml").write_text(yaml.safe_dump({**yaml.safe_load(blocks(page, "yaml")[0]), **changes}))
    return evaluate(model, "suite.yaml", out=f"eval/{page}")


def square(colour: str) -> Image.Image:
    return Image.new("RGB", (24, 24), colour)


def test_the_table_lists_every_group() -> None:
    rows = re.findall(r"^\| `mllm\.(\w+)` \|", (PAGES / "index.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(BUILT_IN)


@pytest.mark.parametrize("page", NAMES)
def test_an_example_is_short_and_its_group_is_in_the_table(page: str) -> None:
    code = blocks(page, "python")[0].splitlines() if blocks(page, "python") else blocks(page, "yaml")[0].splitlines()
    assert 5 <= sum(bool(line.strip()) for line in code) <= 20
    assert f"| `{entry_points(page)[0]}` |" in (PAGES / "index.md").read_text()
    assert f"]({page}.md)" in (PAGES / "index.md").read_text()


def members(contract: Any) -> set[str]:
    """Return the names that a contract asks for."""
    if issubclass(contract, BaseModel):
        return set(contract.model_fields)
    if dataclasses.is_dataclass(contract):
        return {field.name for field in dataclasses.fields(contract)}
    return {name for name in (*vars(contract), *inspect.get_annotations(contract)) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("page", "contract"),
    [
        ("connector", slots.Connector),
        ("encoder", slots.Encoder),
        ("encoder", capabilities.EncodesTexts),
        ("language-model", slots.LanguageModel),
        ("language-model", capabilities.SentenceModel),
        ("head", slots.Head),
        ("objective", slots.Objective),
        ("reward", contracts.Reward),
        ("reward", contracts.ReadsNoAnswer),
        ("reward", contracts.AsksGuides),
        ("reward", contracts.Samples),
        ("reader", Item),
        ("metric", Score),
        ("suite", "suite:Suite"),
        ("answer-mode", "answers.base:AnswerMode"),
    ],
)
def test_a_page_names_all_that_the_contract_asks_for(page: str, contract: Any) -> None:
    if isinstance(contract, str):
        module, _, name = contract.partition(":")
        contract = getattr(import_module(f"mllm.eval.{module}"), name)
    text = (PAGES / f"{page}.md").read_text()
    names = {name for name in members(contract) if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", text)}
    assert members(contract) and not names


def test_connector(install: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    part = install("connector")
    for name in ("encoder", "lm"):
        Path(name).mkdir()
    names: dict[str, Any] = {}
    exec(blocks("connector", "python")[1], names)
    assert type(names["model"].connector) is part and names["model"].connector.body[0].out_features == 8
    model = trained("connector", tiny)
    assert type(model.connector) is part and model.connector.body[0].out_features == 128
    assert model.tokens_per_image == model.encoder.num_patches


def test_encoder(install: Any, tiny: dict[str, Any]) -> None:
    part = install("encoder")
    model = trained("encoder", {name: value for name, value in tiny.items() if name != "encoder.model"})
    assert type(model.encoder) is part and model.connector.num_tokens == 16
    halves = square("red")
    halves.paste((0, 0, 255), (0, 0, 12, 24))  # the left half is blue
    features = model.features([halves]).reshape(4, 4, 3)
    torch.testing.assert_close(features[:, :2], torch.tensor([0.0, 0.0, 1.0]).expand(4, 2, 3))
    torch.testing.assert_close(features[:, 2:], torch.tensor([1.0, 0.0, 0.0]).expand(4, 2, 3))
    assert problems("encoder.yaml", {**tiny, "encoder": {"type": "mean-colours", "cell": 4}})  # an unknown argument


def test_language_model(install: Any, tiny: dict[str, Any]) -> None:
    part = install("language-model")
    model = trained("language-model", tiny)
    assert type(model.lm) is part
    assert model.lm.decode(model.lm.tokenize("A Red CAR")) == "a red car"
    upper, lower = model.generate([[square("red"), "A PICTURE OF"], [square("red"), "a picture of"]], max_new_tokens=4)
    assert str(upper) == str(lower)
    end = model.lm.tokenizer.eos_token
    assert model.lm.tokenize(end, control=True) == [model.lm.eos]
    assert isinstance(model.lm, slots.LanguageModel)


def test_head(install: Any, tiny: dict[str, Any]) -> None:
    part = install("head")
    rows = [{"prompt": "aaaa", "label": "retrieve"}, {"prompt": "zzzz", "label": "generate"}]
    Path("decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"format": "decisions", "path": "decisions.jsonl"}
    model = trained("head", {**tiny, "data.train": data, "stages.0.train.heads": 0.01}, steps=40)
    assert type(model.find(capabilities.DecisionHead)) is part
    Path("decide.yaml").write_text(
        yaml.safe_dump({"name": "d", "about": "", "data": data, "answer": "decide", "metrics": ["decision/f1"]})
    )
    assert evaluate(model, "decide.yaml", out="eval/head")["decision/f1"]["value"] == 1


def test_objective(install: Any, tiny: dict[str, Any]) -> None:
    part = install("objective")
    model = trained("objective", tiny)
    rows = [[square(colour), "It is", Target(f" {colour}")] for colour in COLOURS]
    batch = collate([model.encode(row) for row in rows], model.lm.pad)
    features = model.features([row[0] for row in rows])
    with torch.no_grad():
        plain, zero, half = model(rows, features, batch, [Caption(), part(smoothing=0.0), part(smoothing=0.5)])
        logits = model.logits(model.connector(features), batch)[:, :-1]
    torch.testing.assert_close(zero, plain)
    uniform = -log_softmax(logits, -1).mean(-1)[batch.labels[:, 1:] != -100].sum()  # against the uniform distribution
    torch.testing.assert_close(half, (plain + uniform) / 2)
    assert part().count(rows, batch) == Caption().count(rows, batch) == sum(len(f" {c}") + 1 for c in COLOURS)
    assert isinstance(part().needs, tuple) and part().per_example


def test_reward(install: Any, tiny: dict[str, Any]) -> None:
    part = install("reward")
    samples = contracts.Samples(None, ["a red square", "red", ""], [], [])
    assert part(words=3)(samples).tolist() == [0.0, -2.0, -3.0]
    assert isinstance(part(), contracts.Reward)
    trained("reward", tiny)


def test_reader(install: Any, tiny: dict[str, Any]) -> None:
    install("reader")
    items = read(DataSpec.model_validate({"format": "file-names", "path": "images"}))
    assert [item.answers for item in items] == [("a blue square",), ("a red square",), ("a yellow square",)]
    with pytest.raises(MLLMError, match="nowhere contains no PNG files"):
        read(DataSpec.model_validate({"format": "file-names", "path": "nowhere"}))
    names: dict[str, Any] = {}
    exec(blocks("reader", "python")[1], names)
    Path("rows.jsonl").write_text('{"file": "a-red-square.png", "text": "red"}\n{"file": "a-red-square.png"}\n')
    with pytest.raises(MLLMError, match=r"rows\.jsonl, line 2 has an unexpected form \(KeyError\('text'\)\)"):
        names["lines"](path="rows.jsonl", images="images")
    trained("reader", {name: value for name, value in tiny.items() if not name.startswith("data.")})


def test_metric(install: Any, images: Path, tiny_model: Callable[..., Assembly]) -> None:
    install("metric")
    score = metric("mine/first-word")(["a cat", "the dog", ""], [["A dog", "cats"], ["a dog"], ["a"]])
    assert score.per_item == [1.0, 0.0, 0.0] and score.value == 1 / 3
    entry = evaluated(tiny_model(), "metric", data=TABLE, decoding={"max_new_tokens": 4})["mine/first-word"]
    assert entry["low"] <= entry["value"] <= entry["high"]


def test_suite(install: Any, images: Path, tiny_model: Callable[..., Assembly]) -> None:
    install("suite")
    Path("my-captions.yaml").write_text(blocks("suite", "yaml")[0])
    model = tiny_model()
    by_path, by_name = (
        evaluate(model, suite, ".", out=f"eval/{number}")
        for number, suite in enumerate(("my-captions.yaml", "my-captions"))
    )
    assert by_path.rows == by_name.rows and len(by_path.rows) == 3
    assert [entry["name"] for entry in by_path.summary["metrics"]] == ["caption/cider-d", "caption/rouge-l"]
    with pytest.raises(MLLMError, match="needs --data"):
        evaluate(model, "my-captions", out="eval/none")


def test_answer_mode(install: Any, images: Path, tiny_model: Callable[..., Assembly]) -> None:
    install("answer-mode")
    Path("questions.csv").write_text("image,question,answer\na-red-square.png,What colour?,red\n")
    data = {"format": "table", "path": "questions.csv", "images": "images"}
    model = tiny_model()
    report = evaluated(model, "answer-mode", data=data, decoding={"max_new_tokens": 1, "top_k": 2})
    prompt = [Image.open("images/a-red-square.png"), "Question: What colour? Answer:"]
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 1, "top_k": 2}
    samples = [str(model.generate([prompt], seed=seed, **options)[0]) for seed in range(5)]
    counts = Counter(samples)
    assert len(counts) == 2, "five samples of one token from two candidates: one of them has the majority"
    assert report.rows[0]["prediction"] == counts.most_common(1)[0][0]
