"""Tokenizers of SentencePiece, as T5's and Gemma's are: trained here, tiny."""

from __future__ import annotations

from typing import Any

import pytest
import sentencepiece
import transformers

from mllm.lms.language_model import LanguageModel
from mllm.lms.words import Vocabulary, token_ids, whole_words
from mllm.testing import LM_FAMILIES

TEXTS = ["A picture of a cat.", "Two dogs, one of them brown!", " so it is", "Wo ist die Katze?"]
CORPUS = [text.strip() for text in TEXTS] * 20 + ["The quick brown fox jumps over the lazy dog"] * 20


@pytest.fixture(params=["T5Tokenizer", "GemmaTokenizer"])
def lm(request, tmp_path):
    """A language model whose tokenizer was trained by SentencePiece."""
    kind = "t5" if request.param == "T5Tokenizer" else "gemma"
    folder = tmp_path / "lm"
    LM_FAMILIES[kind](folder)
    for file in folder.glob("*token*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=110,
        model_type="unigram" if kind == "t5" else "bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2 if kind == "gemma" else -1,
        unk_id=3,
        eos_piece="</s>" if kind == "t5" else "<eos>",
        bos_piece="<bos>",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    cls: Any = getattr(transformers, request.param)
    cls.from_pretrained(_folder(tmp_path, kind)).save_pretrained(folder)
    return LanguageModel(model=str(folder))


def _folder(tmp_path, kind):
    place = tmp_path / "tokenizer"
    place.mkdir()
    name = "spiece.model" if kind == "t5" else "tokenizer.model"
    (tmp_path / "spiece.model").rename(place / name)
    return str(place)


def test_texts_come_back(lm):
    for text in TEXTS:
        ids = lm.tokenize(text)
        assert len(ids) > 1
        assert lm.decode(ids).strip() == text.strip()
    assert lm.eos == 1
    assert lm.pad == 0


def test_whole_words_and_the_words_of_a_caption(lm):
    words = whole_words(lm)
    for word in {word.strip(".,!?") for text in CORPUS for word in text.split()}:
        pieces = [piece for piece in lm.tokenizer.tokenize(f" {word}") if piece != "\u2581"]
        if len(pieces) == 1:
            assert lm.tokenizer.convert_tokens_to_ids(pieces[0]) in words
    assert words and all(lm.decode([token]).strip().isalnum() for token in words)
    vocabulary = Vocabulary(lm)
    texts = list(map(vocabulary.text, token_ids(lm, "A picture of a brown cat")))
    assert "".join(texts).replace(" ", "") == "Apictureofabrowncat" and all(text.strip() for text in texts)
    the = lm.tokenizer.convert_tokens_to_ids("\u2581the")  # a token of its own
    assert (vocabulary.text(the), vocabulary.text(vocabulary.neutral).strip()) == (" the", ".")


def test_new_tokens_are_single_and_leave_the_others_alone(lm):
    before = [lm.tokenize(text) for text in TEXTS]
    assert lm.tokenizer.add_tokens(["[IMG1]", "[IMG2]"], special_tokens=True) == 2
    first, second = lm.tokenizer.convert_tokens_to_ids(["[IMG1]", "[IMG2]"])
    assert second == first + 1 == len(lm.tokenizer) - 1
    assert [lm.tokenize(text) for text in TEXTS] == before
    ids = lm.tokenize("A cat.[IMG1][IMG2]", control=True)
    assert ids[-2:] == [first, second]
    assert lm.decode(ids) == "A cat."
