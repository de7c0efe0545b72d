"""An index is searched exactly, knows its model, and what is found stands in the answer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

import mllm
from mllm.cli.app import app
from mllm.errors import MLLMError
from mllm.outputs import ImagePart, Text
from mllm.scorers.index import ImageIndex, hash_of, opened
from mllm.testing import tiny_image

PARTS = {"heads": [{"type": "retrieval", "dim": 6}], "tokens": ["[RET]"]}


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / "photos" / f"{number}.png" for number in range(5)]
    found[0].parent.mkdir()
    for number, path in enumerate(found):
        tiny_image(number).save(path)
    return found


def test_the_closest_images_are_found(tiny_model, paths, tmp_path):
    model = tiny_model(**PARTS)
    ImageIndex.build(model, paths).save(tmp_path / "photos.index")
    index = ImageIndex.load(tmp_path / "photos.index")
    prompts = [["A cat"], [tiny_image(7), "and", tiny_image(8), "a longer text"]]
    got = model.retrieve(prompts, index, 3)
    head, token = model.heads["retrieval"], model.lm.new_tokens["[RET]"]
    for prompt, own in zip(prompts, got, strict=True):
        embeds, _ = model.prepare([prompt])
        embeds = torch.cat([embeds, model.lm.embed(torch.tensor([[token]]))], 1)
        state = model.lm.hidden(embeds, torch.ones(embeds.shape[:2], dtype=torch.long))[0, -1]
        told = head.text(state)
        close = [torch.cosine_similarity(told, head.image(model.features([path])[0].mean(0)), dim=0) for path in paths]
        order = torch.stack(close).argsort(descending=True)[:3].tolist()
        assert [part.source for part in own] == [str(paths[place]) for place in order]
        assert [part.score for part in own] == pytest.approx([close[place].item() for place in order], abs=1e-4)
        assert own[0].image.open().size == (40, 32)


def test_where_the_model_says_the_token_an_image_stands(tiny_model, paths):
    model = tiny_model(**PARTS)
    index = ImageIndex.build(model, paths)
    prompts = [["A cat"], [tiny_image(7), "a longer text"]]
    plain = model.generate(prompts, max_new_tokens=5)
    never = model.generate(prompts, index=index, image_logit_bias=-1e4, max_new_tokens=5)
    assert [list(answer) for answer in plain] == [list(answer) for answer in never]
    often = model.generate(prompts, index=index, image_logit_bias=1e4, images=2, max_new_tokens=5)
    for prompt, answer in zip(prompts, often, strict=True):
        assert len(answer.images) >= 2 and str(answer) == "".join(part for part in answer if isinstance(part, Text))
        (same,) = model.retrieve([prompt], index, 2)  # the first thing it says is the token
        assert isinstance(answer[0], ImagePart) and answer[0].source == same[0].source
        assert answer[0].score == pytest.approx(same[0].score, abs=1e-4)
        assert [part.source for part in answer[0].candidates] == [same[1].source]
        assert not any(isinstance(one, ImagePart) and isinstance(two, ImagePart) for one, two in pairwise(answer))


def test_an_index_of_another_model_and_an_empty_one_are_refused(tiny_model, paths, tmp_path, monkeypatch):
    model, other = tiny_model(**PARTS), tiny_model(**PARTS, seed=1)
    index = ImageIndex.build(model, paths)
    with pytest.raises(MLLMError, match="built with another model"):
        other.retrieve([["A cat"]], index)
    with pytest.raises(MLLMError, match="The index is empty"):
        ImageIndex.build(model, [])
    with pytest.raises(MLLMError, match="needs a retrieval head"):
        ImageIndex.build(tiny_model(), paths)
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(MLLMError, match="cannot be read"):
        opened(tmp_path / "broken")
    with pytest.raises(MLLMError, match="leave out 'candidates'"):
        model.generate([["A cat"]], index=index, candidates=2)
    model.save(tmp_path / "mine")
    other.save(tmp_path / "other")
    monkeypatch.setattr("mllm.build.build", lambda _: pytest.fail("a model was built"))
    assert opened(index, tmp_path / "mine").model == hash_of(model)
    with pytest.raises(MLLMError, match="built with another model"):
        opened(index, tmp_path / "other")


def test_the_commands_build_and_find(tiny_model, paths, tmp_path):
    tiny_model(**PARTS).save(tmp_path / "run")
    place, run = str(tmp_path / "photos.index"), ["--run", str(tmp_path / "run")]
    built = CliRunner().invoke(app, ["index", "build", str(paths[0].parent), place, *run], catch_exceptions=False)
    assert built.output.endswith("photos.index: 5 pictures.\n")
    found = CliRunner().invoke(app, ["index", "find", place, "A cat", "--count", "2", *run], catch_exceptions=False)
    (same,) = mllm.load(tmp_path / "run").retrieve([["A cat"]], place, 2)
    assert [line.split()[-1] for line in found.output.splitlines()] == [part.source for part in same]


def test_faiss_finds_what_torch_finds(monkeypatch):
    pytest.importorskip("faiss", reason="the extra 'retrieval' is not installed")
    vectors = torch.nn.functional.normalize(torch.randn(500, 16), dim=-1)
    queries = torch.nn.functional.normalize(torch.randn(20, 16), dim=-1)
    index, plain = (ImageIndex(vectors, [f"{n}.png" for n in range(500)], "model") for _ in range(2))
    monkeypatch.setitem(vars(plain), "_faiss", None)  # as where it is not installed
    assert type(index._faiss).__name__ == "IndexFlatIP"
    for one, other in zip(index.search(queries, 7), plain.search(queries, 7), strict=True):
        assert [part.id for part in one] == [part.id for part in other] and len(one) == 7
        assert [part.score for part in one] == pytest.approx([part.score for part in other], abs=1e-6)
    assert len(index.search(queries[:1], 1000)[0]) == 500
