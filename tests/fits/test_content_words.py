"""SITTA's fit: a row for each content word, standardized sides, no intercept; and words that are no stop words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.linear_model import LinearRegression, Ridge

from mllm.answering.in_words import nearest_words
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.fits.connector import ConnectorFit
from mllm.lms.stop_words import STOP_WORDS, content_words, is_stop_word
from mllm.media.images import source_of
from mllm.testing import tiny_image

CAPTIONS = (
    ("a Red dog", "the dog runs on grass"),
    ("two cats are asleep.",),
    ("an old boat", "boats at sea, in fog"),
    ("it is what it is",),  # stop words only
    ("blue kite over sand",),
    ("she eats green soup",),
)


def items() -> list[Item]:
    return [Item(str(i), (source_of(tiny_image(i)),), captions) for i, captions in enumerate(CAPTIONS * 4)]


def published(model: Any, data: list[Item]) -> tuple[np.ndarray[Any, Any], ...]:
    """The rows as the authors build them: standardized features, repeated for each token, and standardized rows."""
    table = model.lm.model.get_input_embeddings().weight.detach().double().numpy()
    scaled = (table - table.mean(0)) / table.std(0)
    with torch.no_grad():
        x = model.features([item.images[0] for item in data]).double().mean(1).numpy()
    source = (x - x.mean(0)) / x.std(0)
    rows, targets = [], []
    for index, item in enumerate(data):
        words = " ".join(item.answers).replace(".", "").replace(",", "").split()
        kept = [word for word in words if word.lower() not in ENGLISH_STOP_WORDS | {"two"}]
        ids = {token for word in kept for token in model.lm.tokenizer(f" {word}", add_special_tokens=False).input_ids}
        ids = {token for token in ids if model.lm.tokenizer.decode([token]).strip()}
        targets += [scaled[token] for token in sorted(ids)]
        rows += [index] * len(ids)
    return source, source[rows], np.array(targets), table


@pytest.mark.parametrize("solver", ["least-squares", "ridge", "procrustes"])
@torch.no_grad()
def test_it_is_the_authors_regression(tiny_model: Any, solver: str) -> None:
    model = tiny_model(connector={"type": "linear"})
    data = [item for item in items() if "two" not in item.answers[0]]
    source, x, y, table = published(model, data)
    fit = ConnectorFit(solver=solver, targets="content-words", strength=0.5, standardize=True, chunk=5)
    fit(model, Material(data, model.features))
    seen = model.connector(model.features([item.images[0] for item in data])).double().mean(1).numpy()
    scaled = (seen - table.mean(0)) / table.std(0)
    if solver == "procrustes":  # fewer rows than dimensions have several best maps, which are all as good
        features = model.features([item.images[0] for item in data]).double().mean(1).numpy()
        weights = model.connector.project.weight.double().numpy().T * features.std(0)[:, None] / table.std(0)
        np.testing.assert_allclose(np.linalg.svd(weights)[1], np.ones(min(weights.shape)), atol=1e-3)  # orthogonal
        assert np.trace(weights.T @ x.T @ y) == pytest.approx(np.linalg.svd(x.T @ y)[1].sum(), rel=1e-4)
    elif solver == "ridge":
        weights = Ridge(alpha=0.5 * (x**2).mean() * len(x), fit_intercept=False).fit(x, y).coef_.T
    else:
        weights = LinearRegression(fit_intercept=False).fit(x, y).coef_.T
    np.testing.assert_allclose(scaled, source @ weights, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_the_nearest_words_are_those_of_the_standardized_sides(tiny_model: Any) -> None:
    model, image = tiny_model(), tiny_image()
    table = model.lm.model.get_input_embeddings().weight
    centre, spread = table.mean(0), table.std(0, correction=0)
    tokens = {token: text for token in range(len(table)) if (text := model.lm.decode([token]).strip()).isalpha()}
    visual = (model.connector(model.features([image]))[0].mean(0) - centre) / spread
    close = {token: float(torch.cosine_similarity(visual, (table[token] - centre) / spread, dim=0)) for token in tokens}
    best = sorted(tokens, key=lambda token: -close[token])[:4]
    assert nearest_words(model, [image], 4, standardize=True) == [[tokens[token] for token in best]]
    ((*without,),) = nearest_words(model, [image], 40, stop_words=False)
    assert {"a", "I", "s", "t"} & set(nearest_words(model, [image], 60)[0])  # the tiny vocabulary has letters
    assert not {"a", "I", "s", "t"} & set(without)
    options = {"top": 4, "standardize": True, "stop_words": False}
    assert model.generate([[image, "a"]], max_new_tokens=2, nearest_words=options)
    for wrong in ({"stop_words": 1}, {"standardize": "yes"}, {"top": True}):
        with pytest.raises(MLLMError, match="true or false for 'stop_words'"):
            model.generate([[image, "a"]], nearest_words=wrong)


def test_caption_words_without_stop_words_are_those_of_captions_without_them(tiny_model: Any) -> None:
    model, other = tiny_model(connector={"type": "linear"}), tiny_model(connector={"type": "linear"})
    said = {
        "Red",
        "dog",
        "runs",
        "grass",
        "two",
        "cats",
        "asleep",
        "old",
        "boat",
        "boats",
        "sea",
        "fog",
        "blue",
        "kite",
    }
    said |= {"sand", "eats", "green", "soup"}
    bare = [
        Item(
            item.id,
            item.images,
            tuple(
                " ".join(w for w in a.replace(".", "").replace(",", "").split() if w in said) or a for a in item.answers
            ),
        )
        for item in items()
    ]
    ConnectorFit(stop_words=False)(model, Material(items(), model.features))
    ConnectorFit()(other, Material(bare, other.features))
    torch.testing.assert_close(model.connector.project.weight, other.connector.project.weight)


def test_words_are_told_apart_as_in_another_list() -> None:
    assert content_words("The dog’s bone isn't on a T-shirt; two men, one in red.") == [
        "dog’s",
        "bone",
        "T-shirt",
        "two",
        "men",
        "red",
    ]
    assert is_stop_word(" It’s") and not is_stop_word("Dog")
    # sklearn's list holds a few nouns, verbs and numbers that name what an image shows
    shown = {"bill", "bottom", "call", "cry", "describe", "detail", "fill", "fire", "front", "interest", "mill", "side"}
    assert len(ENGLISH_STOP_WORDS & STOP_WORDS) > 190 and not shown & STOP_WORDS
    assert not {"dog", "man", "red", "three", "playing", "street"} & STOP_WORDS


def test_what_cannot_be_fitted_is_refused(tiny_model: Any) -> None:
    model = tiny_model(connector={"type": "linear"})
    only = Material([Item("0", (source_of(tiny_image()),), ("it is what it is",))], model.features)
    with pytest.raises(MLLMError, match="the captions have stop words only"):
        ConnectorFit(targets="content-words")(model, only)
    with pytest.raises(MLLMError, match="leaves stop words out of caption-words only"):
        ConnectorFit(targets="content-words", stop_words=False)(model, only)
    (problem,) = ConnectorFit(targets="words-in-order", standardize=True).problems(tiny_model(connector="linear"))[-1:]
    assert "leave out stages.fit.standardize" in problem
