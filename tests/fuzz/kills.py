"""Kill training and evaluation at random moments, continue, and compare the end with an uninterrupted one, bit for bit.

``make kills``, or ``python -m tests.fuzz.kills --trainings 200 --evaluations 100 --seed 1``. A share of the runs is
killed several times. The processes are forked from this one, which has everything imported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["OMP_NUM_THREADS"] = "1"

import mllm
from tests.fuzz.fixtures import parts, save_yaml, suite, write_data

STAGE = {"train": {"connector": 0.01}, "batch_size": 2, "checkpoint_every": 2}
AGAIN = 0.3  # how often a continued process is killed, too


@dataclass
class Work:
    """Something that is killed and continued.

    Attributes:
        act: begins or continues it in a folder.
        files: the names of the files that have to be equal in the end; folders with all that is in them.
        finished: whether a folder has all of them.
        right: the contents in the end.
        seconds: that it takes.
    """

    act: Callable[[Path], Any]
    files: tuple[str, ...]
    finished: Callable[[Path], bool]
    right: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    def contents(self, folder: Path) -> dict[str, bytes]:
        """Return the contents of the files, and of what a killed process left."""
        paths = [folder / name for name in self.files]
        paths += [path for path in folder.rglob("*") if path.is_file() and "model" in path.parts]
        paths += [path for path in folder.rglob(".*") if path.is_file()]
        paths += list(folder.glob("*.partial.*"))
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}

    def start(self, folder: Path) -> int:
        """Begin or continue in a new process; return its id."""
        if process := os.fork():
            return process
        status = 1
        try:
            with (folder.parent / "output").open("ab") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.environ["MLLM_CACHE"] = str(folder.parent / "cache")
            self.act(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def whole(self, folder: Path) -> None:
        """Run it without an interruption, twice: the second time is measured."""
        for name in ("first", "whole"):
            (folder / name).mkdir(parents=True)
            began = time.monotonic()
            _, status = os.waitpid(self.start(folder / name / "run"), 0)
            assert status == 0, (folder / name / "output").read_text()
            self.seconds = time.monotonic() - began
        self.right = self.contents(folder / "whole" / "run")
        assert self.right == self.contents(folder / "first" / "run"), "two uninterrupted ones differ"

    def trial(self, folder: Path, chance: random.Random) -> tuple[int, str]:
        """Kill it once or several times, and continue to the end; return the number of kills, and what is wrong."""
        folder.mkdir()
        kills = ended = 0
        while not self.finished(folder / "run"):
            process = self.start(folder / "run")
            if not kills or chance.random() < AGAIN:
                time.sleep(chance.random() * self.seconds)
                os.kill(process, signal.SIGKILL)  # it has not been waited for, so its id is its own
            ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            kills += ended == -signal.SIGKILL
            if ended > 0:
                return kills, (folder / "output").read_text()[-2000:]
        actual = self.contents(folder / "run")
        if ended:  # killed when all was written, and so not continued
            actual = {name: content for name, content in actual.items() if name in self.right}
        names = sorted(name for name in {*actual, *self.right} if actual.get(name) != self.right.get(name))
        return kills, f"other contents: {names}" if names else ""


def training(folder: Path) -> Work:
    """Return a training of two stages, with validation and a cache of features."""
    data = write_data(folder / "data")
    encoder, lm = parts(folder)
    mllm.assemble(encoder, lm)  # so that the modules that this needs are imported before processes are forked
    stages = [{**STAGE, "name": "one", "steps": 9, "validate_every": 3}, {**STAGE, "name": "two", "steps": 7}]
    source = {"format": "table", "path": str(data / "train.json")}
    recipe = save_yaml(
        folder / "recipe.yaml",
        {
            "name": "killed",
            "encoder": {"model": encoder},
            "lm": {"model": lm},
            "connector": {"type": "linear", "tokens": 4, "dropout": 0.3},
            "data": {"train": source, "val": source},
            "stages": stages,
        },
    )

    def act(run: Path) -> None:
        begun = (run / "recipe.yaml").is_file()
        mllm.train(str(recipe), out=None if begun else run, resume=run if begun else None)

    files = ("log.jsonl", "frozen.json", "data.json", "recipe.yaml")
    return Work(act, files, lambda run: (run / "model" / "assembly.json").is_file())


def evaluation(folder: Path) -> Work:
    """Return an evaluation with two baselines."""
    data = write_data(folder / "data")
    encoder, lm = parts(folder)
    run = mllm.assemble(encoder, lm, {"type": "linear", "tokens": 4}).save(folder / "model")
    path = save_yaml(folder / "slow.yaml", {**suite(data), "batch_size": 1, "decoding": {"max_new_tokens": 12}})

    def act(out: Path) -> None:
        mllm.evaluate(mllm.load(run), str(path), out=out, run="killed", baselines=["blind", "shuffled"])

    files = ("summary.json", "predictions.jsonl", "report.html")
    return Work(act, files, lambda out: (out / "report.html").is_file() and not list(out.glob("*.partial.*")))


def kill(make: Callable[[Path], Work], kills: int, seed: int) -> dict[str, Any]:
    """Kill something so many times; return the figures and the problems."""
    began, count, trials, problems = time.monotonic(), 0, 0, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = make(folder)
        work.whole(folder)
        while count < kills:
            trial = folder / f"trial-{trials}"
            made, problem = work.trial(trial, random.Random(f"{seed}/{trials}"))
            if problem:
                problems[trials] = problem
            count, trials = count + made, trials + 1
            shutil.rmtree(trial)
            if trials % 10 == 0:
                print(f"{count} kills in {time.monotonic() - began:.0f} s, {len(problems)} problems", file=sys.stderr)
    return {"kills": count, "runs": trials, "seconds": round(time.monotonic() - began), "problems": problems}


def main() -> None:
    """Kill trainings and evaluations; the status is 1 where one ended otherwise than an uninterrupted one."""
    parser = argparse.ArgumentParser(description="Kill training and evaluation at random moments, and continue.")
    parser.add_argument("--trainings", type=int, default=200, help="kills of training")
    parser.add_argument("--evaluations", type=int, default=100, help="kills of evaluation")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for module in ("mllm.training.train", "mllm.eval.evaluate", "matplotlib.backends.backend_agg"):
        import_module(module)  # once, before processes are forked
    failed = False
    for name, make, kills in (
        ("training", training, options.trainings),
        ("evaluation", evaluation, options.evaluations),
    ):
        figures = kill(make, kills, options.seed)
        print(json.dumps({"kind": name, **figures, "problems": len(figures["problems"])}), flush=True)
        for trial, problem in figures["problems"].items():
            print(f"  {name} {trial}: {problem}", flush=True)
        failed |= bool(figures["problems"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
