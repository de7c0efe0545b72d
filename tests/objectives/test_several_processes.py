"""Every contrast of two processes is that of one: the pairs on both are negatives of each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

import mllm
from mllm.testing import tiny_image, tiny_tokenizer

QFORMER = {"type": "qformer", "dim": 16, "layers": 2, "heads": 2, "tokens": 3}
HEADS = [{"type": "contrast", "inside": 16, "dim": 6}, {"type": "match", "inside": 16}]
WORDS = {"contrastive", "patch-contrastive", "retrieval"}  # objectives that need a language model, or one of sentences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of different lengths, two of them equal, with their images; a tiny BERT over bytes."""
    folder = tmp_path_factory.mktemp("pairs")
    texts = ["a dog", "two cats on a mat", "a dog", "x", "a red apple", "rain", "one", "a long road home"]
    for index in range(8):
        tiny_image(index).save(folder / f"{index}.png")
    rows = [{"image": f"{index}.png", "caption": text} for index, text in enumerate(texts)]
    (folder / "rows.json").write_text(json.dumps(rows))
    tokenizer = tiny_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return folder


def recipe(objective: str, folder: Path, parts: tuple[str, str], batch: int) -> dict[str, Any]:
    connector: dict[str, Any] = {"type": "linear", "tokens": 4}
    lm: dict[str, Any] | None = {"model": parts[1]}
    heads: list[dict[str, Any]] = []
    if objective == "contrastive":
        lm = {"type": "sentences", "model": str(folder / "bert")}
    elif objective == "retrieval":
        heads = [{"type": "retrieval", "dim": 6}]
    elif objective not in WORDS:
        connector, lm, heads = {**QFORMER, "words": str(folder / "bert")}, None, HEADS
    objectives = [{"type": objective}] + ([{"type": "itc"}] if objective == "itm" else [])
    trained = {"connector": 0.01} | ({"heads": 0.01} if heads else {})
    return {
        "name": objective,
        "encoder": {"model": parts[0]},
        "lm": lm,
        "connector": connector,
        "heads": heads,
        "data": {"train": {"format": "table", "path": str(folder / "rows.json"), "images": str(folder)}},
        "optim": {"schedule": "constant", "warmup": 0},
        "stages": [{"name": "see", "train": trained, "objectives": objectives, "steps": 4, "batch_size": batch}],
    }


def losses(path: Path) -> list[float]:
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


# Of two pairs each has the other as its only negative, so nothing is sampled that the number of processes would change.
@pytest.mark.parametrize(("objective", "batch"), [*((name, 5) for name in (*sorted(WORDS), "itc", "itg")), ("itm", 2)])
@pytest.mark.timeout(200)
def test_two_processes_contrast_what_one_does(
    objective: str, batch: int, folder: Path, tiny_parts: tuple[str, str], start: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(objective, folder, tiny_parts, batch)))
    start("train", path, "--out", tmp_path / "two", count=2).finish()
    mllm.train(str(path), out=tmp_path / "one")
    ran = [json.loads((tmp_path / place / "environment.json").read_text())["processes"] for place in ("two", "one")]
    assert ran == ["2", "1"]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    two, one = (mllm.load(tmp_path / place).trained_state() for place in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
