"""Training on captions alone: no image is opened, the model answers for images, what does not fit is one message."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mllm
from mllm.config.data import DataSpec
from mllm.config.messages import checked
from mllm.config.prompt import PromptSpec
from mllm.data.sources import fingerprint, read, read_all
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.media.texts import TextSource
from mllm.planning.check import problems
from mllm.planning.data_check import inspect
from mllm.planning.plan import plan
from mllm.prompts.pieces import Target, images_of
from mllm.testing import tiny_image
from mllm.training.loop import Loop

CAPTIONS = [f"{number} red dogs" for number in range(12)]
FIT = "{name: fit, fit: {}}"
IMAGINED = "encoder={{type: imagined, of: [{{model: {vit}}}, {{type: dual-encoder, model: {clip}}}]}}"
ALIGN = "{name: align, train: {connector: 0.01}, steps: 6, batch_size: 4, checkpoint_every: 2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Captions whose images are not there, captions with images, questions, and COCO's annotations without images."""
    folder = tmp_path_factory.mktemp("texts")
    rows: list[dict[str, Any]] = [{"image": f"no/{n}.png", "caption": text} for n, text in enumerate(CAPTIONS)]
    rows.append({"image": "no/two.png", "caption": ["one cat", "a grey cat"]})
    (folder / "captions.json").write_text(json.dumps(rows))
    tiny_image(1).save(folder / "image.png")
    (folder / "images.json").write_text(json.dumps([{"image": "image.png", "caption": "noise"}] * 4))
    (folder / "questions.json").write_text(json.dumps([{"image": "no.png", "question": "What?", "answer": "it"}] * 4))
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    (folder / "coco.json").write_text(json.dumps(coco))
    return folder


