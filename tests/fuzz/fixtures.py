"""Make what several fuzzers damage: tiny parts, a table of images with captions, recipes and suites on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mllm.testing import tiny_encoder, tiny_image, tiny_lm


def write_data(folder: Path) -> Path:
    """Write four images with captions and questions; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(4):
        tiny_image(number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"number {number}"})
    (folder / "train.json").write_text(json.dumps(rows))
    questions = [
        {"image": row["image"], "question": "Which?", "answer": str(number)} for number, row in enumerate(rows)
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite(folder)))
    return folder


def suite(data: Path) -> dict[str, Any]:
    """Return a suite of captions."""
    return {
        "name": "tiny",
        "about": "captions",
        "data": {"format": "table", "path": str(data / "train.json")},
        "answer": "generate",
        "metrics": ["caption/bleu-1"],
        "decoding": {"max_new_tokens": 3},
        "batch_size": 2,
    }


def parts(folder: Path) -> tuple[str, str]:
    """Return the folders of a tiny encoder and a tiny language model."""
    return tiny_encoder(folder / "encoder"), tiny_lm(folder / "lm")


def plain_recipe(encoder: str, lm: str, data: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe that trains a connector for a few steps."""
    stage = {"name": "one", "train": {"connector": 0.01}, "steps": 4, "batch_size": 2, "checkpoint_every": 2}
    return {
        "name": "tiny",
        "encoder": {"model": encoder},
        "lm": {"model": lm},
        "connector": {"type": "linear", "tokens": 4, "dropout": 0.2},
        "data": {"train": {"format": "table", "path": str(data / "train.json")}},
        "stages": [stage],
        **changes,
    }


def rich_recipe(encoder: str, lm: str, data: Path) -> dict[str, Any]:
    """Return a recipe that names most of the keys."""
    train = {"format": "table", "path": str(data / "train.json"), "weight": 2.0, "fraction": 0.5, "concatenate": 0.5}
    val = {"format": "table", "path": str(data / "questions.json"), "images": str(data), "missing": "drop"}
    optim = {"weight_decay": 0.1, "betas": [0.9, 0.99], "clip": 1.0, "schedule": "cosine", "warmup": 1, "floor": 1e-6}
    stages = [
        {"name": "fit", "fit": {"part": "connector", "solver": "ridge", "targets": "caption-words", "strength": 0.1}},
        {
            "name": "align",
            "train": {"connector": 0.01, "tokens": 0.01, "heads.retrieval": 0.01},
            "objectives": [{"type": "caption", "weight": 1.0}, {"type": "token-prediction"}],
            **{"steps": 2, "batch_size": 2, "validate_every": 1, "keep": "best", "patience": 2, "checkpoint_every": 1},
            "optim": {"accumulate": 2, "precision": "float32", "checkpointing": True},
        },
        {"name": "tune", "train": ["connector", "adapters"], "steps": 1, "batch_size": 1, "seed": 3},
    ]
    return {
        "name": "rich",
        "about": "most keys",
        "seed": 1,
        "encoder": {"model": encoder, "layer": -1, "select": "patches", "resolution": 32, "resize": "stretch"},
        "lm": {"model": lm, "dtype": "float32"},
        "connector": {"type": "linear", "tokens": 4, "dropout": 0.1},
        "adapters": [{"type": "lora", "r": 2, "alpha": 4, "dropout": 0.1}],
        "heads": [{"type": "retrieval", "dim": 6}],
        "tokens": ["[RET]"],
        "prompt": {"template": "{images}{prompt}", "caption": "It is", "question": "Q: {question} A:", "chat": "plain",
                   "examples": [{"words": "a cat", "answer": "a cat"}]},
        "decoding": {"max_new_tokens": 3, "caption": {"num_beams": 2}, "question": {"stop_strings": ["."]}},
        "data": {"train": [train], "val": val, "skip": 0.1, "max_length": 200},
        "optim": optim,
        "cache": "auto",
        "eval": {"suites": [{"suite": str(data / "suite.yaml"), "batch_size": 1}], "limit": 2, "show": 1},
        "stages": stages,
    }  # fmt: skip


def save_yaml(path: Path, values: Any) -> Path:
    """Write values as YAML, however odd they are; return the path."""
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=False), encoding="utf-8")
    return path
