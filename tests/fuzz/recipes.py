"""Fuzz recipes, suites and overrides: changed values and keys, damaged text; what `check` passes is trained."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # for planning, which imports it in the middle of a case else
import yaml

import mllm
from mllm.config.loading import dump, load, names
from mllm.errors import MLLMError
from mllm.planning.check import problems
from mllm.planning.examples import first_examples
from mllm.planning.plan import plan
from mllm.testing import tiny_encoder, tiny_lm
from tests.fuzz.fixtures import plain_recipe, rich_recipe, save_yaml, suite, write_data
from tests.fuzz.harness import Act
from tests.fuzz.mutate import ODD, changed, damaged, difference

load_suite: Any = import_module("mllm.eval.suite").load_suite
check_suite: Any = import_module("mllm.evaluation").check_suite
TRAINED = 0.2  # of the recipes of changed values in which `check` finds nothing
SMALL = 64  # the largest number in a recipe that is trained


class Recipes:
    """Recipes, most of them on tiny parts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        encoder, lm = (
            tiny_encoder(folder / "encoder"),
            tiny_lm(folder / "lm", layers=1),
        )  # each layer is traced by `plan`
        self._data = write_data(folder / "data")
        self._bases = [plain_recipe(encoder, lm, self._data), rich_recipe(encoder, lm, self._data)]
        for base in self._bases:
            assert (wrong := problems(str(self._saved(base)))) == [], wrong

    def warm(self) -> None:
        """Plan once: the first time in a process takes seconds."""
        for base in self._bases:
            check_recipe(str(self._saved(base)), (), train=self._folder / "run")

    def named(self) -> dict[str, Act]:
        """Return the texts, overrides and options that gave way once, and odd values at every key."""
        acts: dict[str, Act] = {
            f"text: {name}": functools.partial(self._text, text.encode(errors="surrogateescape"))
            for name, text in TEXTS.items()
        }
        acts |= {
            f"{key}={value!r}"[:120]: functools.partial(self._option, key, value)
            for key, values in OUT_OF_RANGE.items()
            for value in values
        }
        acts |= {f"override {text!r}"[:120]: functools.partial(self._overridden, [text]) for text in OVERRIDES}
        acts["a chain of 1,200 by extends"] = self._chain
        acts["a pipe"] = self._pipe
        for path in ("x" * 300, "x" * 300 + ".yaml", "x" * 5000 + "/a.yaml", "a\0.yaml", "", "/", "/etc/passwd", "."):
            acts[f"recipe {path[:20]!r} of {len(path)}"] = functools.partial(check_recipe, path, (), train=None)
            acts[f"suite {path[:20]!r} of {len(path)}"] = functools.partial(load_suite, path)
        return acts

    def draw(self, chance: random.Random) -> tuple[str, Act]:
        """Return a recipe or suite of changed values, of damaged text, or with overrides."""
        kind = chance.random()
        if kind < 0.55:
            base = chance.choice(self._bases)
            values = changed(base, chance)
            return f"values of {base['name']}: {difference(base, values)}", functools.partial(
                self._values, values, train=base["name"] == "tiny" and chance.random() < TRAINED
            )
        if kind < 0.7:
            text = damaged(yaml.safe_dump(chance.choice(self._bases), sort_keys=False).encode(), chance)
            return f"text {text[:60]!r}", functools.partial(self._text, text)
        if kind < 0.85:
            overrides = [self._override(chance) for _ in range(chance.choice((1, 1, 2)))]
            return f"overrides {overrides}", functools.partial(self._overridden, overrides)
        if kind < 0.92:
            name = chance.choice(names())
            return f"{name}", functools.partial(check_recipe, name, [self._override(chance)], train=None)
        values = changed(suite(self._data), chance)
        return f"suite: {difference(suite(self._data), values)}", functools.partial(self._suite, values)

    def _override(self, chance: random.Random) -> str:
        keys = list(_paths(chance.choice(self._bases)))
        key, value = chance.choice(keys), chance.choice(ODD)
        text = chance.choice((str(value), json.dumps(value), repr(value), "[", "{a: 1}", "${name}", "!!int x"))
        return chance.choice((f"{key}={text}", f"{key}={text}", f"{key}.x={text}", f"{key}", f"={text}"))

    def _saved(self, values: Any) -> Path:
        return save_yaml(self._folder / "recipe.yaml", values)

    def _values(self, values: Any, *, train: bool) -> None:
        small = all(not isinstance(v, int | float) or abs(v) <= SMALL for v in _scalars(values))
        check_recipe(str(self._saved(values)), (), train=self._folder / "run" if small and train else None)

    def _text(self, text: bytes) -> None:
        (self._folder / "recipe.yaml").write_bytes(text)
        with contextlib.suppress(MLLMError):
            load_suite(str(self._folder / "recipe.yaml"))
        check_recipe(str(self._folder / "recipe.yaml"), (), train=None)

    def _overridden(self, overrides: Sequence[str]) -> None:
        check_recipe(str(self._saved(self._bases[1])), overrides, train=None)

    def _option(self, key: str, value: Any) -> None:
        """Check that `check` finds an option that is out of its range."""
        path = str(self._saved(self._bases[1]))
        load(path)
        assert problems(path, {key: value}), "check found nothing"
        raise MLLMError("what check found")

    def _suite(self, values: Any) -> None:
        path = save_yaml(self._folder / "suite.yaml", values)
        with contextlib.suppress(MLLMError):
            check_suite(str(path), [])
        module = import_module("mllm.eval.suite")
        module.read_items(module.load_suite(str(path)), None)

    def _chain(self) -> None:
        for number in range(1200):
            (self._folder / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\nname: a\n")
        check_recipe(str(self._folder / "0.yaml"), (), train=None)

    def _pipe(self) -> None:
        os.mkfifo(self._folder / "pipe.yaml")
        check_recipe(str(self._folder / "pipe.yaml"), (), train=None)


def check_recipe(path: str, overrides: Sequence[str], *, train: Path | None) -> None:
    """Read, dump, check, plan and possibly train a recipe; each gives a result or one message.

    Args:
        path: of the recipe.
        overrides: of it.
        train: the folder of a run, which is trained if `check` finds nothing.
    """
    wrong = problems(path, overrides)
    assert all(isinstance(line, str) and line.strip() and len(line) < 4000 for line in wrong), wrong
    recipe = load(path, overrides)
    again = Path(path).with_name("again.yaml") if path.endswith("recipe.yaml") else None
    if again is not None:
        again.write_text(dump(recipe))
        assert load(str(again)) == recipe, "dumped and read, it is another recipe"
    if wrong:
        raise MLLMError("\n".join(wrong)[:4000])
    first_examples(path, overrides)
    plan(path, overrides)
    if train is not None and math.prod([stage.steps or 1 for stage in recipe.stages]) <= SMALL:
        shutil.rmtree(train, ignore_errors=True)
        run = mllm.train(path, overrides, out=train)
        assert (run.path / "model" / "assembly.json").is_file()


def _paths(value: Any, before: str = "") -> Any:
    """Yield the dotted paths of all values."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield f"{before}{key}"
        yield from _paths(inner, f"{before}{key}.")


def _scalars(value: Any) -> Any:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _scalars(inner)
    else:
        yield value


TEXTS = {
    "100,000 brackets": "[" * 100_000,
    "100,000 braces": "{a: " * 100_000,
    "2,000 brackets": "[" * 2_000,
    "closed brackets": "name: " + "[" * 2_000 + "]" * 2_000,
    "deep blocks": "- " * 3_000 + "a",
    "recursion": "name: &x [*x]",
    "hexadecimal without digits": "seed: 0x_",
    "binary without digits": "seed: 0b_",
    "5,000 digits": "seed: " + "9" * 5_000,
    "65 bits": "seed: 36893488147419103232",
    "!!int x": "seed: !!int x",
    "!!float x": "seed: !!float x",
    "!!python": "name: !!python/object/apply:os.system ['true']",
    "!!timestamp": "seed: !!timestamp x",
    "!!binary": "name: !!binary x",
    "!!set": "name: !!set {a, b}",
    "!!omap": "name: !!omap [a: 1]",
    "a date": "name: 2020-13-45",
    "60:60": "seed: 190:20:30",
    "null as a key": "null: a",
    "a list as a key": "? [a]\n: b",
    "a float as a key": "1.5: b\nname: x",
    "a key twice": "name: a\nname: b",
    "NUL": "name: \0",
    "extends an interpolation": "extends: ${a}\nname: a",
    "extends itself": "extends: recipe.yaml\nname: a",
    "extends a list": "extends: [a, b]\nname: a",
    "extends a folder": "extends: .\nname: a",
    "extends /etc/passwd": "extends: /etc/passwd\nname: a",
    "extends a long name": f"extends: {'x' * 300}\nname: a",
    "the environment": "name: ${oc.env:HOME}",
    "an open interpolation": "name: ${b",
    "interpolations in a circle": "name: ${about}\nabout: ${name}",
    "nested interpolations": "name: " + "${a" * 2_000,
    "a name that leaves its folder": "name: ../../x\nstages: []",
    "an absolute name": "name: /tmp/x\nstages: []",
    "a merge key": "a: &a {name: x}\n<<: *a\n",
    "a merge key of a list": "<<: [1]\nname: x\n",
    "two documents": "name: a\n---\nname: b\n",
    "a directive": "%YAML 9.9\n---\nname: a\n",
    "a bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
    "a mebibyte": "about: " + "x" * 2**20,
    "UTF-16": "\udcff\udcfen\0a\0m\0e\0",
    "Latin-1": "about: caf\udce9",
    "tabs": "name:\ta\n\tx: b",
    "empty": "",
    "a number": "5",
    "a text": "hello",
    "a list": "[1, 2]",
    "???": "name: ???",
    "a missing value": "name: a\nseed: ???",
}
OUT_OF_RANGE: dict[str, list[Any]] = {
    "seed": [-1, 2**32, 2**64, 1.5, "x"],
    "stages.2.seed": [-1, 2**32],
    "optim.betas": [[1.5, 0.9], [0.9, -0.1], [1, 1], [0.9], [], "x"],
    "optim.weight_decay": [-1, float("nan"), float("inf")],
    "optim.clip": [0, -1, "x"],
    "optim.warmup": [-1, 0.5],
    "optim.floor": [-1],
    "optim.schedule": ["x", 3],
    "connector.dropout": [2, -0.1, 1, float("nan"), "x"],
    "connector.tokens": [-1, 0, 2.5, "x"],
    "connector.hidden": [-1, 0, 1.5],
    "connector.type": ["x", 3, None],
    "encoder.layer": [99, -99, "x"],
    "encoder.resolution": [0, -1, 31],
    "encoder.model": ["x" * 300, "../x", "", 3],
    "lm.model": ["x" * 300, "a/b/c", "", 3, "a\0b"],
    "lm.dtype": ["float8", 3],
    "stages.1.train.connector": [-1, float("nan"), "x"],
    "stages.1.train": [["nothing"], {"": 1}, {"connector.": 1}, {"lm.x": 1}],
    "stages.1.objectives.0.weight": [-1, float("nan"), float("inf")],
    "stages.1.steps": [0, -1, 1.5],
    "stages.1.epochs": [0, -1, 2, "x", float("inf")],
    "stages.1.checkpoint_every": [0, -1, None, 1.5],
    "stages.1.checkpoint_minutes": [0, -1, "x", float("nan")],
    "stages.1.keep_checkpoints": [0, -1, None],
    "stages.1.batch_size": [0, -1],
    "stages.0.fit.part": ["x", "lm", ""],
    "stages.0.fit.strength": [0, -1],
    "adapters.0.r": ["x", 0, -4],
    "adapters.0.dropout": [7],
    "adapters": [[{"type": "lora"}, {"type": "lora"}], [{"type": "x"}], [{}]],
    "heads.0.dim": [0, -1, "x"],
    "heads": [[{"type": "retrieval", "dim": 6}, {"type": "retrieval", "dim": 6}]],
    "tokens": [[""], [3], ["[RET]", "[RET]"]],
    "data.train.0.fraction": [0, -1, 2],
    "data.train.0.weight": [0, -1],
    "data.train.0.path": ["/nonexistent", 3, True, None, [], "x" * 300, "a\0b"],
    "data.train.0.format": ["x", 3, None],
    "data.max_length": [0, -1],
    "data.skip": [-1, 2],
    "decoding.max_new_tokens": [0, -1, "x", 1.5, 10**30],
    "decoding.temperature": [-1, "x"],
    "decoding.num_beams": [0, -1, "x"],
    "decoding.top_p": [2, -1],
    "decoding.unknown": [1],
    "prompt.template": ["x", "{nothing}", "{", 3],
    "prompt.question": ["x {nothing}", "{"],
    "eval.suites": [["x"], [3], ["x" * 300]],
    "eval.limit": [0, -1],
    "cache": ["x", 3],
}
OVERRIDES = [
    *("", "=", "a", "a=", "=a", "a.b.c=1", "stages.9.steps=1", "stages.-1.steps=1", "stages.x=1", "name=", "name=null"),
    *("seed=0x_", "seed=0b_", "seed=!!int x", "seed=" + "9" * 5000, "name=" + "[" * 100_000, "adapters.0.r=x", "..=1"),
    *(
        "encoder=1",
        "encoder.model.x=1",
        "lm=null",
        "stages=null",
        "stages=[1]",
        "stages.0=1",
        "data=1",
        "a[0]=1",
        "[=1",
    ),
    *("name=${oc.env:HOME}", "name=${name}", "name=\0", "name=\udcff", "extends=demo", "prompt=x", "decoding=x"),
    *("connector.tokens=-1", "connector.dropout=2", "seed=-1", "x" * 5000 + "=1", "a" + ".a" * 3000 + "=1"),
]
