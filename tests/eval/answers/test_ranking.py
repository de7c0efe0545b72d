"""Rankings by a retrieval head: queries are captions, images and interleaved prompts; their baselines."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from mllm.config.base import PartSpec
from mllm.data.items import Item
from mllm.encoders.dual_encoder import DualEncoder
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.registry import lookup
from mllm.scorers.retrieval import RetrievalScorer
from mllm.testing import tiny_image

PARTS = {"heads": [{"type": "retrieval", "dim": 6}], "tokens": ["[RET]"]}
IMAGES = tuple(source_of(tiny_image(number)) for number in range(5))
TEXTS = ("a cat", "two dogs and more", "a red thing", "x", "no image at all")


def ranking(items, scorer):
    return import_module("mllm.eval.answers.ranking").Ranking(items, scorer)


def rank():
    return lookup("answers", "rank")()


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(**PARTS)


def test_a_model_with_the_head_is_its_own_scorer(model):
    assert isinstance(model.scorer, RetrievalScorer)
    head, token = model.heads["retrieval"], model.lm.new_tokens["[RET]"]
    vectors = model.scorer.embed_texts(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([[*model.lm.tokenize(f"A picture of {text}"), token]])
        state = model.lm.hidden(model.lm.embed(ids), torch.ones_like(ids))[:, -1]
        torch.testing.assert_close(head.of_states(state)[0], vector, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.scorer.embed_images(IMAGES), head.of_features(model.features(IMAGES)))
    cosines = model.scorer.image_text(IMAGES, TEXTS)
    assert cosines.shape == (5, 5) and cosines.abs().max() <= 1 + 1e-5


def test_a_suites_scorer_can_be_a_run(model, tmp_path):
    spec = PartSpec.model_validate({"type": "retrieval", "model": str(model.save(tmp_path / "run"))})
    scorer = import_module("mllm.eval.scoring").Helpers(spec).scorer
    torch.testing.assert_close(scorer.embed_texts(TEXTS), model.scorer.embed_texts(TEXTS))


def test_captions_images_and_prompts_are_queries(model):
    items = [
        *(Item(f"i{n}", IMAGES, (str(n),), question=text, kind="to image") for n, text in enumerate(TEXTS)),
        *(Item(f"t{n}", (one,), (str(n),), kind="to text", choices=TEXTS) for n, one in enumerate(IMAGES)),
        Item("p0", IMAGES, ("2",), document=("a cat.", IMAGES[3], "and then"), kind="story"),
        Item("p1", IMAGES, ("0",), document=("words alone",), kind="story"),
    ]
    cosines, finder = model.scorer.image_text(IMAGES, TEXTS), model.scorer

    def order(line):
        return " ".join(map(str, line.argsort(descending=True).tolist()))

    rows = ranking(items, finder).rows("model")
    assert rows[:5] == [order(line) for line in cosines.T] and rows[5:10] == [order(line) for line in cosines]
    prompts = [["a cat.", IMAGES[3], "and then"], ["words alone"]]
    similarity = finder.embed_prompts(prompts) @ finder.embed_images(IMAGES).T
    similarity[0, 3] = -2  # an image of the prompt is no candidate
    assert rows[10:] == [order(similarity[0])[:-2], order(similarity[1])]

    (blind,) = finder.embed_prompts([["a cat.", "and then"]]) @ finder.embed_images(IMAGES).T
    blind[3] = -2
    assert ranking(items, finder).rows("blind") == [*rows[:10], order(blind)[:-2], rows[11]]
    partners = import_module("mllm.eval.answers.ranking").partners(items)
    assert all(items[a].kind == items[b].kind and items[a].answers != items[b].answers for a, b in enumerate(partners))
    shuffled = ranking(items, finder).rows("shuffled")
    assert shuffled[:10] == [rows[index] for index in partners[:10]]
    assert rank().baselines(items) == {"shuffled": True, "blind": True}
    assert rank().baselines(items[:10]) == {"shuffled": True}
    with pytest.raises(MLLMError, match="nothing to rank"):
        ranking([Item("x", IMAGES, ("0",))], finder)


def test_a_dual_encoder_reads_prompts_of_text_only(tiny_clip):
    scorer = DualEncoder(model=tiny_clip)
    words = [
        Item("0", IMAGES, ("0",), document=("a cat ", "and a dog")),
        Item("1", IMAGES, ("0",), question="a cat"),
    ]
    same = [Item("0", IMAGES, ("0",), question="a cat and a dog"), words[1]]
    assert ranking(words, scorer).rows("model") == ranking(same, scorer).rows("model")
    with pytest.raises(MLLMError, match="take one of type retrieval"):
        ranking([Item("0", IMAGES, ("0",), document=(IMAGES[0],))], scorer).rows("model")


def test_the_report_shows_the_query_and_the_first_of_the_ranking():
    shown = rank().shown_images
    item = Item("0", IMAGES, ("2",), document=("a cat.", IMAGES[3], "and then"))
    assert shown(item, "4 2 0 1") == tuple(IMAGES[index] for index in (3, 4, 2, 0, 1))
    assert shown(Item("1", IMAGES[:1], ("0",), choices=TEXTS), "4 2") == IMAGES[:1]


def test_the_median_rank_counts_from_one():
    score = lookup("metrics", "retrieval/median-rank")(["3 1 2", "0 1 2", "2 1"], [["1"], ["0"], ["0"]])
    assert (score.value, score.per_item, score.better) == (2, [2, 1, 3], "lower")
    assert score.of([0, 2]) == 2.5
