"""The text that prompts begin with is computed once: answers and likelihoods are those of prompts written out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import mllm
from mllm.answering.decode import answer, candidate_ids, for_prompts, make_decoding
from mllm.answering.shared import prefilled
from mllm.lms.shared_prefix import KEPT
from mllm.prompts.formatting import formatted, preamble
from mllm.testing import LM_FAMILIES, tiny_image
from mllm.testing.lms import LMFamily

EXAMPLES = [{"words": "a red bus", "answer": "a bus"}, {"words": "sky", "question": "What?", "answer": "blue"}]
PROMPT = {"template": "{images}: {prompt}", "chat": "plain", "examples": EXAMPLES}
TEXTS = ["A picture of", "", "Question: what is to be seen here, and of which colour is it, if it has any? Answer:"]
WIDE: dict[str, Any] = {
    "sliding_window": 96,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
MIXED = {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, Any] = {
    **LM_FAMILIES,
    "wide-mistral": LMFamily("mistral", WIDE, start=True),  # windows that hold the examples, but not whole prompts
    "wide-gemma3": LMFamily("gemma3_text", {**WIDE, **MIXED}, start=True),
}
SHARING = ["gpt2", "gpt-neo", "gpt-j", "opt", "bloom", "falcon", "llama", "mixtral", "qwen3", "gemma", "phi", "smollm3"]
SHARING += ["wide-mistral", "wide-gemma3"]
PLAIN = ["mpt", "mamba", "rwkv", "t5", "bart", "mistral", "gemma2"]  # the last two have windows of 8 positions


def assembled(tiny_parts: tuple[str, str], folder: Path, family: str, prompt: Any = PROMPT, **options: Any) -> Any:
    part = FAMILIES[family](folder / family)
    return mllm.assemble(tiny_parts[0], part, {"type": "linear", "tokens": 4}, prompt=prompt, **options)


@pytest.fixture
def llama(tiny_parts: tuple[str, str], tmp_path: Path) -> Any:
    return assembled(tiny_parts, tmp_path, "llama")


def prompts_of(model: Any) -> list[list[Any]]:
    """Prompts behind the recipe's examples: of several lengths, one without an image, one much longer than the rest."""
    rows = [formatted(model.spec.prompt, [tiny_image(row)], text) for row, text in enumerate(TEXTS)]
    return [*rows, formatted(model.spec.prompt, [], "no image"), [*rows[0], " and" * 20]]


def written_out(model: Any, prompts: list[list[Any]], **options: Any) -> list[str]:
    """Answers of the language model to the prompts' embeddings, each prompt alone and as a whole."""
    decodings = for_prompts(model, prompts, [make_decoding(model, options)] * len(prompts))
    answers = []
    for prompt, decoding in zip(prompts, decodings, strict=True):
        embeds, batch = model.prepare([prompt])
        (ids,) = model.lm.generate(batch.mask, [decoding], inputs_embeds=embeds)
        answers.append(model.lm.decode(ids).strip())
    return answers


def texts(outputs: list[Any]) -> list[str]:
    return [str(output) for output in outputs]


@torch.no_grad()
def likelihood(model: Any, prompt: list[Any], candidate: str) -> float:
    """The log-likelihood of an answer, of one pass through the prompt and the answer."""
    embeds, batch = model.prepare([prompt])
    ids = torch.tensor([candidate_ids(model.lm, candidate)])
    whole = torch.cat([embeds, model.lm.embed(ids)], dim=1)
    logits = model.lm.logits(whole, torch.ones(whole.shape[:2], dtype=torch.long))
    steps = logits[0, batch.ids.shape[1] - 1 : -1].float().log_softmax(-1)
    return float(steps.gather(1, ids.T).sum())


