"""Objectives on pairs: the papers' formulas, transformers' BLIP-2 with the same weights, and what gets a gradient."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax
from transformers import Blip2Config, Blip2ForImageTextRetrieval

import mllm
from mllm.config.data import DataSpec
from mllm.data.items import Item
from mllm.data.sources import read
from mllm.errors import MLLMError
from mllm.media.images import Black, source_of
from mllm.objectives.contrastive import PatchContrastive, captions_of
from mllm.objectives.qformer import ImageTextContrast, ImageTextGeneration, ImageTextMatching, sample_negatives
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target
from mllm.scorers.matching import MatchingScorer
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.testing.lms import spread, tiny_tokenizer

TEXTS = ["a red house", "two", "a dog"]
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def rows_of(texts: list[str]) -> list[list[Any]]:
    return [[tiny_image(seed), "A picture of", Target(f" {text}")] for seed, text in enumerate(texts)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("words")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def reader(words: str, tiny_parts: tuple[str, str]) -> Any:
    """A model without a language model, whose Q-Former reads text."""
    qformer = {"type": "qformer", "dim": 16, "layers": 2, "heads": 2, "tokens": 5, "words": words, "norm": False}
    heads = [{"type": "contrast", "inside": 16, "dim": 6}, {"type": "match", "inside": 16}]
    model = mllm.assemble(tiny_parts[0], None, qformer, heads=heads)  # type: ignore[arg-type]
    spread(model.connector, 0.3)
    return model


@pytest.fixture
def inputs(reader: Any) -> Inputs:
    rows = rows_of(TEXTS)
    return Inputs(reader, rows, reader.features([row[0] for row in rows]), None)


def blip2(model: Any) -> Any:
    """Return transformers' class for retrieval with a model's weights; it takes image features instead of pixels."""
    config = Blip2Config(
        vision_config={**SHAPE, "hidden_size": 24, "image_size": 32, "patch_size": 8},
        qformer_config={
            **SHAPE,
            "vocab_size": model.connector.words.start + 1,
            "use_qformer_text_input": True,
            "pad_token_id": model.connector.words.tokenizer.pad_token_id,
        },
        num_query_tokens=5,
        image_text_hidden_size=6,
    )
    reference = Blip2ForImageTextRetrieval(config).eval()
    reference.qformer.load_state_dict(model.connector.qformer.state_dict())
    reference.embeddings.load_state_dict(model.connector.words.table.state_dict())
    reference.query_tokens.data.copy_(model.connector.queries.data)
    reference.vision_projection.load_state_dict(model.heads["contrast"].vision.state_dict())
    reference.text_projection.load_state_dict(model.heads["contrast"].text.state_dict())
    reference.itm_head.load_state_dict(model.heads["match"].judge.state_dict())
    return reference


def by_features(reference: Any, features: Any, *texts: Any, match: bool) -> torch.Tensor:
    """Return transformers' scores of images and texts, from features."""

    class Precomputed(torch.nn.Module):
        def forward(self, **_: Any) -> Any:
            return (features,)

    reference.vision_model = Precomputed()
    pixels = torch.zeros(len(features), 3, 32, 32)
    output = reference(pixels, *texts, use_image_text_matching_head=match, return_dict=False)
    return output[0]


