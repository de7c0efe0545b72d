"""Fuzz the command line: arguments of every command, odd, missing, too many and far too long."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

import mllm
from mllm import __main__ as program
from mllm.cli.app import app
from mllm.errors import MLLMError
from tests.fuzz.fixtures import parts, plain_recipe, save_yaml, write_data
from tests.fuzz.harness import Act

VALUES = [
    *("", " ", "-", "--", "-1", "0", "1", "2.5", "1e400", "nan", "inf", "x", "X" * 300, "/" + "y" * 300, "a\nb", "é"),
    *("\udcff", "null", "[", "{", "a=b", "=", "seed=-1", "seed=9999999999999999999999", "name=${oc.env:HOME}", "cpu"),
    *("cuda:99", "mps", "tpu", "float16", "all", "none", ",", "blind,", "/dev/null", "/dev/zero", "/etc/passwd", "."),
    *(
        "..",
        "~",
        "/nonexistent/x",
        "http://[::1",
        "data:,",
        "9" * 5000,
        "--help",
        "--debug",
        "-h",
        "--version",
        "*",
        "?",
    ),
]
STARTING = ("serve", "bench", "parts install", "chat")  # which listen, measure, download, or read lines


class Commands:
    """Command lines, run inside this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        data = write_data(folder / "data")
        recipe = plain_recipe(*parts(folder), data, cache="off")
        recipe["stages"][0]["steps"] = 1
        self._recipe = str(save_yaml(folder / "recipe.yaml", recipe))
        run = mllm.train(self._recipe, out=folder / "run").path
        self._run, self._suite, self._image = str(run), str(data / "suite.yaml"), str(data / "0.png")
        predictions = folder / "predictions.jsonl"
        predictions.write_text('{"id": "0.png", "answer": "a"}\n')
        mllm.evaluate(mllm.load(run), self._suite, out=folder / "evaluation", baselines=[])
        self._good = [self._recipe, self._run, self._suite, self._image, str(predictions), str(folder / "evaluation"),
                      str(data), str(folder / "out"), "steps=1"]  # fmt: skip
        self._commands = dict(_leaves(typer.main.get_command(app), ()))

    def named(self) -> dict[str, Act]:
        """Return each command with nothing, with one odd value, and with one for each of its arguments and options."""
        lines: list[list[str]] = [[], [""], ["x"], ["--x"], ["--debug"], ["train" + "n" * 300]]
        for name, command in self._commands.items():
            words = name.split()
            lines += [words] * (name != "parts install")  # which installs all of them
            lines += [[*words, "--x"], [*words, "x" * 300], [*words, "\udcff"], [*words, *("a",) * 50]]
            if name not in STARTING:
                lines += [[*words, *self._arguments(command), option, value] for option in _options(command)
                          for value in ("", "-1", "x" * 300)]  # fmt: skip
                lines += [[*words, *odd] for odd in _replaced(self._arguments(command))]
        lines += [
            ["plan", self._recipe, "--flops", "0"],
            ["plan", self._recipe, "--flops", "-1"],
            ["plan", self._recipe, "--memory", "0"],
            ["plan", self._recipe, "--memory", "x"],
            ["plan", self._recipe, "--processes", "999999999"],
            ["train", self._recipe, "--out", "/dev/null/x"],
            ["train", self._recipe, "--out", "/proc/x"],
            ["train", self._recipe, "--resume", self._run],
            ["serve", self._run, "--host", "256.1.1.1"],
            ["serve", self._run, "--host", "192.0.2.1", "--port", "1"],
            ["serve", self._run, "--port", "99999"],
            ["serve", self._run, "--token", ""],
            ["serve", self._run, "--max-body", "0"],
            ["chat", self._run],
            ["chat", self._run, "--history", "/dev/zero"],
            ["chat", self._run, "--history", self._image],
            ["parts", "install", "x" * 300],
            ["bench", "x" * 300],
        ]
        return {f"{number}: mllm {' '.join(line)!a}"[:300]: functools.partial(self.check, line)
                for number, line in enumerate(lines, start=-len(lines))}  # fmt: skip

    def draw(self, chance: random.Random) -> tuple[str, Act]:
        """Return a command with random arguments and options."""
        name = chance.choice([name for name in self._commands if name not in STARTING])
        command = self._commands[name]
        line = name.split()
        for parameter in command.params:
            if parameter.param_type_name == "argument" and chance.random() < 0.9:
                line.append(self._value(chance))
        for option in chance.sample(_options(command), min(chance.choice((0, 1, 1, 2)), len(_options(command)))):
            line += [option, self._value(chance)][: chance.choice((1, 2, 2, 2))]
        return f"mllm {line!a}"[:400], functools.partial(self.check, line)

    def check(self, line: Sequence[str]) -> None:
        """Run a command: it ends with status 0, or with one message on stderr; a traceback is never shown."""
        kept = os.getcwd()
        os.chdir(self._folder)
        try:
            status, out, err = run(line)
        finally:
            os.chdir(kept)
            for name in ("out", "runs"):
                shutil.rmtree(self._folder / name, ignore_errors=True)
        assert "Traceback" not in out + err, err[-800:]
        assert status in (0, 1, 2, 130), f"status {status}: {err[-500:]}"
        if status == 1:
            first, *rest = [part for part in err.splitlines() if part.strip()][-20:] or [""]
            assert any(part.startswith("mllm: ") for part in (first, *rest)), f"no message: {err[-500:]!r}"
            raise MLLMError(err[-500:])
        if status == 2:
            assert "Usage" in out + err or "Error" in err, f"no message: {err[-500:]!r}"
            raise MLLMError("wrong usage")

    def _value(self, chance: random.Random) -> str:
        return chance.choice(self._good if chance.random() < 0.65 else VALUES)

    def _arguments(self, command: Any) -> list[str]:
        """Return values for the arguments that a command requires."""
        kinds = {"recipe": self._recipe, "run": self._run, "predictions": self._good[4], "one": self._good[5],
                 "other": self._good[5]}  # fmt: skip
        required = [one.name for one in command.params if one.param_type_name == "argument" and one.required]
        return [kinds.get(name, self._image) for name in required]


def run(line: Sequence[str]) -> tuple[int, str, str]:
    """Run `mllm` inside this process: its status, and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    kept, status = (sys.argv, sys.stdin, os.environ.copy()), 0
    sys.argv, sys.stdin = ["mllm", *line], io.StringIO("hello\n/save /nonexistent/x\n")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            program.main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            err.write(f"{ended.code}\n")
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    finally:
        sys.argv, sys.stdin = kept[:2]
        os.environ.clear()
        os.environ.update(kept[2])
    return status, out.getvalue(), err.getvalue()


def _replaced(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yield arguments of which one is odd: empty, far too long, or bytes that are no UTF-8."""
    for position in range(len(arguments)):
        for value in ("", "x" * 300, "caf\udce9"):
            yield [*arguments[:position], value, *arguments[position + 1 :]]


def _leaves(command: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Return all commands by their whole names."""
    if not hasattr(command, "commands"):
        return [(" ".join(names), command)]
    below = [pair for name, inner in command.commands.items() for pair in _leaves(inner, (*names, name))]
    return below if not command.invoke_without_command else [*below, (" ".join(names), command)]


def _options(command: Any) -> list[str]:
    """Return the names of a command's options."""
    return [parameter.opts[-1] for parameter in command.params if parameter.param_type_name == "option"]
