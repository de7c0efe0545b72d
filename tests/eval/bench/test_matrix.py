"""The matrix of parts: a seeded sample (`mllm bench matrix` has all); a stopped run continues; failures are listed."""

from __future__ import annotations

import importlib
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, ViTImageProcessorPil

from mllm.errors import MLLMError
from mllm.registry import lookup, table
from mllm.testing import ENCODER_FAMILIES, LM_FAMILIES, tiny_encoder, tiny_lm
from mllm.testing.lms import Family

matrix: Any = importlib.import_module("mllm.eval.bench.matrix")
SAMPLE = random.Random(3).sample([*itertools.product(ENCODER_FAMILIES, LM_FAMILIES, sorted(table("connectors")))], 50)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return matrix.Parts(tmp_path_factory.mktemp("matrix"), ENCODER_FAMILIES, LM_FAMILIES)


@pytest.mark.parametrize("names", SAMPLE, ids="+".join)
def test_a_sample_of_triples(parts, names):
    encoder, lm, _ = names
    matrix.check(parts, parts.spec(*names), parts.encoder(encoder), parts.lm(lm))


def unlisted(folder: Path) -> str:
    """Save a tiny encoder of a family that no list has."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    AutoModel.from_config(AutoConfig.for_model("vit_msn", **shape, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


OLMO = Family(
    "olmo",
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
)


@pytest.mark.parametrize("connector", sorted(table("connectors")))
def test_families_on_no_list(tmp_path, connector):
    assert "vit-msn" not in ENCODER_FAMILIES and "olmo" not in LM_FAMILIES
    two = matrix.Parts(tmp_path, {"vit-msn": unlisted}, {"olmo": OLMO})
    assert matrix.tried(two, "vit-msn", "olmo", connector).why == ""


@pytest.fixture
def small(monkeypatch):
    """A matrix of one encoder, one language model and one connector that works, and one that does not."""
    monkeypatch.setattr(matrix, "ENCODER_FAMILIES", {"tiny": tiny_encoder})
    monkeypatch.setattr(matrix, "LM_FAMILIES", {"tiny": tiny_lm})
    monkeypatch.setattr(matrix, "table", lambda group: {"linear": "", "token-merge": ""})
    monkeypatch.setitem(matrix.OPTIONS, "token-merge", {"merge": 9})
    return matrix


def test_it_continues_where_it_stopped_and_lists_what_does_not_work(small, tmp_path, monkeypatch):
    triples = small.run(out=tmp_path, progress=lambda line: None)
    assert [triple.why == "" for triple in triples] == [True, False]
    lines = (tmp_path / "matrix.jsonl").read_text().splitlines()
    (tmp_path / "matrix.jsonl").write_text("\n".join([*lines[:2], lines[2][:20]]))  # killed in the middle of a line
    tried: list[str] = []

    def again(parts: Any, *names: str) -> Any:
        tried.append(names[2])
        return triples[1]

    monkeypatch.setattr(small, "tried", again)
    for _ in range(2):
        assert small.run(out=tmp_path, progress=lambda line: None) == triples
    assert tried == ["token-merge"]
    page = (tmp_path / "matrix.md").read_text()
    assert "1 of 2 combinations work" in page
    assert "- tiny | tiny | token-merge (1): connector.merge is 9" in page


def test_a_file_of_other_versions_is_refused(small, tmp_path):
    (tmp_path / "matrix.jsonl").write_text(json.dumps({"torch": "1.0", "transformers": "4.0"}) + "\n")
    with pytest.raises(MLLMError, match=r"was begun with .*1\.0.*Give another --out"):
        small.run(out=tmp_path)


def test_a_batch_that_differs_from_its_members_is_detected(tmp_path):
    """A connector that mixes the images of a batch fails."""
    tiny = matrix.Parts(tmp_path, {"tiny": tiny_encoder}, {"tiny": tiny_lm})
    encoder, lm = tiny.encoder("tiny"), tiny.lm("tiny")
    linear = lookup("connectors", "linear")
    forward = linear.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "forward", lambda self, features: forward(self, features - features.mean(0)))
        with pytest.raises(AssertionError, match="a batch gives different logits"):
            matrix.check(tiny, tiny.spec("tiny", "tiny", "linear"), encoder, lm)
