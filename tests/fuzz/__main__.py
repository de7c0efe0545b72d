"""Fuzz everything but the server: ``make fuzz``, or ``python -m tests.fuzz --seed 7 --count 1500 images recipes``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tests.fuzz.harness import run
from tests.fuzz.kinds import KINDS


def main() -> None:
    """Run the fuzzers that are named, or all; the status is 1 where there is a problem."""
    parser = argparse.ArgumentParser(description="Fuzz everything but the server.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1500, help="random cases of each kind, after the named ones")
    parser.add_argument("--only", default="", help="the beginning of the cases' names")
    options = parser.parse_args()
    for name in ("mllm.training.train", "mllm.eval.evaluate", "mllm.planning.check", "mllm.cli.app"):
        import_module(name)  # once, before processes are forked
    failed = False
    for kind in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MLLM_CACHE"] = f"{folder}/cache"
            figures = run(KINDS[kind], kind, Path(folder), options.seed, options.count, options.only)
        print(json.dumps({**figures, "problems": len(figures["problems"])}), flush=True)
        for label, problem in figures["problems"].items():
            print(f"  {label[:300]!r}: {problem}", flush=True)
        failed |= bool(figures["problems"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
