"""Runs of recipes that decode with beams are evaluated with them: MAPL, BLIP-2 and SimVLG, made tiny."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml

import mllm
from mllm.config import loading
from mllm.testing import LM_FAMILIES, tiny_image

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mapl": ("gpt-j", {"type": "mapper", "tokens": 4, "dim": 16, "layers": 1, "heads": 2, "ffn": 32}),
    "blip2-opt": ("opt", {"type": "qformer", "tokens": 4, "dim": 16, "layers": 2, "heads": 2}),
    "blip2-t5": ("t5", {"type": "qformer", "tokens": 4, "dim": 16, "layers": 2, "heads": 2}),
    "simvlg": ("opt", {"type": "token-merge", "merge": 4, "layers": 1, "heads": 2}),
}
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
    assert recipe.decoding["num_beams"] == 5
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
    prompt, decoding = model.spec.prompt, {**model.spec.decoding, "max_new_tokens": 9}
    texts = [
        prompt.question.format(question=row["question"]) if kind == "questions" else prompt.caption for row in rows
    ]
    expected = [
        stock(model, [tmp_path / row["image"], *filter(None, [text])], **decoding)
        for row, text in zip(rows, texts, strict=True)
    ]
    assert [row["prediction"] for row in report.rows] == expected
