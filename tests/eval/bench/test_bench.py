"""What is timed gives the same answers on both sides, and the table is written as measured."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch

from mllm.errors import MLLMError
from mllm.testing import tiny_lm

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    lm = tiny_lm(folder / "lm", context=1024)
    return import_module("mllm.eval.bench.shapes").llava(folder / "encoder", size=TINY, lm=lm)


@pytest.fixture
def generate():
    return import_module("mllm.eval.bench.generate")


def test_ours_is_transformers_llava_with_the_same_weights(both, generate):
    ours, stock = both
    shapes = import_module("mllm.eval.bench.shapes")
    images = shapes.noise_images(2)
    pixels = [ours.encoder.preprocess([image]) for image in images]
    for text in ("what is it?", "why"):
        inputs = generate._inputs(ours, [(image, text) for image in pixels])
        with torch.no_grad():
            expected = stock(**inputs).logits
        embeds, batch = ours.prepare([[image, text] for image in images])
        torch.testing.assert_close(ours.lm.logits(embeds, batch.mask), expected, atol=1e-5, rtol=1e-5)
    generate.agree(ours, stock, lambda line: None)


def test_models_that_answer_differently_are_not_timed(both, generate):
    ours, stock = both
    with torch.no_grad():
        stock.model.multi_modal_projector.linear_2.bias.add_(1.0)
    try:
        with pytest.raises(MLLMError, match="answer differently"):
            generate.agree(ours, stock, lambda line: None)
    finally:
        with torch.no_grad():
            stock.model.multi_modal_projector.linear_2.bias.sub_(1.0)


def test_a_row_is_made_and_written(both, generate, tmp_path):
    ours, stock = both
    lines: list[str] = []
    row = generate.questions(ours, stock, 3, 2, 1.0, repeats=1, progress=lines.append)
    assert row.ours > 0 and row.ratio == pytest.approx(row.ours / row.alternative) and 1 < row.bound < 3
    turn = generate.second_turn(ours, stock, repeats=1, progress=lines.append)
    import_module("mllm.eval.bench.table").report("tiny", [row, turn], tmp_path)
    written = json.loads((tmp_path / "tiny.json").read_text())
    assert [entry["name"] for entry in written["rows"]] == [row.name, turn.name] and lines


def test_without_lmms_eval_the_bench_names_what_is_missing(both, tmp_path):
    evaluate = import_module("mllm.eval.bench.evaluate")
    ours, stock = both
    with pytest.raises(MLLMError, match=r"needs lmms-eval, and lmms_eval is missing: pip install"):
        evaluate.alternative(ours, stock, tmp_path)
    asked = evaluate.items(2)
    assert [item.id for item in asked[4:6]] == ["0/4", "1/0"] and len(asked) == 11
    answers = evaluate.answered(ours, asked[:3])
    texts = [f"Question: {item.question} Answer:" for item in asked[:3]]
    prompts = [[asked[0].images[0], text] for text in texts]
    assert answers == [str(output) for output in ours.generate(prompts, max_new_tokens=4)]
