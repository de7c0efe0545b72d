"""Metrics that read images, ask a model, or have a vocabulary: compared with transformers' classes, and by hand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

import mllm
from mllm.config.base import PartSpec
from mllm.data.items import Item
from mllm.encoders.dual_encoder import DualEncoder
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.testing import tiny_image

PREDICTIONS = ["a dog", "two cats on a mat", "a bus"]
REFERENCES = [["a dog runs", "the dog"], ["cats"], ["a red bus", "a dog"]]


def measure(name: str, items: list[Item], **helpers: Any) -> Any:
    scoring = import_module("mllm.eval.scoring")
    return scoring.measure(name, PREDICTIONS, items, scoring.Helpers(**helpers))


def test_clipscore_is_the_papers_formula_on_transformers_own_clip(tiny_clip: str) -> None:
    images = [tiny_image(seed) for seed in range(3)]
    items = [Item(str(i), (source_of(images[i]),), tuple(REFERENCES[i])) for i in range(3)]
    model, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip, backend="pil")

    def embedded(texts: list[str]) -> torch.Tensor:
        inputs = processor(text=["A photo depicts " + text for text in texts], return_tensors="pt", padding=True)
        return torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")
        image_vectors = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
        captions = embedded(PREDICTIONS)
        expected = [2.5 * max(0.0, float(a @ b)) for a, b in zip(image_vectors, captions, strict=True)]
        closest = [
            float((embedded(texts) @ caption).max().clamp(min=0))
            for texts, caption in zip(REFERENCES, captions, strict=True)
        ]
    scorer = PartSpec(type="dual-encoder", model=tiny_clip)  # type: ignore[call-arg]
    assert measure("caption/clipscore", items, scorer=scorer).per_item == pytest.approx(expected, abs=1e-5)
    both = [2 * a * b / (a + b) if a + b else 0.0 for a, b in zip(expected, closest, strict=True)]
    assert measure("caption/refclipscore", items, scorer=scorer).per_item == pytest.approx(both, abs=1e-5)
    default = measure("caption/clipscore", items, default=lambda: DualEncoder(model=tiny_clip))
    assert default.per_item == pytest.approx(expected, abs=1e-5)


def test_a_metric_names_the_model_that_it_needs() -> None:
    items = [Item(str(i), (source_of(tiny_image(i)),), tuple(REFERENCES[i])) for i in range(3)]
    with pytest.raises(MLLMError, match="needs a scorer"):
        measure("caption/clipscore", items)
    with pytest.raises(MLLMError, match="needs a judge"):
        measure("caption/clair", items)
    with pytest.raises(MLLMError, match="item 0 has 0 images"):
        measure("caption/clipscore", [Item("0", (), ("a",))] * 3, default=object)


def test_chair_by_hand() -> None:
    captions = ["a dog and two cats", "A hot dog on the sofa.", "the sky", "cats, cats"]
    there = [["dog"], ["couch|sofa", "hot dog"], ["cat"], ["cat"]]
    objects = mllm.metric("caption/chair-i")(captions, there)  # named: 2, 2, 0, 1; not there: the cats of the first
    assert (objects.per_item, objects.better) == ([0.5, 0.0, 0.0, 0.0], "lower")
    assert objects.value == pytest.approx(1 / 5)
    assert objects.of([0, 3]) == pytest.approx(1 / 3)
    assert mllm.metric("caption/chair-s")(captions, there).value == 0.25


class Judge:
    """Answers as a language model would, from a list."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[str]()
        self.tokenizer, self.model = self, self
        self.bos: list[int] = []
        self.chat_template, self.device = None, "cpu"

    def tokenize(self, text: str) -> list[int]:
        self.asked.append(text)
        return [1]

    def generate(self, mask: Any, settings: Any, **inputs: Any) -> list[list[int]]:
        return [[0]]

    def decode(self, ids: list[int]) -> str:
        return self.answers.pop(0)


def test_clair_reads_the_judges_score() -> None:
    judge = Judge('{"score": 80, "reason": "x"}', "score: 5.5", "I like both.")
    clair: Any = mllm.metric("caption/clair")
    assert clair(PREDICTIONS[:2], REFERENCES[:2], judge=judge).per_item == [0.8, 0.055]
    assert "- a dog\n" in judge.asked[0] and "- a dog runs\n- the dog" in judge.asked[0]
    with pytest.raises(MLLMError, match=r"item 0 no score.*I like both"):
        clair(PREDICTIONS[:1], REFERENCES[:1], judge=judge)


