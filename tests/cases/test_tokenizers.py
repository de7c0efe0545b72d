"""Tokenizers as people bring them: a pad token without an embedding, and SentencePiece, which puts a space first."""

from __future__ import annotations

from typing import Any

import pytest
import sentencepiece
import torch
import transformers

from mllm.errors import MLLMError
from mllm.prompts.pieces import Target
from mllm.testing import tiny_image

IMAGE = tiny_image(1)

# A [PAD] token that the embeddings have no row for (LLaVA, Llama 2).


@pytest.fixture(scope="module")
def padded_folder(lm_folder):
    """A Llama without a pad token whose tokenizer was given one, and whose embeddings were not resized."""
    return lm_folder("llama", lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}))


@pytest.fixture(scope="module")
def padded(padded_folder, assemble):
    return assemble(padded_folder)


def test_a_padded_batch_is_answered_as_without_the_pad_token(padded, model_of):
    prompts = [[IMAGE, "a long prompt"], [IMAGE, "x"]]
    expected = list(map(str, model_of("llama").generate(prompts, max_new_tokens=4)))
    assert list(map(str, padded.generate(prompts, max_new_tokens=4))) == expected


def test_one_image_is_answered_as_without_the_pad_token(padded, model_of):
    expected = str(model_of("llama").generate([[IMAGE, "x"]], max_new_tokens=4)[0])
    assert str(padded.generate([[IMAGE, "x"]], max_new_tokens=4)[0]) == expected


def test_a_chat_with_a_pad_token_outside_the_embeddings(padded, model_of):
    expected = model_of("llama").chat().send("x", [IMAGE], max_new_tokens=3)
    assert padded.chat().send("x", [IMAGE], max_new_tokens=3) == expected


def test_a_new_token_does_not_take_the_id_of_the_pad_token(padded_folder, assemble):
    with pytest.raises(MLLMError, match=r"\[PAD\]"):
        assemble(padded_folder, tokens=["[RET]"])


def test_a_padding_word_in_a_users_text_is_text(padded):
    text = "What is [PAD]?"
    assert padded.lm.decode(padded.encode([text]).ids) == text


# SentencePiece as Llama has it, with a space before every text, and as Gemma has it, without.

CORPUS = [
    "A picture of a cat.",
    "Two dogs, one of them brown!",
    "Question: What colour is it? Answer: red",
    "Question: Is it a dog? Answer: yes",
    "Question: Is it a cat? Answer: no",
    "The answer is no, yes, red, blue",
    "[INST] What is it? [/INST] It is a red dog",
] * 30
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
QUESTION = "Question: Is it a dog? Answer:"
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma": (
        transformers.GemmaTokenizer,
        {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>"},
    ),
    "llama": (
        transformers.LlamaTokenizer,
        {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2, "bos_piece": "<s>", "eos_piece": "</s>"},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def sentencepiece_folder(request, tmp_path_factory):
    """A language model whose tokenizer was trained by SentencePiece."""
    tokenizer_class, ids = KINDS[request.param]
    source, folder = tmp_path_factory.mktemp("sentencepiece"), tmp_path_factory.mktemp(request.param)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(source / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        add_dummy_prefix=request.param == "llama",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        character_coverage=1.0,
        **ids,
    )
    tokenizer: Any = tokenizer_class.from_pretrained(str(source))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def spaced(sentencepiece_folder, assemble):
    return assemble(sentencepiece_folder)


def ids_of(model: Any, text: str) -> list[int]:
    """Return the ids that the tokenizer by itself gives to a text."""
    return list(model.lm.tokenizer(text, add_special_tokens=False).input_ids)


def continuation(model: Any, answer: str) -> list[int]:
    """Return the ids of an answer where it follows the question in one text."""
    return ids_of(model, f"{QUESTION} {answer}")[len(ids_of(model, QUESTION)) :]


def test_a_prompt_and_its_answer_have_the_ids_of_the_whole_text(spaced, encoded):
    ids = encoded(spaced, [QUESTION, Target(" yes")]).ids
    assert ids == [*spaced.lm.tokenizer(f"{QUESTION} yes").input_ids, spaced.lm.eos]


def test_the_target_has_the_ids_of_the_answer_in_the_text(spaced, encoded):
    labels = [label for label in encoded(spaced, [QUESTION, Target(" yes")]).labels if label != -100]
    assert labels == [*continuation(spaced, "yes"), spaced.lm.eos]


def test_a_score_is_the_log_likelihood_of_the_ids_of_the_text(spaced):
    @torch.no_grad()
    def log_likelihood(answer: str) -> float:
        ids = [*continuation(spaced, answer), spaced.lm.eos]
        prompt, _ = spaced.prepare([[IMAGE, QUESTION]])
        embeds = torch.cat([prompt, spaced.lm.embed(torch.tensor([ids]))], 1)
        logits = spaced.lm.model(inputs_embeds=embeds).logits[0, prompt.shape[1] - 1 : -1]
        return float(logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum())

    expected = [log_likelihood("yes"), log_likelihood("no")]
    assert spaced.score([IMAGE, QUESTION], ["yes", "no"]) == pytest.approx(expected, abs=1e-3)


def test_a_chat_without_images_has_the_ids_of_apply_chat_template(sentencepiece_folder, assemble, prompt_of):
    model = assemble(sentencepiece_folder, prompt={"chat": "own"})
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "a red dog"},
        {"role": "user", "content": "Is it red?"},
    ]
    stock = model.lm.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert model.encode(prompt_of(model, messages)).ids == stock
