"""Folders of encoders and language models in every state of damage: a model that answers, or one message."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm
from mllm.errors import MLLMError
from mllm.testing import tiny_image

VALUES = [None, "", "x", -1, 0, 1.5, 10**30, [], {}, True, [None], {"a": 1}]


def _replace(content: bytes | None) -> Callable[[Path], Any]:
    return lambda file: file.unlink() if content is None else file.write_bytes(content)


def _half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for position in random.Random(0).sample(range(min(len(data), 400)), 5):
        data[position] ^= 0x5A
    file.write_bytes(data)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": _replace(None),
    "empty": _replace(b""),
    "half": _half,
    "flipped": _flip,
    "a list": _replace(b"[]"),
    "null": _replace(b"null"),
    "deep": _replace(b"[" * 100_000),
    "not UTF-8": _replace(b"\xff\xfe{}"),
    "a folder": _folder,
    "a pipe": _pipe,
    "a pickle": _replace(pickle.dumps(print)),
}
FILES = {
    "encoder": ("config.json", "model.safetensors", "preprocessor_config.json"),
    "lm": ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
}


def answers(parts: dict[str, str]) -> None:
    """Let the model answer, or fail by one message, in less than five seconds."""
    began = time.monotonic()
    try:
        model = mllm.assemble(parts["encoder"], parts["lm"])
        _ = model.encoder.fingerprint, model.lm.fingerprint
        model.generate([[tiny_image(0), "red"]], max_new_tokens=2)
    except MLLMError as error:
        assert 20 < len(str(error)) < 3_000
    assert time.monotonic() - began < 60


@pytest.fixture
def damaged(tiny_parts, tmp_path) -> Callable[[str, str], tuple[dict[str, str], Path]]:
    """Return a function that copies a part's folder, and returns both parts and a file of the copy."""

    def copied(part: str, name: str) -> tuple[dict[str, str], Path]:
        parts = dict(zip(("encoder", "lm"), tiny_parts, strict=True))
        shutil.copytree(parts[part], tmp_path / part)
        parts[part] = str(tmp_path / part)
        file = tmp_path / part / name
        file.touch()
        return parts, file

    return copied


@pytest.mark.parametrize(
    ("part", "name", "damage"),
    [(part, name, damage) for part, names in FILES.items() for name, damage in itertools.product(names, DAMAGES)],
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_one_message_or_does_not_matter(damaged, part, name, damage):
    parts, file = damaged(part, name)
    DAMAGES[damage](file)
    answers(parts)


@pytest.mark.parametrize("part", ["encoder", "lm"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore")
def test_wrong_values_in_a_configuration_are_one_message_or_do_not_matter(damaged, part, seed):
    parts, file = damaged(part, "config.json")
    config: dict[str, Any] = json.loads(file.read_text())
    draw = random.Random(seed)
    for key in draw.sample(sorted(config), 4):
        file.write_text(json.dumps({**config, key: draw.choice(VALUES)}))
        answers(parts)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_run_code_are_refused(damaged, tmp_path):
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "code-was-run",)

    parts, file = damaged("lm", "model.safetensors")
    file.unlink()
    torch.save({"lm_head.weight": Planted()}, file.with_name("pytorch_model.bin"))
    with pytest.raises(MLLMError):
        mllm.assemble(parts["encoder"], parts["lm"])
    assert not (tmp_path / "code-was-run").exists()
