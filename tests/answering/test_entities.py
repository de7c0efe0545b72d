"""Entities in the prompt: a caption's words in training, a scorer's in answers, by the formula in plain torch."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import mllm
from mllm.answering.entities import with_entities
from mllm.config.data import DataSpec
from mllm.config.messages import checked
from mllm.config.parts import AssemblySpec
from mllm.config.prompt import EntitiesSpec, PromptSpec
from mllm.data.sources import read_all
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.media.texts import TextSource
from mllm.prompts.entities import entities_in, of_caption, vocabulary_of
from mllm.prompts.pieces import Target
from mllm.testing import tiny_image

WORDS = ("dog", "hot dog", "cat", "bus", "tree")
ENTITIES = {"of": list(WORDS), "top": 2, "threshold": 0.21, "temperature": 0.5}


@pytest.fixture(scope="module")
def model(tiny_clip, tiny_parts):
    scorer = {"type": "dual-encoder", "model": tiny_clip}
    prompt = {"caption": "A", "chat": "plain", "entities": ENTITIES}
    encoder = {"type": "dual-encoder", "model": tiny_clip}
    return mllm.assemble(encoder, tiny_parts[1], "linear", scorer=scorer, prompt=prompt)


def shares(folder: str, image: Any) -> list[float]:
    """The softmax over the vocabulary, by transformers alone."""
    bare, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    options = {"padding": "max_length", "max_length": 64, "return_tensors": "pt"}
    with torch.no_grad():
        output = bare(**processor(text=list(WORDS), images=[image], **options))
    cosines = output.logits_per_image[0] / bare.logit_scale.exp()
    return (cosines / 0.5).softmax(-1).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_scorers_words_stand_behind_the_image(model, tiny_clip, seed):
    image = tiny_image(seed)
    order = sorted(zip(shares(tiny_clip, image), WORDS, strict=True), reverse=True)[:2]
    best = ", ".join(word for share, word in order if share >= 0.21) or "something"
    assert with_entities(model, [image, "A"]) == [image, f" There are {best} in image.", "A"]
    assert with_entities(model, ["no image"]) == ["no image"]


def test_every_way_to_answer_has_them(model):
    image = tiny_image(1)
    written = with_entities(model, [image, "A"])
    bare = model.spec.prompt.entities
    answer, views = str(model.generate([[image, "A"]])[0]), model.score([image, "A"], ["x", "yz"])
    shown = model.see([image]).score(["x", "yz"])
    model.spec.prompt.entities = None
    try:
        assert str(model.generate([written])[0]) == answer
        assert model.score(written, ["x", "yz"]) == pytest.approx(views, abs=1e-5)
        assert model.see(written[:2]).score(["x", "yz"]) == pytest.approx(shown, abs=1e-5)
    finally:
        model.spec.prompt.entities = bare


def test_they_are_saved(model, tmp_path):
    again = mllm.load(model.save(tmp_path / "model"))
    assert again.spec.prompt.entities == model.spec.prompt.entities
    assert "entities" not in AssemblySpec().model_dump()["prompt"]


@pytest.mark.parametrize(
    ("caption", "entities"),
    [
        ("A Dog and two cats.", ["dog", "cat"]),
        ("a hot dog on a bus", ["hot dog", "bus"]),
        ("buses by a dogged concatenation", ["bus"]),
        ("cat, tree, cat", ["cat", "tree"]),
        ("nothing", []),
    ],
)
def test_a_captions_entities_are_whole_words(caption, entities):
    assert entities_in(caption, WORDS) == entities


def test_in_training_each_word_is_dropped_at_random():
    spec = EntitiesSpec(of=list(WORDS), drop=0.4)
    generator = random.Random(0)
    texts = [of_caption(spec, "a dog and a cat", generator) for _ in range(2000)]
    assert sum("dog" in text for text in texts) / 2000 == pytest.approx(0.6, abs=0.04)
    assert sum("something" in text for text in texts) / 2000 == pytest.approx(0.16, abs=0.03)
    assert of_caption(EntitiesSpec(of=list(WORDS), most=1), "a cat, a dog", generator) == " There are cat in image."


def test_examples_name_their_captions_words_before_the_target(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "no.png", "caption": "a dog by a tree"}]))
    spec = checked(DataSpec, {"format": "table", "path": str(tmp_path / "rows.json"), "see": "text"})
    prompt = PromptSpec(caption="A", entities=EntitiesSpec(of=list(WORDS)))
    (pieces,) = Stream(read_all([spec]), prompt, seed=0).take(1)
    text = TextSource("a dog by a tree")
    assert pieces == [text, " There are dog, tree in image.", "A", Target(" a dog by a tree")]


def test_a_file_has_a_word_on_each_line(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("dog\n\n cat \ndog\n")
    assert vocabulary_of(EntitiesSpec(of=str(file))) == ("dog", "cat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"scorer": None}, "give scorer"), ({"prompt": {"entities": {**ENTITIES, "text": "x"}}}, "{entities} once")],
)
def test_what_does_not_fit_is_one_message(tiny_parts, changes, message):
    options = {"prompt": {"entities": ENTITIES}, "scorer": {"type": "dual-encoder", "model": "none"}, **changes}
    with pytest.raises(MLLMError, match=message):
        mllm.assemble(*tiny_parts, **options)


def test_a_vocabulary_is_a_text_file_that_is_there(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    for name, message in (("none", "no such file or folder"), ("pipe", "cannot be read"), ("latin", "cannot be read")):
        with pytest.raises(MLLMError, match=rf"prompt\.entities\.of is '.*{name}'.*{message}"):
            vocabulary_of(EntitiesSpec(of=str(tmp_path / name)))