class Passes(list[tuple[int, int]]):
    """The rows and positions of each pass through a language model's layers, from when it is made on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        assert model.lm.runner.shares_prefix  # which is probed once
        model.lm.layers[0].register_forward_pre_hook(lambda _, args: self.append(tuple(args[0].shape[:2])))


@pytest.mark.parametrize("family", SHARING)
def test_answers_behind_shared_examples_are_those_of_prompts_written_out(tiny_parts, tmp_path, family):
    model = assembled(tiny_parts, tmp_path, family)
    assert model.lm.runner.shares_prefix
    prompts = prompts_of(model)
    for options in ({}, {"num_beams": 3}, {"seed": 4, "top_p": 0.9}, {"repetition_penalty": 1.3}):
        expected = written_out(model, prompts, max_new_tokens=6, **options)
        assert texts(model.generate(prompts, max_new_tokens=6, **options)) == expected
        assert texts(model.generate(prompts[1:2], max_new_tokens=6, **options)) == expected[1:2]
    assert len(model.prefixes) == 1
    embeds, batch = model.prepare(prompts)
    logits = prefilled(model, embeds, batch)[1]
    for row, prompt in enumerate(prompts):
        alone, one = model.prepare([prompt])
        torch.testing.assert_close(logits[row], model.lm.prefill(alone, one.mask)[1][0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", PLAIN)
def test_models_that_cannot_start_from_a_cache_answer_as_before(tiny_parts, tmp_path, family):
    model = assembled(tiny_parts, tmp_path, family)
    prompts = prompts_of(model)
    assert texts(model.generate(prompts, max_new_tokens=4)) == written_out(model, prompts, max_new_tokens=4)
    assert len(model.prefixes) == 0


@pytest.mark.parametrize(
    "adapter", [{"type": "prompt", "positions": 2}, {"type": "prefix", "positions": 2}, {"type": "gated", "every": 1}]
)
def test_adapters_before_or_beside_a_row_are_not_shared(tiny_parts, tmp_path, adapter):
    model = assembled(tiny_parts, tmp_path, "llama", adapters=[adapter])
    prompts = prompts_of(model)
    assert not model.lm.runner.shares_prefix
    assert texts(model.generate(prompts, max_new_tokens=4)) == written_out(model, prompts, max_new_tokens=4)
    assert len(model.prefixes) == 0


def test_text_alone_is_answered_as_by_the_bare_language_model(llama):
    prompts = [formatted(llama.spec.prompt, [], text) for text in TEXTS[::2]]
    bare: Any = AutoModelForCausalLM.from_pretrained(llama.spec.lm.model, trust_remote_code=False)
    outputs = llama.generate(prompts, max_new_tokens=6)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([llama.encode(prompt).ids])
        new = bare.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        assert str(output) == llama.lm.decode(new[0, ids.shape[1] :]).strip()
    assert len(llama.prefixes) == 1


def test_likelihoods_views_and_chat_start_from_the_examples_too(llama):
    prompts, candidates = prompts_of(llama), ["a bus", "blue", "a blue bus"]
    for prompt in prompts:
        expected = [likelihood(llama, prompt, candidate) for candidate in candidates]
        assert llama.score(prompt, candidates) == pytest.approx(expected, abs=1e-3)
    views = llama.see_each(prompts)
    for row, view in enumerate(views):
        expected = [likelihood(llama, prompts[row], candidate) for candidate in candidates]
        assert view.score(candidates) == pytest.approx(expected, abs=1e-3)
    asked = [[*prompt, text] for prompt in prompts for text in (" Why?", " Is it so?")]
    answers = views.continue_with([[" Why?", " Is it so?"]] * len(prompts), max_new_tokens=5)
    assert [answer for of_view in answers for answer in of_view] == written_out(llama, asked, max_new_tokens=5)
    passes, chat = Passes(llama), llama.chat()
    question = llama.spec.prompt.question.format(question="What is it?")
    (first,) = written_out(llama, [formatted(llama.spec.prompt, [tiny_image(1)], question)], max_new_tokens=5)
    longest = max(width for _, width in passes)
    passes.clear()
    assert chat.send("What is it?", images=[tiny_image(1)], max_new_tokens=5) == first.rstrip()
    assert max(width for _, width in passes) < longest
    assert len(llama.prefixes) == 1


def test_contrastive_decoding_shares_the_examples_of_both_passes(llama):
    prompts = prompts_of(llama)[:3]
    options = {"max_new_tokens": 5, "contrastive": {"alpha": 1.0}}
    shared = texts(llama.generate(prompts, **options))
    llama.lm.runner.shares_prefix = False
    assert shared == texts(llama.generate(prompts, **options))


def test_examples_are_computed_once_for_several_batches(llama):
    passes, prompts = Passes(llama), prompts_of(llama)
    length = len(llama.encode(preamble(llama.spec.prompt)).ids)
    llama.generate(prompts, max_new_tokens=1)
    (rows, width), batch = passes
    assert (rows, width) == (1, length)
    assert batch == (len(prompts), max(len(llama.encode(prompt).ids) for prompt in prompts) - length)
    passes.clear()
    llama.generate(prompts[:2], max_new_tokens=1)
    llama.score(prompts[0], ["a"])
    lengths = [len(llama.encode(prompt).ids) - length for prompt in prompts]
    assert passes[:2] == [(2, max(lengths[:2])), (1, lengths[0])]


@pytest.mark.parametrize("change", ["weights", "adapter", "loaded", "trained", "off"])
def test_states_of_other_weights_are_not_used(tiny_parts, tmp_path, change):
    model = assembled(tiny_parts, tmp_path, "llama", adapters=[{"type": "lora", "r": 4}])
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(std=0.5)  # else the adapter starts as nothing
    prompts, (layer, *_) = prompts_of(model), model.lm.layers
    before = texts(model.generate(prompts, max_new_tokens=6))
    with torch.no_grad():
        if change == "weights":
            layer.mlp.down_proj.weight.mul_(-1.5)
        elif change == "adapter":
            next(model.adapters.parameters()).mul_(-2)
        elif change == "loaded":
            model.load_state_dict({name: tensor * 1.2 for name, tensor in model.state_dict().items()})
    if change == "trained":
        model.train()
        layer.mlp.down_proj.weight.data.mul_(-1.5)  # as an optimizer of its own may do: unseen by autograd
        model.eval()
    with model.adapters_off() if change == "off" else nullcontext():
        expected = written_out(model, prompts, max_new_tokens=6)
        assert texts(model.generate(prompts, max_new_tokens=6)) == expected != before
    if change == "off":
        assert texts(model.generate(prompts, max_new_tokens=6)) == before


@pytest.mark.parametrize("position", [0, 2])
def test_examples_with_an_image_share_the_text_before_it(tiny_parts, tmp_path, position):
    tiny_image(7).save(tmp_path / "example.png")
    examples = [*EXAMPLES[:position], {"image": str(tmp_path / "example.png"), "answer": "noise"}, *EXAMPLES[position:]]
    model = assembled(tiny_parts, tmp_path, "llama", {**PROMPT, "examples": examples})
    passes, prompts = Passes(model), prompts_of(model)[:3]
    outputs = model.generate(prompts, max_new_tokens=6)
    before_image = model.encode(prompts[0]).visual.index(True)
    assert [width for rows, width in passes if rows == 1] == ([before_image] if position else [])
    assert texts(outputs) == written_out(model, prompts, max_new_tokens=6)


def test_a_batch_shares_a_long_beginning_of_its_own(tiny_parts, tmp_path):
    model = assembled(tiny_parts, tmp_path, "llama", {"chat": "plain"})
    shots = "One line of instructions that all of these prompts begin with, whatever comes after it. "
    prompts = [[shots, tiny_image(row), f"Number {row}"] for row in range(6)]
    passes = Passes(model)
    outputs = model.generate(prompts, max_new_tokens=6)
    assert passes[0] == (1, len(model.encode([shots]).ids))
    assert texts(outputs) == written_out(model, prompts, max_new_tokens=6)
    passes.clear()
    model.generate(prompts[:2], max_new_tokens=1)  # of two rows little would be saved
    assert [rows for rows, _ in passes] == [2]


def test_few_beginnings_are_kept_and_none_of_a_batch_alone(llama):
    for number in range(KEPT + 2):
        opening = f"{number} is what all of these prompts begin with, which is a different one for each batch. "
        llama.generate([[opening, tiny_image(row)] for row in range(6)], max_new_tokens=1)
    assert len(llama.prefixes) == 0
    for number in range(KEPT + 2):
        llama.prefixes.of([number], llama, DynamicCache)
    assert len(llama.prefixes) == KEPT


def test_a_batch_wider_than_the_context_is_answered_row_by_row(llama):
    prompts = [formatted(llama.spec.prompt, [tiny_image(0)], "and" * 45), *prompts_of(llama)[:2]]
    room = llama.lm.context - len(llama.encode(prompts[0]).ids)
    lengths = [room, room + 20, room + 20]
    decodings = [make_decoding(llama, {"max_new_tokens": length}) for length in lengths]
    expected = [written_out(llama, [p], max_new_tokens=n)[0] for p, n in zip(prompts, lengths, strict=True)]
    assert texts(answer(llama, prompts, decodings)) == expected
    assert len(llama.prefixes) == 0