def test_clair_asks_a_real_language_model(tiny_parts: tuple[str, str]) -> None:
    items = [Item(str(i), (), tuple(REFERENCES[i])) for i in range(3)]
    with pytest.raises(MLLMError, match="item 0 no score from 0 to 100"):  # a tiny one gives no score
        measure("caption/clair", items, judge=tiny_parts[1])


def test_bleu_and_f1_of_some_items_are_those_items_alone() -> None:
    captions, references = ["a b c d e", "a b x", "q"], [["a b c d f"], ["a b c"], ["q r s t"]]
    for name in ("caption/bleu-2", "caption/cider-d", "caption/rouge-l"):
        whole = mllm.metric(name)(captions, references)
        assert whole.of([0, 1, 2]) == pytest.approx(whole.value)
        some = mllm.metric(name)([captions[i] for i in (0, 2, 0)], [references[i] for i in (0, 2, 0)])
        assert whole.of([0, 2, 0]) == pytest.approx(some.value)
    f1 = mllm.metric("pope/f1")(["yes", "no", "yes"], [["yes"], ["yes"], ["no"]])
    assert f1.value == pytest.approx(0.5) and f1.of([0, 1]) == pytest.approx(2 / 3)


def test_generated_images_are_compared_with_the_real_ones(tiny_clip: str, tmp_path: Any) -> None:
    made, real = [tiny_image(seed) for seed in (5, 6, 7)], [tiny_image(seed) for seed in (5, 1, 2)]
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for path, image in zip(paths, made, strict=True):
        image.save(path)
    model, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip, backend="pil")
    with torch.no_grad():
        vectors = [
            model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
            for images in (made, real)
        ]
    expected = torch.nn.functional.cosine_similarity(*vectors)
    similarity: Any = mllm.metric("generation/clip-similarity")
    images = [[tiny_image(9), source_of(image)] for image in real]  # the last is the real one
    score = similarity(paths, [["x"]] * 3, images=images, scorer=DualEncoder(model=tiny_clip))
    assert score.per_item == pytest.approx(expected.tolist(), abs=1e-5) and score.per_item[0] == pytest.approx(1.0)
    with pytest.raises(MLLMError, match="Item 1 has no image"):
        similarity(paths, [["x"]] * 3, images=[images[0], [], images[2]], scorer=None)


def test_a_corpus_score_has_no_values_of_items() -> None:
    scoring, score = import_module("mllm.eval.scoring"), import_module("mllm.evaluation").Score
    items = [Item("a", (), ("x",), kind="one"), Item("b", (), ("x",), kind="two")]
    results = {"model": scoring.Result(["x", "y"], {"whole": score(3.0, [], "whole", "1", better="lower")})}
    (entry,) = scoring.tally(["whole"], items, results)["metrics"]
    assert (entry["value"], entry["low"], entry["better"]) == (3.0, None, "lower")
    assert [row["scores"] for row in scoring.rows(items, results)] == [{}, {}]
    assert scoring.tally(["whole"], items, results)["kinds"] == {"one": {"n": 1}, "two": {"n": 1}}


@pytest.mark.extras
def test_fid_is_the_frechet_distance(tmp_path: Any) -> None:
    from scipy.linalg import sqrtm

    class Means(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.float().unflatten(-1, (-1, 23)).mean(dim=(-1, -3)).flatten(1)[:, ::6]

        num_features = 7

    sets = [[tiny_image(seed) for seed in seeds] for seeds in (range(12), range(20, 32))]
    paths = []
    for index, image in enumerate(sets[1]):
        image.save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    fid: Any = mllm.metric("generation/fid")
    score = fid(paths, [["x"]] * 12, images=[[image] for image in sets[0]], feature=Means())
    pixels = import_module("mllm.eval.metrics.generation")._pixels
    real, made = (torch.cat([Means()(pixels(image, "fid")) for image in images]).double().numpy() for images in sets)
    covariances = np.cov(real, rowvar=False), np.cov(made, rowvar=False)
    expected = ((real.mean(0) - made.mean(0)) ** 2).sum() + sum(np.trace(c) for c in covariances)
    expected -= 2 * np.trace(np.real(sqrtm(covariances[0] @ covariances[1])))
    assert score.value == pytest.approx(expected, rel=1e-3) and score.per_item == []


@pytest.mark.extras
def test_weights_that_cannot_be_downloaded_are_one_message(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tiny_image(0).save(tmp_path / "0.png")
    for name in ("generation/fid", "generation/lpips"):
        metric: Any = mllm.metric(name)
        with pytest.raises(MLLMError, match="weights are downloaded once, and that failed"):
            metric([str(tmp_path / "0.png")], [["x"]], images=[[tiny_image(1)]])
