"""Answer modes: every mode has the contract's methods, and a mode of another package answers a suite."""

from __future__ import annotations

import inspect
import json
import sys
from importlib import import_module
from typing import Any

import pytest

import mllm
from mllm.builtin import BUILT_IN
from mllm.errors import MLLMError
from mllm.registry import lookup, table

MODE = '''
class Spell:
    """Answers with the letters of the question."""

    def baselines(self, items):
        return {"reversed": True, "empty": False}

    def answers(self, model, items, context):
        texts = {
            "model": [" ".join(item.question) for item in items],
            "reversed": [" ".join(reversed(item.question)) for item in items],
            "empty": ["" for item in items],
        }
        return {name: texts[name] for name in ("model", *context.baselines)}

    def shown_images(self, item, answer):
        return ()
'''


@pytest.mark.parametrize("name", BUILT_IN["answers"])
def test_a_mode_has_the_methods_of_the_contract(name):
    contract, mode = import_module("mllm.eval.answers.base").AnswerMode, lookup("answers", name)()
    for method in ("baselines", "answers", "shown_images"):
        expected = list(inspect.signature(getattr(contract, method)).parameters)
        assert ["self", *inspect.signature(getattr(mode, method)).parameters] == expected


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """The path of a suite whose answer mode comes from another installed package."""
    info = tmp_path / "spelling-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spelling\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mllm.answers]\nspell = spelling_modes:Spell\n")
    (tmp_path / "spelling_modes.py").write_text(MODE)
    monkeypatch.syspath_prepend(tmp_path)
    table.cache_clear()
    rows = [{"prompt": word, "label": "retrieve"} for word in ("ab", "abc")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content: dict[str, Any] = {"name": "spelling", "about": "tiny", "answer": "spell", "metrics": ["vqa/exact-match"]}
    content["data"] = {"format": "decisions", "path": str(tmp_path / "rows.jsonl")}
    (tmp_path / "spell.yaml").write_text(json.dumps(content))
    yield str(tmp_path / "spell.yaml")
    table.cache_clear()
    sys.modules.pop("spelling_modes", None)


def test_a_mode_of_another_package_answers_a_suite(suite, tiny_model):
    model = tiny_model()
    report = mllm.evaluate(model, suite)
    assert [row["prediction"] for row in report.rows] == ["a b", "a b c"]
    assert [row["baselines"] for row in report.rows] == [{"reversed": "b a"}, {"reversed": "c b a"}]
    every = mllm.evaluate(model, suite, baselines=["all"])
    assert every.summary["baselines"] == ["reversed", "empty"]
    with pytest.raises(MLLMError, match="has the baselines reversed, empty, and no 'blind'"):
        mllm.evaluate(model, suite, baselines=["blind"])


def test_a_mode_without_baselines_refuses_them(suite, tiny_model):
    with pytest.raises(MLLMError, match=r"has no baselines \(answer=closest\), so none 'blind'"):
        mllm.evaluate(tiny_model(), suite, overrides=["answer=closest"], baselines=["blind"])


def test_an_unknown_mode_is_named(suite, tiny_model):
    with pytest.raises(MLLMError, match=r"'chose': no answer mode has this name\. Did you mean 'choose'"):
        mllm.evaluate(tiny_model(), suite, overrides=["answer=chose"])
