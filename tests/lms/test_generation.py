"""Beams, penalties and constraints: in every way of answering what stock ``generate`` gives for the whole prompt."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

import mllm
from mllm.answering.decode import answer, make_decoding
from mllm.errors import MLLMError
from mllm.lms.cross_attention import append_embeddings
from mllm.prompts.messages import turns
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
}


def assembled(tiny_parts: Parts, folder: Any, family: str, **options: Any) -> Any:
    """Return a model that ends most answers before they are as long as they may be."""
    model = mllm.assemble(tiny_parts[0], LM_FAMILIES[family](folder), LINEAR, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():  # open gates
            parameter.add_(0.3 * torch.randn_like(parameter))
        embeds, batch = model.prepare(PROMPTS)
        bias = 2 * float(model.lm.logits(embeds, batch.mask)[:, -1].std(-1).mean())
    model.end_bias = bias  # type: ignore[assignment]  # kept for the stock model
    model.lm.model.get_output_embeddings().register_forward_hook(_raising(model.lm.eos, bias))
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
    return str(model.lm.decode(model.lm.text.until_end(new.tolist()))).strip()


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
def test_a_batch_and_views_give_what_stock_generate_gives_alone(model, options):
    prompts = for_stock(PROMPTS, options)
    expected = [stock(model, prompt, **options) for prompt in prompts]
    assert [str(output) for output in model.generate(prompts, max_new_tokens=NEW_TOKENS, **options)] == expected
    views = model.see_each([prompt[:-1] or [prompt[0][:1]] for prompt in prompts])
    texts = [[prompt[-1] if len(prompt) > 1 else prompt[0][1:]] for prompt in prompts]
    assert views.continue_with(texts, max_new_tokens=NEW_TOKENS, **options) == [[answer] for answer in expected]


@every_option
def test_an_option_changes_answers(llama, options):
    first = next(iter(options))
    without = {name: value for name, value in options.items() if name != first}
    answers, others = (
        llama.generate([*PROMPTS, ["no image"]], max_new_tokens=NEW_TOKENS, **chosen) for chosen in (options, without)
    )
    assert answers != others


CHAT_OPTIONS = ("short beams", "repetition", "bigrams", "bad words", "shortest in all", "penalized beams")


@pytest.mark.parametrize("options", [OPTIONS[name] for name in CHAT_OPTIONS], ids=CHAT_OPTIONS)
def test_chats_give_what_stock_generate_gives_for_the_conversation(model, options):
    chat = model.chat()
    for text, images in (("What?", [IMAGE]), ("And the cat?", []), ("And this?", [OTHER])):
        before = model.chat(messages=chat.messages)
        answer = chat.send(text, images, max_new_tokens=NEW_TOKENS, **options)
        assert answer == stock(model, turns(model, chat.messages[:-1]), **options)
        assert "".join(before.stream(text, images, max_new_tokens=NEW_TOKENS, **options)).rstrip() == answer


@pytest.fixture(scope="module", params=ADAPTERS)
def adapted(request: Any, tiny_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return assembled(tiny_parts, tmp_path_factory.mktemp("adapted"), "llama", adapters=ADAPTERS[request.param])


@torch.no_grad()
def beams_by_hand(model: Any, prompt: list[Any], beams: int) -> str:
    """Return the answer of beam search without a KV cache: each step is a forward pass of all whole sequences."""
    embeds, batch = model.prepare([prompt])
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, NEW_TOKENS + 1):
        candidates = []
        for total, ids in running:
            scores = _next_scores(model, embeds, batch, ids)
            best = scores.topk(2 * beams)
            candidates += [(total + s, [*ids, t]) for s, t in zip(*map(torch.Tensor.tolist, best), strict=True)]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        ended = [
            (total / length, ids)
            for total, ids in candidates[:beams]
            if ids[-1] == model.lm.eos or length == NEW_TOKENS
        ]
        finished = sorted([*finished, *ended], reverse=True)[:beams]
        running = [(total, ids) for total, ids in candidates if ids[-1] != model.lm.eos][:beams]
        if len(finished) == beams and running[0][0] / length <= finished[-1][0]:
            break
    return str(model.lm.decode(model.lm.text.until_end(finished[0][1]))).strip()


def _next_scores(model: Any, embeds: Any, batch: Any, ids: list[int]) -> torch.Tensor:
    new = model.lm.embed(torch.tensor([ids], dtype=torch.long))
    whole, mask = append_embeddings(embeds, 0, batch.mask, new)
    return model.lm.logits(whole, mask)[0, -1].float().log_softmax(-1)


def test_beams_after_an_adapters_positions_are_those_of_the_whole_sequence(adapted):
    expected = [beams_by_hand(adapted, prompt, 3) for prompt in PROMPTS]
    assert [str(output) for output in adapted.generate(PROMPTS, max_new_tokens=NEW_TOKENS, num_beams=3)] == expected
    views = adapted.see_each([prompt[:-1] or ["no image"] for prompt in PROMPTS])
    texts = [[prompt[-1].removeprefix("no image")] for prompt in PROMPTS]
    assert views.continue_with(texts, max_new_tokens=NEW_TOKENS, num_beams=3) == [[text] for text in expected]
    with adapted.adapters_off():
        assert [str(o) for o in adapted.generate(PROMPTS, max_new_tokens=NEW_TOKENS, num_beams=3)] != expected


def test_rows_of_beams_end_each_by_their_own_settings(llama):
    decodings = [
        make_decoding(llama, {"num_beams": 3, **options})
        for options in ({"max_new_tokens": 3}, {"max_new_tokens": 20, "stop_strings": ["e"]}, {"max_new_tokens": 20})
    ]
    together = answer(llama, [PROMPTS[0]] * 3, decodings)
    alone = [answer(llama, [PROMPTS[0]], [decoding])[0] for decoding in decodings]
    assert together == alone
    assert len({str(output) for output in alone}) > 1


def test_options_of_a_models_own_generation_config_are_applied_and_kept(llama):
    config = llama.lm.model.generation_config
    config.repetition_penalty = 1.8
    try:
        answers = [str(output) for output in llama.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]
        assert answers == [stock(llama, prompt) for prompt in PROMPTS]  # stock applies them too
        assert answers == [stock(llama, prompt, repetition_penalty=1.8) for prompt in PROMPTS]
        assert llama.lm.model.generation_config is config
    finally:
        config.repetition_penalty = None


INVALID: dict[str, list[Any]] = {
    "temperature": [1e-40, -1, float("nan"), float("inf"), 1e39, "0.7", True],
    "top_p": [-0.1, 1.1, float("nan")],
    "top_k": [-1, 2.5],
    "min_p": [2],
    "typical_p": [0],
    "epsilon_cutoff": [1],
    "max_new_tokens": [0, -3, 2.5, "20", True, float("inf")],
    "min_new_tokens": [-1],
    "num_beams": [0, 1.5, "5"],
    "length_penalty": [float("inf"), 1000, "1"],
    "early_stopping": ["always"],
    "repetition_penalty": [0, -1, 1e-40, float("nan")],
    "encoder_repetition_penalty": [0],
    "no_repeat_ngram_size": [-1, 1.5],
    "seed": [1.5, 2**64, "7"],
    "do_sample": ["yes"],
    "stop_strings": ["", [".", ""], 5],
    "candidates": [0],
    "bad_words_ids": [[], [[]], [5], [[-1]], [[10**6]]],
    "sequence_bias": [[[[], 1.0]], [[[5], float("nan")]], {(5,): float("inf")}],
    "suppress_tokens": [5, [-1]],
    "max_time": [0],
}
UNSUPPORTED = {
    "num_return_sequences": 2, "max_length": 30, "guidance_scale": 2.0, "penalty_alpha": 0.6, "num_beam_groups": 2,
    "diversity_penalty": 1.0, "eos_token_id": 5, "prompt_lookup_num_tokens": 3, "output_scores": True,
    "use_cache": False, "top_h": 0.4, "dola_layers": "low", "watermarking_config": {"greenlist_ratio": 0.5},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in INVALID.items() for value in values], ids=repr
)
def test_a_value_that_cannot_be_right_is_refused_by_its_name(llama, name, value):
    with pytest.raises(MLLMError, match=name):
        llama.generate(PROMPTS, **{"max_new_tokens": 5, name: value})


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_option_of_transformers_that_is_not_supported_is_refused_by_its_name(llama, name):
    option = {name: UNSUPPORTED[name]}
    for ask in (llama.see(PROMPTS[0]).ask, llama.chat().send, lambda text, **o: llama.generate([[text]], **o)):
        with pytest.raises(MLLMError, match=f"{name}.*not supported"):
            ask("x", **option)


def test_contrastive_decoding_has_no_beams(llama):
    with pytest.raises(MLLMError, match=r"contrastive.*without beams"):
        llama.generate(PROMPTS, num_beams=2, contrastive={"alpha": 0.5})


def test_threads_that_generate_keep_the_models_own_defaults(tiny_parts, tmp_path):
    """Each call is complete without the model's generation config, which all threads share and none changes."""
    folder = LM_FAMILIES["llama"](tmp_path)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lm.generation_config.repetition_penalty = 1.7
    lm.save_pretrained(folder)
    model = mllm.assemble(tiny_parts[0], folder, LINEAR)
    prompts = [[f"number {number}"] for number in range(24)]
    alone = [str(model.generate([prompt], max_new_tokens=6)[0]) for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda prompt: str(model.generate([prompt], max_new_tokens=6)[0]), prompts * 3))
    assert together == alone * 3
    assert model.lm.model.generation_config.repetition_penalty == 1.7
