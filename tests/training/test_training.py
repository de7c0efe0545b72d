"""Training: it learns, it repeats, what is frozen stays so, and how a batch is split changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import mllm
import mllm.config.loading
import mllm.fits.targets
import mllm.hub.loading
import mllm.objectives.caption
import mllm.prompts.pieces
from mllm.data.items import Item
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.fits.connector import ConnectorFit
from mllm.fits.regression import NormalEquations
from mllm.media.images import source_of
from mllm.testing import tiny_image
from mllm.training.validation import validate

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tiny_parts):
    """A recipe on pictures of four colours, whose captions are the colours' names."""
    folder = tmp_path_factory.mktemp("colours")
    rows = []
    for index in range(48):
        name, colour = list(COLOURS.items())[index % 4]
        picture = tiny_image(index)
        picture.paste(colour, (0, 0, 40, 28))
        picture.save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": name})
    (folder / "train.json").write_text(json.dumps(rows[:32]))
    (folder / "val.json").write_text(json.dumps(rows[32:]))
    text = f"""
name: colours
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data:
  train: {{format: table, path: {folder}/train.json}}
  val: {{format: table, path: {folder}/val.json}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - {{name: align, train: {{connector: 0.01}}, steps: 10, batch_size: 8, validate_every: 5}}
"""
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


def log(run, key="loss"):
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def test_ten_steps_lower_the_loss_and_repeat_bit_for_bit(recipe, tmp_path):
    first = mllm.train(recipe, out=tmp_path / "a")
    again = mllm.train(recipe, out=tmp_path / "b")
    assert log(first) == log(again)
    assert (first.path / "model/assembly.json").read_bytes() == (again.path / "model/assembly.json").read_bytes()
    assert log(first)[-1] < log(first)[0] - 0.5
    assert len(log(first)) == 10 and len(log(first, "val_loss")) == 2
    other = mllm.train(recipe, {"seed": 1}, out=tmp_path / "c")
    assert log(other) != log(first)


def test_a_run_holds_what_it_came_from(recipe, tmp_path):
    run = mllm.train(recipe, ["stages.0.steps=2"], out=tmp_path / "run")
    assert mllm.config.loading.load(str(run.path / "recipe.yaml")).stages[0].steps == 2
    assert {
        "recipe.yaml",
        "environment.json",
        "data.json",
        "log.jsonl",
        "speed.jsonl",
        "loss.png",
        "frozen.json",
        "time.json",
        "model",
    } == {path.name for path in run.path.iterdir()}
    assert 0 < json.loads((run.path / "time.json").read_text())["minutes"] < 10
    frozen = json.loads((run.path / "frozen.json").read_text())["align"]
    assert frozen["before"] == frozen["after"] and len(frozen["before"]) == 2


def test_frozen_parts_hash_the_same_and_the_connector_does_not(recipe, tmp_path, tiny_parts):
    spec = {"type": "linear", "tokens": 4}
    before = mllm.assemble(tiny_parts[0], tiny_parts[1], spec)
    after = mllm.load(mllm.train(recipe, ["stages.0.steps=3"], out=tmp_path / "run").path)
    for part in ("encoder", "lm"):
        assert mllm.hub.fingerprints.tensor_hash(getattr(before, part)) == mllm.hub.fingerprints.tensor_hash(
            getattr(after, part)
        )
    assert mllm.hub.fingerprints.tensor_hash(before.connector) != mllm.hub.fingerprints.tensor_hash(after.connector)


def test_an_adapter_trains_beside_the_connector_at_its_own_rate(recipe, tmp_path):
    overrides = ["adapters=[{type: lora, r: 2}]", "stages.0.train={connector: 0.01, adapters: 0.02}"]
    run = mllm.train(recipe, overrides, out=tmp_path / "both")
    assert log(run)[-1] < log(run)[0] - 0.5
    model = mllm.load(run.path)
    assert any(tensor.abs().sum() > 0 for name, tensor in model.trained_state().items() if "lora_B" in name)
    frozen = json.loads((run.path / "frozen.json").read_text())["align"]
    assert frozen["before"] == frozen["after"]
    still = mllm.load(mllm.train(recipe, overrides[:1], out=tmp_path / "one").path)
    assert all(tensor.abs().sum() == 0 for name, tensor in still.trained_state().items() if "lora_B" in name)


