"""A memory of texts in closed form: numpy's ridge to one-hot vectors, and the words of the texts that score highest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mllm
from mllm.data.items import Item
from mllm.encoders.feature_store import open_store
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.fits.connector import ConnectorFit
from mllm.media.images import source_of
from mllm.registry import lookup
from mllm.testing import tiny_image

CAPTIONS = ["red", "a cat", "blue", "dog", "on", "no cats", "as", "left"]
TILES = {"kind": "anyres", "grids": [[2, 2]], "unpad": False}


@pytest.fixture
def items() -> list[Item]:
    images = [source_of(tiny_image(seed)) for seed in range(8)]
    return [Item(str(n), (image,), (CAPTIONS[n], "another caption")) for n, image in enumerate(images)]


def assembled(tiny_parts: tuple[str, str], tiles: dict[str, Any] | None = None, **options: Any) -> Any:
    encoder = {"model": tiny_parts[0], "select": "pooled", **({"tiles": tiles} if tiles else {})}
    return mllm.assemble(encoder, tiny_parts[1], {"type": "memory", "tokens": 4, "texts": 10, **options})


def fitted(model: Any, items: list[Item], strength: float = 1e-9) -> Any:
    features = open_store(model, "auto").whole
    ConnectorFit(targets="texts", strength=strength)(model, Material(items, features=features))
    return model


def shown(model: Any, images: list[Any]) -> list[str]:
    return ["".join(words) for words in model.words(images)]


def padded(text: str, tokens: int = 4) -> str:
    """The tiny tokenizer's tokens are letters: a text without its spaces, filled up with full stops."""
    return (text.replace(" ", "") + "." * tokens)[:tokens]