@pytest.fixture(scope="module")
def recipe(folder, tiny_clip, tiny_parts) -> str:
    (folder / "recipe.yaml").write_text(f"""
name: texts
encoder: {{type: dual-encoder, model: {tiny_clip}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: nearest-texts, texts: 8, then: {{type: noisy, std: 0.1, then: {{type: linear, tokens: 4}}}}}}
data:
  train: {{format: table, path: {folder}/captions.json, see: text}}
  val: {{format: table, path: {folder}/captions.json, see: text}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - {FIT}
  - {ALIGN}
""")
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """The recipe's run, during which nothing may be decoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image is opened"))
        return mllm.train(recipe, out=tmp_path_factory.mktemp("run") / "run")


def losses(run: Any) -> list[float]:
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def source(folder: Path, name: str = "captions", **options: Any) -> DataSpec:
    options = {"format": "table", "path": str(folder / f"{name}.json"), "see": "text", **options}
    return checked(DataSpec, options)


def test_training_on_captions_alone_lowers_the_loss(run):
    values = losses(run)
    assert len(values) == 6 and values[-1] < values[0]


def test_it_answers_for_images_and_is_saved_with_its_texts(run, tmp_path):
    model = mllm.load(run.path)
    assert model.connector.collected == 8
    captions = [*CAPTIONS, "one cat", "a grey cat"]
    with torch.no_grad():
        vectors = model.encoder.encode_texts(captions)[:, 0]
    distance = torch.cdist(model.connector.memory, vectors).min(1).values
    torch.testing.assert_close(distance, torch.zeros(8), atol=1e-3, rtol=0)
    prompt = [[tiny_image(3), "A picture of"]]
    again = mllm.load(model.save(tmp_path / "model"))
    assert str(again.generate(prompt)[0]) == str(model.generate(prompt)[0])
    seen, seen_again = model.see_images([tiny_image(3)]), again.see_images([tiny_image(3)])
    assert seen is not None and seen_again is not None and torch.equal(seen, seen_again)


def test_resumed_it_is_the_run_it_would_have_been(recipe, run, tmp_path, monkeypatch):
    step, steps = Loop.step, iter(range(10))

    def killed(self: Any, *arguments: Any) -> Any:
        if next(steps) == 3:
            raise RuntimeError("killed")
        return step(self, *arguments)

    monkeypatch.setattr(Loop, "step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        mllm.train(recipe, out=tmp_path / "run")
    monkeypatch.undo()
    resumed = mllm.train(recipe, resume=tmp_path / "run")
    assert losses(resumed) == losses(run)
    assert (resumed.path / "model/assembly.json").read_bytes() == (run.path / "model/assembly.json").read_bytes()


def test_the_noise_of_every_step_is_its_own(recipe, run, tmp_path):
    quiet = mllm.train(recipe, ["connector.then.std=0"], out=tmp_path / "quiet")
    assert losses(quiet)[0] != losses(run)[0]


def test_every_caption_stands_before_itself(folder):
    items = read(source(folder))
    assert len(items) == len(CAPTIONS) + 2 and len({item.id for item in items}) == len(items)
    assert all(item.images == (TextSource(item.answers[0]),) and len(item.answers) == 1 for item in items)
    stream = Stream(read_all([source(folder)]), PromptSpec(), seed=0)
    for pieces in stream.take(2 * len(items)):
        (image,), (target,) = images_of(pieces), [piece for piece in pieces if isinstance(piece, Target)]
        assert target.text.strip() == image.text


def test_the_data_are_others_than_with_images(folder, tmp_path):
    assert fingerprint(read_all([source(folder, "images")])) != fingerprint(
        read_all([source(folder, "images", see="image")])
    )


def test_missing_images_are_none_where_texts_stand_in_their_places(folder):
    coco = {"format": "coco-captions", "annotations": str(folder / "coco.json"), "images": "nowhere", "see": "text"}
    assert [item.images for item in read(checked(DataSpec, coco))] == [(TextSource("a dog"),)]
    with pytest.raises(MLLMError, match="images are missing"):
        read(checked(DataSpec, {**coco, "see": "image"}))


def test_lazy_items_show_the_caption_that_is_learned(folder, tmp_path):
    (tmp_path / "a.png").write_bytes((folder / "image.png").read_bytes())
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
        (tmp_path / "a.txt").write_text("a lazy dog")
        archive.add(tmp_path / "a.txt", "a.txt")
    spec = checked(DataSpec, {"format": "webdataset", "path": str(tmp_path), "see": "text"})
    (pieces,) = Stream(read_all([spec]), PromptSpec(), seed=0).take(1)
    assert images_of(pieces) == [TextSource("a lazy dog")] and pieces[-1] == Target(" a lazy dog")


def test_check_and_plan_know_the_recipe(recipe):
    assert problems(recipe) == []
    stages = plan(recipe).stages
    assert [stage.tokens_per_image for stage in stages] == [4, 4] and stages[1].images == 14
    reports, leaks = inspect(recipe)
    assert not leaks and [problem for report in reports for problem in report.problems] == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder={{model: {vit}}}"], r"has 'see: text', and the model has no encoder that encodes texts"),
        (
            ["encoder={{model: {vit}}}", "data.train.see=image", "data.val=[]"],
            r"nearest-texts compares with texts, and the model has no encoder that encodes texts",
        ),
        (
            ["encoder={{type: text, model: {bert}}}", "data.train.see=image", "connector={{type: linear, tokens: 4}}"],
            r"encodes texts alone, and a source shows images",
        ),
        (
            ["stages.1.train={{encoder: 0.1}}"],
            r"trains the encoder on texts, which is possible with encoder\.type=text",
        ),
        (
            [IMAGINED],
            r"map from texts to features is not fitted yet.*fit: {{part: encoder\.project}}",
        ),
        (
            [IMAGINED, "stages=[{{name: imagine, fit: {{part: encoder.project}}}}]"],
            r"map from texts to features is not fitted yet.*fit: {{part: encoder\.project}}",
        ),
    ],
)
def test_what_cannot_read_texts_is_one_message_before_training(
    recipe, tiny_parts, tiny_clip, tiny_bert, tmp_path, overrides, message
):
    options = [each.format(vit=tiny_parts[0], clip=tiny_clip, bert=tiny_bert) for each in overrides]
    pattern = message.replace("{{", "{").replace("}}", "}")
    with pytest.raises(MLLMError, match=pattern):
        mllm.train(recipe, options, out=tmp_path / "run")
    found = problems(recipe, options)
    assert any(re.search(pattern, problem) for problem in found), found


def test_a_source_without_captions_is_one_message(recipe, folder, tmp_path):
    with pytest.raises(MLLMError, match=r"has no caption, and with see: text"):
        mllm.train(recipe, [f"data.train.path={folder}/questions.json"], out=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.train.blank=true"], "either 'blank' or 'see: text'"),
        (["data.augment={flip: 0.5}"], "augment changes images, and a source has 'see: text'"),
        (["data.train.see=sound"], "image.*text"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(recipe, options, message):
    with pytest.raises(MLLMError, match=f"(?s){message}"):
        mllm.config.loading.load(recipe, options)


def test_a_run_of_before_has_the_recipe_it_had(recipe):
    spec = mllm.config.loading.load(recipe, ["data.train.see=image"]).stages[0].data.train[0]
    assert "see" not in spec.model_dump()


def test_a_text_tower_trains_and_each_text_is_masked_anew(recipe, tmp_path, tiny_bert, tiny_parts):
    stage = "{name: prompts, train: {encoder: 0.001, connector: 0.01}, steps: 3, batch_size: 4}"
    options = [f"encoder={{type: text, model: {tiny_bert}, mask: 0.25}}", "connector={type: linear, tokens: 4}"]
    run = mllm.train(recipe, [*options, f"stages=[{stage}]"], out=tmp_path / "run")
    assert len(losses(run)) == 3
    saved, fresh = (
        mllm.load(run.path),
        mllm.assemble({"type": "text", "model": tiny_bert}, tiny_parts[1], {"type": "linear", "tokens": 4}),
    )
    texts = ["a dog"]
    with torch.no_grad():
        assert not torch.equal(saved.encoder.encode_texts(texts), fresh.encoder.encode_texts(texts))
    assert plan(recipe, [*options, f"stages=[{stage}]"]).stages[0].flops.total > 0


def test_imagined_images_train_a_connector(recipe, folder, tmp_path, tiny_parts, tiny_clip):
    of = f"[{{model: {tiny_parts[0]}}}, {{type: dual-encoder, model: {tiny_clip}}}]"
    pairs = f"{{format: table, path: {folder}/images.json, see: image}}"
    stages = [f"{{name: imagine, fit: {{part: encoder.project}}, data: {{train: {pairs}}}}}", FIT, ALIGN]
    options = [f"encoder={{type: imagined, of: {of}}}", "connector={type: linear}", f"stages=[{', '.join(stages)}]"]
    options.append("data.val=[]")
    run = mllm.train(recipe, options, out=tmp_path / "run")
    model = mllm.load(run.path)
    assert model.encoder.project.bias.abs().sum() > 0 and len(losses(run)) == 6
    frozen = json.loads((run.path / "frozen.json").read_text())
    assert set(frozen["align"]["before"]) == {"encoder", "lm"}
    assert problems(recipe, options) == [] and len(plan(recipe, options).stages) == 3