def test_a_batch_of_eight_is_two_of_four_accumulated(recipe, tmp_path):
    whole = mllm.train(recipe, ["stages.0.steps=4"], out=tmp_path / "whole")
    # Answers of different lengths: a mean of batch means would differ from the mean over tokens.
    split = mllm.train(
        recipe, ["stages.0.steps=4", "stages.0.batch_size=4", "optim.accumulate=2"], out=tmp_path / "split"
    )
    assert log(split) == pytest.approx(log(whole), rel=1e-4)


def test_what_was_trained_reads_the_picture(recipe, tmp_path):
    model = mllm.load(mllm.train(recipe, ["stages.0.steps=150"], out=tmp_path / "run").path)
    pictures = [source_of(recipe.replace("recipe.yaml", f"{index}.png")) for index in range(32, 48)]
    scores = torch.tensor([model.score([picture, "A picture of"], list(COLOURS)) for picture in pictures])
    # A language model with random weights has likings of its own: what the picture adds is what counts.
    right = ((scores - scores.mean(0)).argmax(1) == torch.arange(16) % 4).sum()
    assert right >= 12  # of 16 new pictures; a blind model gets 4


def test_several_images_and_text_only_examples_train_together(recipe, tmp_path, tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4})
    target = mllm.prompts.pieces.Target(" yes")
    rows = [[tiny_image(0), "and", tiny_image(1), target], ["no picture", target], [tiny_image(2), target]]
    store, caption = FeatureStore(model), [mllm.objectives.caption.Caption()]
    alone = [validate(model, [row], store, caption, [1.0]) for row in rows]
    assert validate(model, rows, store, caption, [1.0]) == pytest.approx(sum(alone) / 3, rel=1e-4)


def test_features_are_computed_once_and_are_the_same(tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1])
    images = [tiny_image(0), tiny_image(1), tiny_image(0)]
    store, seen = FeatureStore(model), list[int]()
    hook = model.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    first, second = store(images), store(images)
    assert seen == [2]
    assert torch.equal(first, second) and torch.allclose(first, model.features(images), atol=1e-6)
    seen.clear()
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    store = FeatureStore(model, limit=0)
    store(images), store(images)
    hook.remove()
    assert seen == [2, 2]


