"""Runs of recipes that decode with beams are evaluated with them: MAPL, BLIP-2 and SimVLG, made tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mllm
from mllm.config import loading
from mllm.errors import MLLMError
from mllm.testing import LM_FAMILIES, tiny_image

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mapl": ("gpt-j", {"type": "mapper", "tokens": 4, "dim": 16, "layers": 1, "heads": 2, "ffn": 32}),
    "blip2-opt": ("opt", {"type": "qformer", "tokens": 4, "dim": 16, "layers": 2, "heads": 2}),
    "blip2-t5": ("t5", {"type": "qformer", "tokens": 4, "dim": 16, "layers": 2, "heads": 2}),
    "simvlg": ("opt", {"type": "token-merge", "merge": 4, "layers": 1, "heads": 2}),
}


def of_kind(decoding: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a recipe's options of one kind of answer: those of all kinds, and its own over them."""
    shared = {name: value for name, value in decoding.items() if name not in ("caption", "question")}
    return {**shared, **decoding.get(kind, {})}


DATA: dict[str, tuple[list[dict[str, str]], str]] = {
    "captions": ([{"image": f"{i}.png", "caption": "a cat"} for i in range(5)], "caption/rouge-l"),
    "questions": (
        [{"image": f"{i // 2}.png", "question": "why" * i + "?", "answer": "x"} for i in range(5)],
        "vqa/exact-match",
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any, tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, connector = KINDS[request.param]
    recipe = loading.load(request.param).stages[-1]
    assert of_kind(recipe.decoding, "caption")["num_beams"] == of_kind(recipe.decoding, "question")["num_beams"] == 5
    options: dict[str, Any] = {"decoding": recipe.decoding, "prompt": recipe.prompt.model_dump()}
    return mllm.assemble(tiny_parts[0], LM_FAMILIES[family](tmp_path_factory.mktemp(family)), connector, **options)


def stock(model: Any, prompt: list[Any], **decoding: Any) -> str:
    """Return what ``generate`` of `transformers` answers to one whole prompt, given its embeddings."""
    lm = model.lm.model
    embeds, _ = model.prepare([prompt])
    if lm.config.is_encoder_decoder:
        end = torch.tensor([model.lm.text.end_of_text], dtype=torch.long)
        embeds = torch.cat([embeds, model.lm.embed(end)], dim=1)
    ids = lm.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), do_sample=False, eos_token_id=model.lm.eos,
        pad_token_id=model.lm.pad, tokenizer=model.lm.tokenizer, **decoding,
    )  # fmt: skip
    new = ids[0, 1 if lm.config.is_encoder_decoder else 0 :].tolist()
    return str(model.lm.decode(model.lm.text.until_end(new))).strip()


@pytest.mark.parametrize("kind", DATA)
def test_an_evaluation_decodes_with_the_recipes_beams(model, tmp_path, kind):
    rows, metric = DATA[kind]
    for index in range(5):
        tiny_image(index).save(tmp_path / f"{index}.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    suite = {
        "name": "rows", "about": "A table.", "data": {"format": "table"}, "folder": {"path": "rows.json"},
        "metrics": [metric], "decoding": {"max_new_tokens": 9}, "batch_size": 3,
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    report = mllm.evaluate(model, str(tmp_path / "suite.yaml"), tmp_path)
    prompt = model.spec.prompt
    decoding = {**of_kind(model.spec.decoding, kind.removesuffix("s")), "max_new_tokens": 9}
    texts = [
        prompt.question.format(question=row["question"]) if kind == "questions" else prompt.caption for row in rows
    ]
    expected = [
        stock(model, [tmp_path / row["image"], *filter(None, [text])], **decoding)
        for row, text in zip(rows, texts, strict=True)
    ]
    assert [row["prediction"] for row in report.rows] == expected


@pytest.fixture
def by_kind(tiny_parts: tuple[str, str]) -> Any:
    """A model whose captions have eight tokens at least, and whose answers to questions three at most."""
    decoding = {
        "num_beams": 2,
        "caption": {"min_new_tokens": 8, "max_new_tokens": 12},
        "question": {"max_new_tokens": 3, "length_penalty": -1.0},
    }
    return mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4}, decoding=decoding)


def test_a_suite_of_captions_and_questions_decodes_each_as_its_kind(by_kind: Any, tmp_path: Path) -> None:
    tiny_image(0).save(tmp_path / "0.png")
    rows = [{"image": "0.png", "question": "why?", "answer": "x"}, {"image": "0.png", "caption": "a cat"}]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {**rows[0], "question": "what?"}]))
    suite = {
        "name": "rows", "about": "A table.", "data": {"format": "table"}, "folder": {"path": "rows.json"},
        "metrics": ["vqa/exact-match"],
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    report = mllm.evaluate(by_kind, str(tmp_path / "suite.yaml"), tmp_path, baselines=[])
    prompt, image = by_kind.spec.prompt, tmp_path / "0.png"
    why, what = (prompt.question.format(question=text) for text in ("why?", "what?"))
    caption, question = (of_kind(by_kind.spec.decoding, kind) for kind in ("caption", "question"))
    expected = [
        stock(by_kind, [image, why], **question),
        stock(by_kind, [image, prompt.caption], **caption),
        stock(by_kind, [image, what], **question),
    ]
    assert [row["prediction"] for row in report.rows] == expected


def test_every_way_of_asking_decodes_as_the_kind_of_what_is_asked(by_kind: Any, tmp_path: Path) -> None:
    tiny_image(0).save(tmp_path / "0.png")
    image, prompt, decoding = tmp_path / "0.png", by_kind.spec.prompt, by_kind.spec.decoding
    caption = stock(by_kind, [image, prompt.caption], **of_kind(decoding, "caption"))
    asked = [image, prompt.question.format(question="why?")]
    answer = stock(by_kind, asked, **of_kind(decoding, "question"))
    view = by_kind.see([image])
    assert (view.caption(), view.ask("why?")) == (caption, answer)
    assert [str(by_kind.generate([asked], kind="question")[0]), view.views.ask([["why?"]])[0][0]] == [answer] * 2
    assert str(by_kind.chat().show("why?", [image])) == answer
    assert str(by_kind.chat().show("", [image])) == caption
    assert view.ask("why?", max_new_tokens=1) == stock(
        by_kind, asked, num_beams=2, length_penalty=-1.0, max_new_tokens=1
    )
    with pytest.raises(MLLMError, match="kind"):
        by_kind.generate([asked], kind="answer")


def test_options_of_a_kind_that_are_no_options_are_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(MLLMError, match=r"decoding.*caption"):
        loading.load("mapl", {"decoding.caption": 4})
