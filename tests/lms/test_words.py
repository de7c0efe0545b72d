"""The words of a language model: which tokens they are, and visual tokens as their weighted mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mllm
from mllm.errors import MLLMError
from mllm.lms import words as words_module
from mllm.lms.words import ordered_words, token_ids, whole_words
from mllm.objectives.word_alignment import WordAlignment
from mllm.prompts.pieces import Target
from mllm.readout.words import readable
from mllm.slots import Inputs
from mllm.testing import tiny_image

PIECES = ["Ġ", "Ġcat", "Ġdog", "cat", "s", "Ġs", "Ġ.", ".", "Ġhipp", "o", "Ġo", "3", "Ġ,"]


@pytest.fixture
def word_lm(tmp_path: Path) -> str:
    """A tiny language model with a byte-level BPE of a few words."""
    letters = sorted(set("".join(PIECES)))
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*letters, *PIECES, "<end>"]))}
    merges: list[tuple[str, str]] = []
    for piece in PIECES:  # each built from its left
        for end in range(2, len(piece) + 1):
            pair = (piece[: end - 1], piece[end - 1])
            vocabulary.setdefault("".join(pair), len(vocabulary))
            merges += [pair] if pair not in merges else []
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    fast.save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


def ids_of(model: Any, letters: str) -> list[int]:
    """The ids of letters, each of which is a token of the tiny language model."""
    return [model.lm.tokenizer.convert_tokens_to_ids(letter) for letter in letters]


def letters_of(model: Any) -> str:
    """The letters in a vocabulary of the tiny language model."""
    return "".join(sorted(model.lm.tokenizer.convert_ids_to_tokens(model.connector.vocabulary.ids.tolist())))


def bound(tiny_parts: tuple[str, str], lm: str | None = None, connector: str = "linear", **vocabulary: Any) -> Any:
    return mllm.assemble(tiny_parts[0], lm or tiny_parts[1], {"type": connector, "vocabulary": vocabulary or True})


def test_whole_words_follow_a_space_as_one_token(tiny_parts, word_lm):
    lm = bound(tiny_parts, word_lm).lm
    texts = {lm.tokenizer.convert_ids_to_tokens(token) for token in whole_words(lm)}
    assert {"Ġcat", "Ġdog", "3", "Ġhipp"} <= texts  # whether a beginning is a word too, no tokenizer knows
    assert not texts & {"cat", "s", "o", "Ġ.", ".", "Ġ,", "Ġ", "<end>"}


def test_the_tokens_of_a_caption_follow_other_words(tiny_parts, word_lm):
    lm = bound(tiny_parts, word_lm).lm
    as_tokens = lm.tokenizer.convert_ids_to_tokens
    assert as_tokens(token_ids(lm, "cats ")) == ["Ġcat", "s"]
    assert as_tokens(ordered_words(lm, "cats", 4)) == ["Ġcat", "s", "Ġ.", "Ġ."]
    assert as_tokens(ordered_words(lm, "dog cats", 2)) == ["Ġdog", "Ġcat"]


@torch.no_grad()
def test_the_output_is_the_expected_word_embedding(tiny_parts):
    model = bound(tiny_parts, words=["a", "b", "c"], temperature=0.1)
    plain = mllm.assemble(tiny_parts[0], tiny_parts[1], "linear")
    plain.connector.load_state_dict(model.connector.state_dict(), strict=False)
    features = model.features([tiny_image(1), tiny_image(2)])
    tokens = plain.connector(features)
    assert letters_of(model) == ".abc"
    table = plain.lm.model.get_input_embeddings().weight[ids_of(model, ".abc")]
    weights = torch.stack([cosine_similarity(tokens, word, dim=-1) / 0.1 for word in table], -1).softmax(-1)
    expected = sum(weights[..., index, None] * word for index, word in enumerate(table))
    torch.testing.assert_close(model.connector(features), expected)
    torch.testing.assert_close(model.connector.forward(features), tokens)


@torch.no_grad()
def test_few_logits_exist_at_once_and_change_nothing(tiny_parts, monkeypatch):
    model = bound(tiny_parts)
    tokens, targets = torch.randn(3, 4, 32), torch.full((12,), ids_of(model, "a")[0])
    vocabulary = model.connector.vocabulary
    whole = vocabulary(tokens), vocabulary.losses(tokens.flatten(0, 1), targets), vocabulary.nearest(tokens)
    monkeypatch.setattr(words_module, "MAX_LOGITS", 5 * len(vocabulary.ids))
    parts = vocabulary(tokens), vocabulary.losses(tokens.flatten(0, 1), targets), vocabulary.nearest(tokens)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_chunks_have_the_gradient_of_the_whole(tiny_parts, monkeypatch):
    model = bound(tiny_parts)
    vocabulary, targets = model.connector.vocabulary, torch.tensor(ids_of(model, "abcdefghijkl"))
    gradients = []
    for limit in (10**6, 300):
        monkeypatch.setattr(words_module, "MAX_LOGITS", limit)
        tokens = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = vocabulary.losses(tokens, targets).sum() + vocabulary(tokens).square().sum()
        gradients.append(torch.autograd.grad(loss, [tokens, vocabulary.log_scale]))
    torch.testing.assert_close(*gradients)


def test_drawn_words_estimate_the_sum_over_all(tiny_parts):
    """The mean of the estimated denominators is the denominator over all words."""
    vocabulary = bound(tiny_parts, words="all", temperature=0.5).connector.vocabulary
    tokens, targets = torch.randn(2, 32), torch.tensor([100, 101])
    with torch.no_grad():
        table = vocabulary.lm.model.get_input_embeddings().weight[vocabulary.ids]
        logits = cosine_similarity(tokens[:, None], table[None], dim=-1) / 0.5
        right = logits[range(2), [int((vocabulary.ids == target).nonzero()) for target in targets]]
        torch.manual_seed(0)
        drawn = torch.stack([vocabulary.losses(tokens, targets, negatives=40) for _ in range(400)])
        sums = (drawn + right).exp()  # of the denominators
    torch.testing.assert_close(sums.mean(0), logits.exp().sum(1), rtol=0.01, atol=0)
    assert (sums.std(0) > 0).all()
    more = vocabulary.losses(tokens, targets, negatives=10_000)  # than there are: all
    position = torch.searchsorted(vocabulary.ids, targets)
    torch.testing.assert_close(more, cross_entropy(logits, position, reduction="none"))


def test_a_list_of_words_stays_as_it_is_and_other_sources_grow(tiny_parts):
    for words, grows in ((["a", "b"], False), ("data", True), ("language", True)):
        model = bound(tiny_parts, words=words)
        model.connector.vocabulary.include_captions(["q!"])
        assert ("!" in letters_of(model)) == grows


def test_a_token_without_an_embedding_is_no_word(tiny_parts, tmp_path):
    lm = bound(tiny_parts).lm
    lm.tokenizer.add_tokens(["zebra"])
    lm.model.save_pretrained(tmp_path / "lm")
    lm.tokenizer.save_pretrained(tmp_path / "lm")
    model = bound(tiny_parts, str(tmp_path / "lm"), words="all")
    model.connector.vocabulary.include_captions(["a zebra"])
    assert model.lm.tokenizer("zebra", add_special_tokens=False).input_ids == [258]
    assert 258 not in token_ids(model.lm, "zebra") and int(model.connector.vocabulary.ids.max()) < 258
    inputs = Inputs(model, [[tiny_image(), Target(" a zebra")]], model.features([tiny_image()]), None)
    assert WordAlignment()(inputs).isfinite()


def test_without_words_it_says_what_to_do(tiny_parts):
    with pytest.raises(MLLMError, match="word-alignment"):
        bound(tiny_parts, words="data").generate([[tiny_image(), "A"]])


def test_words_and_temperature_are_saved(tiny_parts, tmp_path):
    model = bound(tiny_parts, words="data")
    model.connector.vocabulary.include_captions(["cats", "dogs"])
    with torch.no_grad():
        model.connector.vocabulary.log_scale.fill_(2.5)
    loaded = mllm.load(model.save(tmp_path / "saved"))
    assert letters_of(loaded) == "".join(sorted(set(".catsdogs")))
    assert loaded.connector.vocabulary.log_scale.item() == 2.5
    prompt = [[tiny_image(), "A picture of"]]
    assert str(loaded.generate(prompt)[0]) == str(model.generate(prompt)[0])
    assert loaded.words([tiny_image()]) == model.words([tiny_image()])


def test_a_copy_is_independent(tiny_parts):
    model = bound(tiny_parts, words=["a", "b"])
    other = copy.deepcopy(model)
    assert other.connector.vocabulary.lm is other.lm
    assert list(other.trained_state()) == list(model.trained_state())


def test_the_tokens_may_stay_as_they_are(tiny_parts):
    model, features = bound(tiny_parts, output="tokens"), torch.randn(2, 16, 24)
    torch.testing.assert_close(model.connector(features), model.connector.forward(features))


@torch.no_grad()
def test_mixed_precision_leaves_the_comparison_in_float32(tiny_parts):
    model = bound(tiny_parts)
    vocabulary, tokens, targets = model.connector.vocabulary, torch.randn(4, 32), torch.tensor(ids_of(model, "abcd"))
    expected = vocabulary(tokens), vocabulary.losses(tokens, targets), vocabulary.logits(tokens, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = vocabulary(tokens), vocabulary.losses(tokens, targets), vocabulary.logits(tokens, targets)
    for one, other in zip(expected, mixed, strict=True):
        assert torch.equal(one, other)


def test_a_batch_sees_what_its_images_show_alone(tiny_parts):
    model, images = bound(tiny_parts, connector="mapper"), [tiny_image(seed) for seed in range(3)]
    assert model.words(images) == [model.words([image])[0] for image in images]


@torch.no_grad()
def test_the_nearest_word_is_that_of_the_highest_cosine(tiny_parts):
    model, image = bound(tiny_parts, words=["a", "b", "c", "d"]), tiny_image(3)
    tokens = model.connector.forward(model.features([image]))[0]
    table = model.lm.model.get_input_embeddings().weight
    words = dict(zip(".abcd", table[ids_of(model, ".abcd")], strict=True))
    best = [max(words, key=lambda word: float(cosine_similarity(token, words[word], 0))) for token in tokens]
    assert model.words([image]) == [best]


def test_words_are_read_without_the_neutral_and_repetitions():
    assert readable([" a", " red", " red", " hipp", "o", " .", "."]) == "a red hippo"


def test_it_needs_a_language_model_that_generates_text(tiny_parts):
    with pytest.raises(MLLMError, match=r"connector\.vocabulary needs a language model"):
        mllm.assemble(tiny_parts[0], None, {"type": "mapper", "vocabulary": True})  # type: ignore[arg-type]


def test_a_specification_without_it_is_written_as_before(tiny_parts):
    assert "vocabulary" not in mllm.assemble(tiny_parts[0], tiny_parts[1], "linear").spec.model_dump_json()
    assert bound(tiny_parts).spec.connector.vocabulary.words == "language"
    with pytest.raises(MLLMError, match="temperature"):
        bound(tiny_parts, temperature=0.0)