@torch.no_grad()
def test_contrast_is_blip2s_infonce(reader: Any, inputs: Inputs) -> None:
    ids, mask = reader.connector.words.tokenize(TEXTS)
    theirs = by_features(blip2(reader), inputs.features, ids, mask, match=False) / 0.07  # (I, N)
    diagonal = torch.arange(3)
    expected = sum(cross_entropy(s, diagonal, reduction="sum", label_smoothing=0.1) for s in (theirs, theirs.T)) / 2
    torch.testing.assert_close(ImageTextContrast()(inputs), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_matching_is_blip2s_head_on_true_and_sampled_pairs(reader: Any, inputs: Inputs, monkeypatch: Any) -> None:
    others = iter([torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])])
    monkeypatch.setattr("mllm.objectives.qformer.sample_negatives", lambda logits, start: next(others))
    loss = ImageTextMatching()(inputs)
    reference, (ids, mask) = blip2(reader), reader.connector.words.tokenize(TEXTS)
    assert inputs.features is not None

    def sum_of(images: list[int], texts: list[int], label: int) -> torch.Tensor:
        logits = by_features(reference, inputs.features[images], ids[texts], mask[texts], match=True)  # type: ignore
        return cross_entropy(logits, torch.full((3,), label), reduction="sum")

    expected = sum_of([0, 1, 2], [0, 1, 2], 1) + sum_of([0, 1, 2], [1, 2, 0], 0) + sum_of([2, 0, 1], [0, 1, 2], 0)
    torch.testing.assert_close(loss, expected / 3, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_contrast_ranks_images_and_texts_and_matching_reranks_the_first(
    reader: Any, inputs: Inputs, tiny_parts: tuple[str, str]
) -> None:
    scorer, reference = reader.scorer, blip2(reader)
    images, (ids, mask) = [row[0] for row in inputs.rows], reader.connector.words.tokenize(TEXTS)
    assert isinstance(scorer, MatchingScorer) and scorer.rerank == 128
    alike = by_features(reference, inputs.features, ids, mask, match=False)
    torch.testing.assert_close(scorer.image_text(images, TEXTS), alike, atol=1e-4, rtol=1e-4)
    odds = by_features(reference, inputs.features, ids, mask, match=True).diff(dim=1)[:, 0]
    torch.testing.assert_close(scorer.matches(images, TEXTS), odds, atol=1e-4, rtol=1e-4)

    items = [Item("i", tuple(map(source_of, images)), ("0",), question=TEXTS[0])]
    items.append(Item("t", (source_of(images[1]),), ("1",), choices=tuple(TEXTS)))
    matched = torch.stack([scorer.matches(images, [text] * 3) for text in TEXTS], dim=1) + alike  # (I, N)
    for rerank in (3, 2):  # the candidates closest by contrast, so many, reranked by matching; then the others
        scorer.rerank = rerank
        for rows, line, both in zip(
            ranked(items, scorer), (alike[:, 0], alike[1]), (matched[:, 0], matched[1]), strict=True
        ):
            first = line.argsort(descending=True).tolist()
            assert rows == [*sorted(first[:rerank], key=lambda index: -both[index]), *first[rerank:]]
    scorer.rerank = 128
    with pytest.raises(MLLMError, match=r"heads contrast and match; the model has match\. Train the first stage"):
        MatchingScorer(model=mllm.assemble(*tiny_parts, {"type": "linear"}, heads=[{"type": "match", "inside": 16}]))


def ranked(items: list[Item], scorer: Any) -> list[list[int]]:
    return [
        [*map(int, row.split())]
        for row in import_module("mllm.eval.answers.ranking").Ranking(items, scorer).rows("model")
    ]


@torch.no_grad()
def test_generation_is_each_tokens_likelihood_given_those_before_it(reader: Any, inputs: Inputs) -> None:
    connector, expected = reader.connector, torch.tensor(0.0)
    assert inputs.features is not None
    for row, text in enumerate(TEXTS):
        ids, _ = connector.words.tokenize([text])
        input_ids, losses = torch.tensor([[connector.words.start]]), []
        for word in ids[0, 1:]:
            _, states = connector.joint(
                inputs.features[row : row + 1], input_ids, torch.ones_like(input_ids), "generation"
            )
            losses.append(-log_softmax(connector.words.logits(states)[0, -1], dim=-1)[word])
            input_ids = torch.cat([input_ids, word[None, None]], dim=1)
        expected = expected + torch.stack(losses).mean()
    torch.testing.assert_close(ImageTextGeneration()(inputs), expected, atol=1e-4, rtol=1e-4)


def test_the_three_train_the_connector_and_heads_alone(reader: Any, inputs: Inputs) -> None:
    reader.requires_grad_(False)
    reader.connector.requires_grad_(True)
    reader.heads.requires_grad_(True)
    for objective in (ImageTextContrast(), ImageTextMatching(), ImageTextGeneration()):
        objective(inputs).backward(retain_graph=True)
    without = {name for name, p in reader.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set() and all(p.grad is None for p in reader.encoder.parameters())


def test_a_sampled_negative_is_never_the_images_own_caption() -> None:
    torch.manual_seed(0)
    logits = torch.eye(4) * 5 + torch.tensor([[0.0, 9.0, 0.0, 0.0]] * 4)
    columns = torch.stack([sample_negatives(logits) for _ in range(50)])  # (50, 4)
    assert not (columns == torch.arange(4)).any()
    assert ((columns == 1).float().mean(0)[[0, 2, 3]] > 0.9).all()  # the one that is most alike


def test_patches_are_compared_with_each_captions_tokens(tiny_model: Any) -> None:
    model, rows = tiny_model(), rows_of(TEXTS)
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    batch = collate([model.encode(row) for row in rows], model.lm.pad)
    inputs = Inputs(model, rows, model.features([row[0] for row in rows]), batch)
    loss = PatchContrastive(temperature=0.2)(inputs)
    pooled = model.connector(inputs.features).mean(1)
    table = model.lm.model.get_input_embeddings().weight
    alike = torch.stack([
        torch.stack([cosine_similarity(image, table[model.lm.tokenize(f" {text}")]).mean() for text in TEXTS])
        for image in pooled
    ])  # fmt: skip
    expected = -(log_softmax(alike / 0.2, 1).diagonal().sum() + log_softmax(alike / 0.2, 0).diagonal().sum()) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.connector.parameters())
    assert all(p.grad is None for part in (model.lm, model.encoder) for p in part.parameters())


def test_a_pair_is_one_image_and_one_caption(inputs: Inputs) -> None:
    with pytest.raises(MLLMError, match="2 images and 1 target texts"):
        captions_of([[tiny_image(), *rows_of(TEXTS)[0]]])
    alone = Inputs(inputs.model, inputs.rows[:1], inputs.features[:1], None)  # type: ignore[index]
    with pytest.raises(MLLMError, match="batch_size to 2"):
        ImageTextMatching()(alone)


def test_a_blank_source_has_black_images(tmp_path: Path) -> None:
    tiny_image().save(tmp_path / "1.png")
    (tmp_path / "t.json").write_text(json.dumps([{"image": "1.png", "caption": "noise"}]))
    options: dict[str, Any] = {"format": "table", "path": str(tmp_path / "t.json"), "images": str(tmp_path)}
    (item,) = read(DataSpec(**options, blank=True))
    assert item.images == (Black(),) and item.images[0].open().getextrema() == ((0, 0),) * 3
    assert item.answers == ("noise",)


def test_a_source_may_use_one_of_the_answers(tmp_path: Path) -> None:
    tiny_image().save(tmp_path / "1.png")
    annotations = [{"image_id": 1, "caption": text} for text in ("one", "two", "three")]
    images = [{"id": 1, "file_name": "1.png"}]
    (tmp_path / "t.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    options: dict[str, Any] = {"format": "coco-captions", "annotations": str(tmp_path / "t.json")}
    options["images"] = str(tmp_path)
    for number, answers in ((None, ("one", "two", "three")), (0, ("one",)), (1, ("two",)), (7, ("three",))):
        (item,) = read(DataSpec(**options, answer=number))
        assert item.answers == answers
    assert "answer" not in DataSpec(**options).model_dump()
