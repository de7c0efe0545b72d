"""Models exported to transformers: in padded batches, in pipelines and saved again, they answer as ours do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mllm
from mllm.export.export import export
from mllm.testing import tiny_image

A, B = tiny_image(1), tiny_image(2)
PROMPTS = [[A, "short"], [B, "a much longer prompt than that"], [B, A, "two"]]
DECODING = {"max_new_tokens": 8, "min_new_tokens": 8}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Exported:
    """A model, and what transformers loads of its export."""

    ours: Any
    folder: Path
    stock: Any
    processor: Any

    def inputs(self, prompts: Sequence[Sequence[Any]], side: str | None = None) -> Any:
        """Return a padded batch, as the processor makes it."""
        images = [[piece for piece in prompt if not isinstance(piece, str)] for prompt in prompts]
        texts = ["".join(piece if isinstance(piece, str) else "<image>" for piece in prompt) for prompt in prompts]
        sides = {} if side is None else {"padding_side": side}
        return self.processor(images=images, text=texts, padding=True, return_tensors="pt", **sides)

    def answers(self, inputs: Any) -> list[str]:
        """Return what the stock model answers."""
        ids = self.stock.generate(**inputs, **DECODING)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


@pytest.fixture(scope="module", params=["llama", "gemma", "qwen2"])
def exported(request, encoder, lm_folder, tmp_path_factory):
    folder = lm_folder(request.param, template=TEMPLATE, padding_side="right")
    template = {"template": "{images}{prompt}"}
    model = mllm.assemble({"model": encoder, "layer": -1}, folder, {"type": "mlp"}, prompt=template)
    out = tmp_path_factory.mktemp("exported") / request.param
    export(model, out, to="hf-llava")
    stock = transformers.AutoModelForImageTextToText.from_pretrained(out).eval()
    return Exported(model, out, stock, transformers.AutoProcessor.from_pretrained(out, backend="pil"))


def test_a_batch_as_the_processor_pads_it_is_answered_as_ours(exported):
    assert exported.answers(exported.inputs(PROMPTS)) == list(map(str, exported.ours.generate(PROMPTS, **DECODING)))


def test_a_batch_padded_on_the_left_is_answered_as_ours(exported):
    expected = list(map(str, exported.ours.generate(PROMPTS, **DECODING)))
    assert all(expected)
    assert exported.answers(exported.inputs(PROMPTS, "left")) == expected


def test_a_text_alone_is_answered_as_ours(exported):
    expected = str(exported.ours.generate([["no picture"]], **DECODING)[0])
    assert exported.answers(exported.processor(text=["no picture"], return_tensors="pt")) == [expected]


@pytest.fixture
def pipeline(exported):
    return transformers.pipeline("image-text-to-text", model=exported.stock, processor=exported.processor)


def test_a_pipeline_answers_as_ours(exported, pipeline):
    answer = pipeline(images=A, text="<image>short", return_full_text=False, generate_kwargs=DECODING)
    assert answer[0]["generated_text"].strip() == str(exported.ours.generate([[A, "short"]], **DECODING)[0])


def test_a_pipeline_takes_messages(pipeline):
    content = [{"type": "image", "image": A}, {"type": "text", "text": "hi"}]
    answer = pipeline(text=[{"role": "user", "content": content}], generate_kwargs=DECODING)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_the_generation_config_names_pad_and_eos(exported):
    config = json.loads((exported.folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == exported.processor.tokenizer.eos_token_id
    assert config["pad_token_id"] is not None


def test_saved_again_by_transformers_the_logits_are_the_same(exported, tmp_path):
    exported.stock.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = exported.inputs(PROMPTS)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, exported.stock(**inputs).logits)


def test_it_generates_in_bfloat16(exported):
    model = transformers.AutoModelForImageTextToText.from_pretrained(exported.folder, dtype=torch.bfloat16).eval()
    inputs = exported.inputs(PROMPTS, "left")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    new = model.generate(**inputs, **DECODING)[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (len(PROMPTS), 8)