@torch.no_grad()
def test_scores_are_those_of_a_ridge_to_one_hot_vectors(tiny_parts, items):
    model = fitted(assembled(tiny_parts), items, strength=0.02)
    x = model.features([item.images[0] for item in items])[:, 0].double().numpy()
    y = np.eye(8)[[sorted(CAPTIONS).index(item.answers[0]) for item in items]]
    centered = x - x.mean(0)
    penalty = 0.02 * np.mean(np.var(x, axis=0)) * len(x)
    rows = np.concatenate([centered, np.sqrt(penalty) * np.eye(x.shape[1])])  # a ridge is least squares of more rows
    weights, *_ = np.linalg.lstsq(rows, np.concatenate([y - y.mean(0), np.zeros((x.shape[1], 8))]), rcond=None)
    scores = model.connector.keys(torch.tensor(x, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(scores[:, :8], centered @ weights + y.mean(0), atol=1e-3)
    np.testing.assert_allclose(scores[:, 8:], 0, atol=1e-6)  # places without a text


@torch.no_grad()
def test_it_says_the_words_of_what_it_was_fitted_on_exactly(tiny_parts, items):
    model = fitted(assembled(tiny_parts), items)
    images = [item.images[0] for item in items]
    assert shown(model, images) == [padded(caption) for caption in CAPTIONS]
    ids = torch.tensor(model.lm.tokenizer.convert_tokens_to_ids(list(padded("dog"))))
    assert torch.equal(model.see_images([images[3]])[0], model.lm.embed(ids))
    assert shown(model, images[2:3]) == shown(model, images)[2:3]


@torch.no_grad()
def test_where_no_score_is_above_the_threshold_it_says_nothing(tiny_parts, items):
    model = fitted(assembled(tiny_parts, threshold=5.0), items)
    assert shown(model, [items[0].images[0]]) == ["...."]


@torch.no_grad()
def test_tiles_are_looked_up_one_by_one_and_only_whole_images_are_fitted(tiny_parts, items):
    model = assembled(tiny_parts, tiles=TILES)
    encoded: list[int] = []
    hook = model.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    fitted(model, items)
    hook.remove()
    assert sum(encoded) == len(items)
    side = model.encoder.tiling.side
    parts = [item.images[0].open().resize((side, side)) for item in items[:4]]
    mosaic = Image.new("RGB", (2 * side, 2 * side))
    for number, part in enumerate(parts):
        mosaic.paste(part, (number % 2 * side, number // 2 * side))
    untiled = assembled(tiny_parts)
    untiled.connector.load_state_dict(model.connector.state_dict())
    alone = shown(untiled, [mosaic, *parts])
    assert shown(model, [mosaic]) == ["".join(alone)]
    assert len(model.words([mosaic])[0]) == model.connector.num_tokens * 5


@torch.no_grad()
def test_distinct_texts_stand_once_those_of_most_tiles_first(tiny_parts, items, answered):
    options: dict[str, Any] = {"tokens": [4, 3], "texts": [10, 3], "threshold": 0.5}
    model = fitted(assembled(tiny_parts, tiles=TILES, distinct=True, **options), answered)
    untiled = assembled(tiny_parts, **options)
    untiled.connector.load_state_dict(model.connector.state_dict())
    side = model.encoder.tiling.side
    mosaics = []
    for numbers in ([0, 1, 1, 2], [3, 3, 3, 3], [6, 5, 4, 5]):
        mosaic = Image.new("RGB", (2 * side, 2 * side))
        for place, number in enumerate(numbers):
            mosaic.paste(items[number].images[0].open().resize((side, side)), (place % 2 * side, place // 2 * side))
        tiles = [mosaic, *(mosaic.crop((x, y, x + side, y + side)) for y in (0, side) for x in (0, side))]
        words = shown(untiled, tiles)
        expected = [*once([text[:4] for text in words], "...."), *once([text[4:] for text in words], "...")]
        assert shown(model, [mosaic]) == ["".join(expected)]
        mosaics.append((mosaic, "".join(expected)))
    assert shown(model, [mosaic for mosaic, _ in mosaics]) == [text for _, text in mosaics]


def once(texts: list[str], neutral: str) -> list[str]:
    """Each text once, the most frequent first and of equally frequent ones the first, and then neutral ones."""
    frequent = [text for text, _ in Counter(texts).most_common() if text != neutral]
    return frequent + [neutral] * (len(texts) - len(frequent))


def test_a_gradient_moves_keys_and_values(tiny_parts, items):
    model = fitted(assembled(tiny_parts), items)
    features = model.features([items[0].images[0]])
    with torch.no_grad():
        expected = model.connector(features)
    output = model.connector(features)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    assert model.connector.keys.weight.grad.abs().sum() > 0
    assert model.connector.values[0].weight.grad.abs().sum() > 0


COLOURS = ["rot", "blau", "rot", "rot", "blau", "gelb", "gelb", "rot"]


@pytest.fixture
def answered(items: list[Item]) -> list[Item]:
    """The same images with captions and with answers to a question, in another order."""
    questions = [Item(f"{item.id}?", item.images, (COLOURS[n],), "Which?") for n, item in enumerate(items)]
    return [*items, *questions[::-1]]


@torch.no_grad()
def test_the_answers_to_a_question_are_a_memory_of_their_own(tiny_parts, items, answered):
    model = fitted(assembled(tiny_parts, tokens=[4, 3], texts=[10, 3]), answered)
    images = [item.images[0] for item in items]
    both = [padded(caption) + padded(colour, 3) for caption, colour in zip(CAPTIONS, COLOURS, strict=True)]
    assert shown(model, images) == both
    assert model.connector.num_tokens == 7
    assert shown(model, images[4:5]) == both[4:5]


@torch.no_grad()
def test_each_memory_has_the_keys_that_it_has_alone(tiny_parts, items, answered):
    together = fitted(assembled(tiny_parts, tokens=[4, 3], texts=[8, 3]), answered, strength=0.02).connector
    captions = fitted(assembled(tiny_parts, texts=8), items, strength=0.02).connector
    colours = fitted(assembled(tiny_parts, texts=3), answered[8:], strength=0.02).connector
    for keys, rows in ((captions.keys, slice(0, 8)), (colours.keys, slice(8, 11))):
        torch.testing.assert_close(together.keys.weight[rows], keys.weight)
        torch.testing.assert_close(together.keys.bias[rows], keys.bias)


def test_as_many_memories_as_questions_are_wanted(tiny_parts, answered):
    with pytest.raises(MLLMError, match=r"places for 10 texts, and the data has \[8,3\].*connector\.texts=\[8,3\]"):
        fitted(assembled(tiny_parts), answered)
    with pytest.raises(MLLMError, match="Give lists of the same length"):
        assembled(tiny_parts, texts=[10, 3])


def test_more_texts_than_places_are_refused(tiny_parts, items):
    with pytest.raises(MLLMError, match=r"places for 3 texts.*connector\.texts=8"):
        fitted(assembled(tiny_parts, texts=3), items)


@pytest.mark.parametrize(("connector", "targets"), [("linear", "texts"), ("memory", "caption-words")])
def test_a_memory_and_its_targets_belong_together(tiny_parts, items, connector, targets):
    model = mllm.assemble({"model": tiny_parts[0], "select": "pooled"}, tiny_parts[1], {"type": connector, "tokens": 4})
    with pytest.raises(MLLMError, match=r"connector\.type=memory and targets=texts"):
        ConnectorFit(targets=targets)(model, Material(items, features=model.features))


@torch.no_grad()
def test_what_it_remembers_is_saved(tiny_parts, items, tmp_path):
    model = fitted(assembled(tiny_parts), items)
    model.save(tmp_path / "model")
    assert shown(mllm.load(tmp_path / "model"), [items[1].images[0]]) == [padded("a cat")]


@torch.no_grad()
def test_with_a_shuffle_it_counts_where_something_is():
    sizes = {"vis_dim": 3, "lm_dim": 2, "num_patches": 4, "grid": (2, 2), "tokens": 1, "texts": 4}
    memory = lookup("connectors", "memory")(**sizes, shuffle=2, threshold=0.5)
    memory.remember([[torch.full((1, 2), float(n)) for n in range(4)]], torch.full((2,), 9.0))
    memory.keys.weight.copy_(torch.eye(4).repeat_interleave(3, dim=1))  # text n scores where patch n is bright
    memory.keys.bias.zero_()
    for n in range(4):
        features = torch.zeros(1, 4, 3)
        features[0, n] = 1.0
        assert memory(features).tolist() == [[[n, n]]]
    assert memory(torch.zeros(1, 4, 3)).tolist() == [[[9, 9]]]
    with pytest.raises(MLLMError, match=r"connector\.shuffle is 3"):
        lookup("connectors", "memory")(**sizes, shuffle=3)
