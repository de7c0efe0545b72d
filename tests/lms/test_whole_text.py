"""Tokenizing: what stands before a text, control words in it, ids without an embedding, tokenizers of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mllm.errors import MLLMError
from mllm.lms.tokenizer import TextTokenizer
from mllm.prompts.batch import IGNORED, encode
from mllm.prompts.pieces import Control, Part, Target


def model(rows: int, eos: int | list[int] | None = None) -> transformers.LlamaForCausalLM:
    """Return a language model with so many embeddings, and with the ends of its ``generation_config``."""
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    made = transformers.LlamaForCausalLM(config)
    made.generation_config.eos_token_id = eos
    return made


CORPUS = ["What is it? It is a red dog.", "Question: Is it red? Answer: yes", "no"] * 50
SPECIAL = ["<unk>", "<s>", "</s>", "[gMASK]", "<sop>", "eng_Latn"]


class TinyLM(TextTokenizer):
    """A language model of which only the tokenizer is used."""

    @property
    def text(self) -> TextTokenizer:
        """Return the tokenizer."""
        return self


def trained(tokenizer: Tokenizer, trainer: type = trainers.BpeTrainer, **options: object) -> Tokenizer:
    """Return a tokenizer trained on the corpus."""
    tokenizer.train_from_iterator(
        CORPUS, trainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False, **options)
    )
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def prepending() -> Tokenizer:
    """Return a tokenizer of Llama 2's older files, which puts a space before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # while it is trained, so that no token is several words
    tokenizer = trained(tokenizer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def unigram() -> Tokenizer:
    """Return a tokenizer as T5 has it, whose model has the special tokens in its vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer, unk_token="<unk>")


def words() -> Tokenizer:
    """Return a tokenizer of whole words, which also would read a special token in a text as a word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return trained(tokenizer, trainers.WordLevelTrainer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "prepending": prepending,
    "unigram": unigram,
    "words": words,
}


def fast(kind: str = "byte-level", before: str = "", after: str = "") -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of `transformers` that puts special tokens before and after every text."""
    tokenizer = KINDS[kind]()
    if before or after:
        template = f"{before} $A {after}".strip()
        tokens = [(token, tokenizer.token_to_id(token)) for token in (before + " " + after).split()]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("<s>", "", id="llama"),
        pytest.param("[gMASK] <sop>", "", id="glm"),
        pytest.param("<s>", "</s>", id="bert"),
        pytest.param("eng_Latn", "</s>", id="language-code"),
        pytest.param("", "</s> eng_Latn", id="language-code-behind"),
        pytest.param("", "", id="gpt-2"),
    ],
)
def test_a_text_has_the_ids_of_the_tokenizer_without_what_it_appends(before, after):
    tokenizer = fast(before=before, after=after)
    lm = TinyLM(tokenizer)
    stock = tokenizer("What is it?").input_ids
    appended = [tokenizer.convert_tokens_to_ids(word) for word in after.split()]
    assert encode(["What is it?"], lm=lm, num_visual=1).ids == stock[: len(stock) - len(appended)]
    assert lm.end_of_text == appended


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_the_ids_with_which_it_continues_the_prompt(kind):
    tokenizer = fast(kind)
    encoded = encode(["Question: Is it red? Answer:", Target(" yes")], lm=TinyLM(tokenizer), num_visual=1)
    whole = tokenizer("Question: Is it red? Answer: yes", add_special_tokens=False).input_ids
    prompt = tokenizer("Question: Is it red? Answer:", add_special_tokens=False).input_ids
    assert encoded.ids == [*whole, tokenizer.eos_token_id]
    assert [label for label in encoded.labels if label != IGNORED] == [*whole[len(prompt) :], tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["</s>", "<think>"])
def test_a_control_word_in_a_text_is_text(kind, word):
    tokenizer = fast(kind)
    tokenizer.add_tokens(["<think>"])
    lm, text = TinyLM(tokenizer), f"It is {word} red"
    control = tokenizer.convert_tokens_to_ids(word)
    assert control in tokenizer(text).input_ids
    assert lm.tokenize(text, control=True) == tokenizer(text, add_special_tokens=False).input_ids
    assert control not in lm.tokenize(text)
    if kind == "byte-level":  # the other kinds have no token for some characters
        without = KINDS[kind]().to_str().replace('"</s>"', '"<0>"')  # a tokenizer that does not know the words
        assert lm.tokenize(text) == Tokenizer.from_str(without).encode(text, add_special_tokens=False).ids


def test_added_tokens_that_are_ordinary_text_stay():
    tokenizer = fast()
    tokenizer.add_tokens(["    ", "\t\t"])  # as of GPT-NeoX and Phi
    text = "It is    a red\t\tdog."
    assert TinyLM(tokenizer).tokenize(text) == tokenizer(text).input_ids
    assert tokenizer.convert_tokens_to_ids("    ") in tokenizer(text).input_ids


def test_control_words_next_to_texts_that_look_alike():
    tokenizer = fast()
    lm = TinyLM(tokenizer)
    lm.new_tokens = {"[RET]": 1000}
    tokens = lm.tokenize_parts(
        [Part("<s>It", "all"), Part(" is </s> [RET] <"), Part("s> red</s>[RET]", "all"), Part(None)]
    )
    ids = [token.id for token in tokens]
    assert (ids[0], ids[-3:]) == (tokenizer.bos_token_id, [tokenizer.eos_token_id, 1000, None])
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, 1000} & {*ids[1:-3]}
    assert tokenizer.decode([id_ for id_ in ids[1:-3] if id_ is not None]) == "It is </s> [RET] <s> red"


def test_a_tokenizer_in_python_gives_the_ids_of_the_whole():
    tokenizer = transformers.ByT5Tokenizer()
    lm = TinyLM(tokenizer)
    tokens = lm.tokenize_parts([Part("<pad>It is ", "all"), Part("</s> réd"), Part("</s>", "all"), Part(None)])
    stock = tokenizer("It is ", add_special_tokens=False).input_ids
    literal = tokenizer("</s> réd", add_special_tokens=False, split_special_tokens=True).input_ids
    expected = [(tokenizer.pad_token_id, 0), *((i, 0) for i in stock), *((i, 1) for i in literal)]
    expected += [(tokenizer.eos_token_id, 2), (None, 3)]
    assert [(token.id, token.first) for token in tokens] == expected


def test_padding_is_an_id_that_has_an_embedding():
    tokenizer = fast()
    assert TinyLM(tokenizer).pad == tokenizer.eos_token_id
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert TinyLM(tokenizer, model(rows)).pad == tokenizer.eos_token_id
    assert TinyLM(tokenizer, model(rows + 1)).pad == tokenizer.pad_token_id
    tokenizer.eos_token = tokenizer.pad_token = None
    assert TinyLM(tokenizer, model(rows)).pad in range(rows)


def test_a_token_without_an_embedding_is_refused_by_name():
    tokenizer = fast()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<sep>"], special_tokens=True)
    lm = TinyLM(tokenizer, model(rows))
    with pytest.raises(MLLMError, match="<sep>"):
        encode([Control("<sep>")], lm=lm, num_visual=1)


def test_what_ends_an_answer():
    tokenizer = fast()
    eos = tokenizer.eos_token_id
    lm = TinyLM(tokenizer, model(len(tokenizer), [eos, 7, len(tokenizer)]))
    assert lm.ends == [eos, 7]
    lm.turn_end = 9
    assert lm.ends == [eos, 7, 9]
    assert [lm.until_end(ids) for ids in ([1, 5, 9, 3, 7], [7], [1], [])] == [[1, 5], [], [1], []]
    tokenizer.eos_token = None
    assert TinyLM(tokenizer, model(len(tokenizer), 7)).eos == 7
    with pytest.raises(MLLMError, match="no end-of-sequence token"):
        _ = TinyLM(tokenizer).eos
