"""Beams, penalties and constraints: in every way of answering what stock ``generate`` gives for the whole prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import mllm
from mllm.answering.decode import answer, make_decoding
from mllm.errors import MLLMError
from mllm.lms.cross_attention import using_memory
from mllm.testing import LM_FAMILIES, tiny_image

# A decoder's answer is shorter than the shortest length that counts its prompt; an encoder-decoder's is not.
pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")

LINEAR: dict[str, Any] = {"type": "linear", "tokens": 4}
IMAGE, OTHER = tiny_image(1), tiny_image(2, size=(20, 50))
TEXT = "the cat the cat"
PROMPTS: list[list[Any]] = [[IMAGE, TEXT], ["no image, but the cat"], [OTHER, "a", IMAGE, "is like the other"]]
NEW_TOKENS = 12

OPTIONS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "long beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "short beams": {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never"},
    "renormalized beams": {"num_beams": 2, "renormalize_logits": True, "suppress_tokens": [101, 102]},
    "repetition": {"repetition_penalty": 1.8},
    "repeated": {"repetition_penalty": 0.6},
    "unigrams": {"no_repeat_ngram_size": 1},
    "bigrams": {"no_repeat_ngram_size": 2},
    "prompt": {"encoder_repetition_penalty": 1.7},
    "prompt's bigrams": {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 9.0},
    "bad words": {"bad_words_ids": [[t] for t in range(60, 130)] + [[116, t] for t in range(130, 200)]},
    "bias": {"sequence_bias": [[[116, 104], 9.0], [[101], 3.0], [[104, 101], 9.0]]},
    "shortest": {"min_new_tokens": 5},
    "shortest in all": {"min_length": 28},
    "suppressed": {"suppress_tokens": [*range(90, 120)], "begin_suppress_tokens": [*range(200)]},
    "ever likelier end": {"exponential_decay_length_penalty": [3, 1.6]},
    "forced end": {"forced_eos_token_id": 70},
    "penalized beams": {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "biased beams": {"num_beams": 2, "sequence_bias": [[[116, 104], 9.0]], "encoder_repetition_penalty": 1.3},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
FAMILIES = ["llama", "gpt2", "qwen2", "mistral", "mamba", "t5"]


Parts = tuple[str, str]
ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"type": "prompt", "positions": 3}],
    "prefix": [{"type": "prefix", "positions": 3, "std": 0.5}],
    "gated": [{"type": "gated", "every": 1, "heads": 2, "head_dim": 8}],
    "gated prefix": [{"type": "prompt", "positions": 3}, {"type": "gated", "every": 1, "heads": 2, "head_dim": 8}],
}


def assembled(tiny_parts: Parts, folder: Any, family: str, **options: Any) -> Any:
    """Return a model that ends most answers before they are as long as they may be."""
    model = mllm.assemble(tiny_parts[0], LM_FAMILIES[family](folder), LINEAR, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():  # open gates
            parameter.add_(0.3 * torch.randn_like(parameter))
        embeds, batch = model.prepare(PROMPTS)
        model.end_bias = 2 * float(model.lm.logits(embeds, batch.mask)[:, -1].std(-1).mean())
    model.lm.model.get_output_embeddings().register_forward_hook(_raising(model.lm.eos, model.end_bias))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any, tiny_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return assembled(tiny_parts, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tiny_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return assembled(tiny_parts, tmp_path_factory.mktemp("llama"), "llama")


def stock(model: Any, prompt: list[Any], **options: Any) -> str:
    """Return what stock ``generate`` answers to one whole prompt, given its embeddings and its ids.

    A visual token has the id of a token that was added to a copy of the language model, and is never generated.
    """
    embeds, batch = model.prepare([prompt])
    lm = copy.deepcopy(model.lm.model)
    image = lm.get_output_embeddings().weight.shape[0]
    lm.resize_token_embeddings(image + 1)
    lm.get_output_embeddings()._forward_hooks.clear()
    lm.get_output_embeddings().register_forward_hook(_raising(model.lm.eos, model.end_bias))
    lm.get_output_embeddings().register_forward_hook(_raising(image, -1e9))
    ids = batch.ids.masked_fill(batch.visual, image)
    inputs = {"inputs_embeds": embeds, "input_ids": ids}
    if lm.config.is_encoder_decoder:  # takes ids or embeddings
        end = torch.tensor([model.lm.text.end_of_text], dtype=torch.long)
        ids, embeds = torch.cat([ids, end], 1), torch.cat([embeds, model.lm.embed(end)], 1)
        inputs = {"inputs_embeds": embeds}
    if not batch.visual.any():
        inputs = {"input_ids": ids}
    out = lm.generate(
        **inputs, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        eos_token_id=model.lm.eos, pad_token_id=model.lm.pad, **options,
    )  # fmt: skip
    new = out[0, 1 if lm.config.is_encoder_decoder else ids.shape[1] :]
    return str(model.lm.decode(model.lm.text.until_eos(new.tolist()))).strip()


def _raising(token: int, bias: float) -> Any:
    def hook(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., token] += bias
        return logits

    return hook


def for_stock(prompts: list[list[Any]], options: dict[str, Any]) -> list[list[Any]]:
    """Return the prompts that stock ``generate`` can answer with these options: the encoder's penalties need ids."""
    return prompts if not any(name.startswith("encoder") for name in options) else [["no image, but the cat"], ["ab"]]


@every_option
def test_a_batch_gives_what_stock_generate_gives_alone(model, options):
    prompts = for_stock(PROMPTS, options)
    answers = [str(output) for output in model.generate(prompts, max_new_tokens=NEW_TOKENS, **options)]
    assert answers == [stock(model, prompt, **options) for prompt in prompts]


@every_option
def test_an_option_changes_answers(llama, options):
    first = next(iter(options))
    without = {name: value for name, value in options.items() if name != first}
    answers, others = (
        llama.generate([*PROMPTS, ["no image"]], max_new_tokens=NEW_TOKENS, **chosen) for chosen in (options, without)
    )
    assert answers != others


@every_option
def test_views_and_chats_give_what_generate_gives(model, options):
    expected = [str(output) for output in model.generate(PROMPTS, max_new_tokens=NEW_TOKENS, **options)]
    views = model.see_each([prompt[:-1] or ["no image"] for prompt in PROMPTS])
    texts = [[prompt[-1].removeprefix("no image")] for prompt in PROMPTS]
    assert views.continue_with(texts, max_new_tokens=NEW_TOKENS, **options) == [[answer] for answer in expected]
    chat = model.chat()
    for text, images in (("What?", [IMAGE]), ("And the cat?", []), ("And this?", [OTHER])):
        answer = chat.send(text, images, max_new_tokens=NEW_TOKENS, **options)
        whole = model.chat(messages=chat.messages[:-2])
        assert whole.send(text, images, max_new_tokens=NEW_TOKENS, **options) == answer
        assert "".join(model.chat(messages=chat.messages[:-2]).stream(text, images, max_new_tokens=NEW_TOKENS, **options)) == answer