def test_normal_equations_are_ridge_regression():
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    sums = NormalEquations(4, 3)
    for rows in (slice(0, 20), slice(20, 50)):
        sums.add(x[rows], y[rows])
    centred = x - x.mean(0)
    penalty = 0.1 * centred.square().mean(0).mean()
    # Ridge as least squares on rows that pull the weights to zero.
    padded = torch.cat([centred, (50 * penalty).sqrt() * torch.eye(4, dtype=torch.float64)])
    targets = torch.cat([y - y.mean(0), torch.zeros(4, 3, dtype=torch.float64)])
    expected = torch.linalg.lstsq(padded, targets).solution
    first, rest = NormalEquations(4, 3), NormalEquations(4, 3)
    first.add(x[:30], y[:30])
    rest.add(x[30:], y[30:])
    first.merge(rest)
    torch.testing.assert_close(first.solve("ridge", 0.1), sums.solve("ridge", 0.1))
    weights, intercept = sums.solve("ridge", 0.1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(intercept, y.mean(0) - x.mean(0) @ expected)


def test_procrustes_finds_a_rotation_and_least_squares_any_map():
    x = torch.randn(200, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    x = (x - x.mean(0)) @ torch.linalg.cholesky(torch.linalg.inv(x.T.cov(correction=0)))  # uncorrelated, variance 1
    sums = NormalEquations(4, 4)
    sums.add(x, x @ rotation + 3)
    for solver in ("procrustes", "least-squares"):
        weights, intercept = sums.solve(solver, 0.0)
        torch.testing.assert_close(weights, rotation)
        torch.testing.assert_close(intercept, torch.full((4,), 3.0, dtype=torch.float64))
        assert sums.explained(weights, intercept) == pytest.approx(1)


def test_the_closed_form_start_points_features_at_their_words(tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4})
    pictures = [tiny_image(seed) for seed in range(24)]
    for index, picture in enumerate(pictures):
        picture.paste(list(COLOURS.values())[index % 4], (0, 0, 40, 26))
    items = [
        Item(str(index), (source_of(picture),), (list(COLOURS)[index % 4],)) for index, picture in enumerate(pictures)
    ]
    explained = ConnectorFit(strength=0.001)(model, Material(items[:16], model.features))
    assert 0.5 < explained <= 1
    predicted = model.connector(model.features(pictures[16:])).mean(1)
    targets = torch.stack(
        [
            mllm.fits.targets.words_embedding(model.lm, item, mllm.fits.targets.rarity(model.lm, items))
            for item in items[:4]
        ]
    )
    nearest = torch.cdist(predicted, targets).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.train.conector=0.1", "conector.*Did you mean 'connector"),
        ("data.train.path=nowhere.json", "nowhere.json cannot be read"),
        ("data.train.pth=x", "does not accept these arguments"),
        ("stages.0.objectives=[{type: captoin}]", "Did you mean 'caption'"),
        ("encoder.model=mllm/none", "mllm/none"),
        ("connector.type=liner", "Did you mean 'linear'"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_one_message_and_leaves_no_model(recipe, tmp_path, override, message):
    with pytest.raises(MLLMError, match=message):
        mllm.train(recipe, [override], out=tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


def test_a_run_is_never_written_over(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("precious")
    with pytest.raises(MLLMError, match="not empty"):
        mllm.train(recipe, out=tmp_path / "run")
    assert (tmp_path / "run/mine.txt").read_text() == "precious"


def test_a_loss_that_is_no_number_stops_the_run(recipe, tmp_path):
    with pytest.raises(MLLMError, match="Lower the learning rate"):
        mllm.train(recipe, ["stages.0.train.connector=1e37", "optim.clip=null"], out=tmp_path / "run")


@pytest.fixture
def damaged(recipe, tmp_path):
    """The recipe on a copy of its pictures, two of which are cut short; a closed-form stage first."""
    source, folder = Path(recipe).parent, tmp_path / "damaged"
    shutil.copytree(source, folder)
    for name in ("4.png", "9.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    text = Path(recipe).read_text().replace(str(source), str(folder))
    fit = "  - {name: fit, fit: {part: connector}}\n  - {name: align"
    (folder / "recipe.yaml").write_text(text.replace("  - {name: align", fit))
    return folder / "recipe.yaml"


def test_what_cannot_be_read_is_left_out_and_named(damaged, tmp_path):
    run = mllm.train(str(damaged), {"data.skip": 0.07}, out=tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    named = {(row["stage"], Path(row["skipped"].split(" is not")[0]).name) for row in rows if "skipped" in row}
    assert named == {(stage, name) for stage in ("fit", "align") for name in ("4.png", "9.png")}
    assert len([row for row in rows if "skipped" in row]) == 4  # once each, however often they come up
    assert len(log(run)) == 10 and (run.path / "loss.png").is_file()
    # It is training on what is left: the rows of the two taken out, in the order of the others.
    kept = mllm.train(str(damaged), {"data.skip": 0.07}, out=tmp_path / "again")
    assert log(kept) == log(run)


def test_too_much_that_cannot_be_read_stops_the_run_with_the_list(damaged, tmp_path):
    with pytest.raises(MLLMError, match=r"(?s)2 of 32 samples could not be read.*data.skip=0.04.*4\.png.*9\.png"):
        mllm.train(str(damaged), {"data.skip": 0.04}, out=tmp_path / "run")
    train, val = damaged.with_name("train.json"), damaged.with_name("val.json")
    good = [row for row in json.loads(train.read_text()) if row["image"] not in ("4.png", "9.png")]
    train.write_text(json.dumps(good))
    val.write_text(json.dumps([{"image": "4.png", "caption": "red"}]))
    with pytest.raises(MLLMError, match=r"4\.png is not a readable image"):
        mllm.train(str(damaged), out=tmp_path / "val")
