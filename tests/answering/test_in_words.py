"""Visual tokens replaced by their nearest words: which words, in which place, and which order's answer is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

import mllm
from mllm.answering.decode import answer
from mllm.answering.in_words import nearest_words
from mllm.errors import MLLMError, warn_renamed
from mllm.lms.vocabulary import lexicon
from mllm.prompts.pieces import images_of
from mllm.testing import tiny_image


@torch.no_grad()
def test_the_words_are_those_with_the_closest_embeddings(tiny_model: Any) -> None:
    model, image = tiny_model(), tiny_image()
    vocabulary = dict(lexicon(model.lm))
    table = {token: model.lm.embed(torch.tensor(token)) for token in vocabulary}
    centre = torch.stack(list(table.values())).mean(0)
    seen = model.connector(model.features([image]))[0].mean(0)
    close = {token: float(cosine_similarity(seen - centre, row - centre, dim=0)) for token, row in table.items()}
    best = sorted(close, key=lambda token: -close[token])[:5]
    assert nearest_words(model, [image], 5) == [[vocabulary[token] for token in best]]


def test_an_answer_is_the_one_to_the_words(tiny_model: Any) -> None:
    model, image = tiny_model(), tiny_image()
    (words,) = nearest_words(model, [image], 3)
    prompts = [["Seen:", image, " A picture of"], ["no picture"]]
    plain = model.generate([[f"Seen: {', '.join(words)}. A picture of"], ["no picture"]], max_new_tokens=6)
    assert model.generate(prompts, max_new_tokens=6, nearest_words={"top": 3}) == plain
    views = model.see_each([["Seen:", image]])
    assert views.continue_with([[" A picture of"]], max_new_tokens=6, nearest_words={"top": 3}) == [[str(plain[0])]]


def test_of_several_orders_the_scorer_keeps_the_closest(
    tiny_parts: Any, tiny_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mllm.assemble(*tiny_parts, scorer={"type": "dual-encoder", "model": tiny_clip})
    asked: list[Any] = []
    answers: list[Any] = []

    def listening(model: Any, rows: Any, settings: Any) -> Any:
        asked.extend(rows)
        answers.extend(answer(model, rows, settings))
        return answers

    monkeypatch.setattr("mllm.answering.in_words.answer", listening)
    (found,) = model.generate([[tiny_image(), "a"]], max_new_tokens=6, nearest_words={"top": 4, "orders": 5})
    assert len(asked) == 5 and not any(map(images_of, asked))
    assert len({tuple(row) for row in asked}) > 1
    assert len({tuple(sorted(row[0].strip(" .").split(", "))) for row in asked}) == 1  # the same words
    closeness = model.scorer.image_text([tiny_image()], [str(one) for one in answers])[0]
    assert str(found) == str(answers[int(closeness.argmax())])


def test_unknown_settings_are_refused(tiny_model: Any) -> None:
    with pytest.raises(MLLMError, match=r"decoding\.nearest_words is \{'most': 3\}"):
        tiny_model().generate([[tiny_image(), "a"]], nearest_words={"most": 3})


def test_former_names_of_options_and_methods_warn_and_do_the_same(tiny_model: Any) -> None:
    warn_renamed.cache_clear()
    model, prompts = tiny_model(), [["Seen:", tiny_image(), " A picture of"]]
    plain = model.generate(prompts, max_new_tokens=6, nearest_words={"top": 3})
    with pytest.warns(FutureWarning, match="'words' is now called 'nearest_words'"):
        assert model.generate(prompts, max_new_tokens=6, words={"top": 3}) == plain
    warn_renamed.cache_clear()
    with pytest.warns(FutureWarning, match="'words' is now called 'nearest_words'"):  # in a recipe or a saved model
        saved = tiny_model(decoding={"max_new_tokens": 6, "words": {"top": 3}})
        assert saved.generate(prompts) == plain
    view = model.see(prompts[0][:2])
    with pytest.warns(FutureWarning, match=r"View\.go_on\(\) is now called continue_with\(\)"):
        assert view.go_on(" so", max_new_tokens=4) == view.continue_with(" so", max_new_tokens=4)
    with pytest.raises(MLLMError, match="'nearest_words' is given twice"):
        model.generate(prompts, words={"top": 3}, nearest_words={"top": 3})
