"""Stages: any part may train, parts may change from one to the next, and what was trained goes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mllm
import mllm.config.loading
from mllm.config.parts import AssemblySpec
from mllm.data.sources import read_all
from mllm.data.stream import Stream
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.hub.fingerprints import tensor_hash
from mllm.objectives.caption import Caption
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target
from mllm.slots import Inputs
from mllm.testing import tiny_image, tiny_lm
from mllm.training.setup import parameter_groups
from mllm.training.stages import carry_over
from mllm.training.validation import validate

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_parts) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    rows = []
    for index in range(16):
        name, colour = list(COLOURS.items())[index % 4]
        picture = tiny_image(index)
        picture.paste(colour, (0, 0, 40, 28))
        picture.save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": name})
    rows.append({"caption": "text alone"})
    (folder / "train.json").write_text(json.dumps(rows[:16]))
    path = folder / "base.yaml"
    path.write_text(f"""
name: stages
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data:
  train: {{format: table, path: {folder}/train.json}}
  val: {{format: table, path: {folder}/train.json}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - {{name: one, train: {{connector: 0.01}}, steps: 4, batch_size: 8}}
""")
    return path


def log(run: Any, key: str) -> list[Any]:
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def stages(*texts: str) -> str:
    return f"stages=[{', '.join(texts)}]"


def test_an_encoder_that_trains_is_saved_and_nothing_stale_is_found(base, tiny_parts, tmp_path):
    one = "{name: one, train: {encoder: 0.001, connector: 0.01}, steps: 3, batch_size: 8}"
    two = "{name: two, train: {connector: 0.01}, steps: 2, batch_size: 8}"
    run = mllm.train(str(base), [stages(one, two)], out=tmp_path / "run")
    bare, model = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4}), mllm.load(run.path)
    assert tensor_hash(model.encoder) != tensor_hash(bare.encoder)
    assert tensor_hash(model.lm) == tensor_hash(bare.lm)
    assert features_folder(model) != features_folder(bare)
    frozen = json.loads((run.path / "frozen.json").read_text())
    assert set(frozen["one"]["before"]) == {"lm"} and set(frozen["two"]["before"]) == {"encoder", "lm"}
    saved = load_file(next((run.path / "model").glob("trained-*")))
    assert {name.split(".")[0] for name in saved} == {"encoder", "connector"}
    again = mllm.load(model.save(tmp_path / "again"))
    assert torch.equal(again.features([tiny_image()]), model.features([tiny_image()]))


def test_a_part_inside_the_language_model_trains_alone(base, tmp_path):
    run = mllm.train(
        str(base),
        [stages("{name: one, train: {connector: 0.01, lm.model.model.layers.1.mlp: 0.001}, steps: 2}")],
        out=tmp_path / "run",
    )
    names = {name for name in mllm.load(run.path).trained_state() if name.startswith("lm.")}
    assert names and all(name.startswith("lm.model.model.layers.1.mlp.") for name in names)


def test_an_adapter_that_a_later_stage_adds_stands_beside_what_was_trained(base, tmp_path):
    one = "{name: one, train: {connector: 0.01}, steps: 3, batch_size: 8}"
    two = "{name: two, adapters: [{type: lora, r: 2}], prompt: {caption: It is}, train: {adapters: 0.01}, steps: 2}"
    whole = mllm.load(mllm.train(str(base), [stages(one, two)], out=tmp_path / "whole").path)
    first = mllm.load(mllm.train(str(base), [stages(one)], out=tmp_path / "first").path)
    assert tensor_hash(whole.connector) == tensor_hash(first.connector)
    assert len(whole.adapters) == 1 and not first.adapters
    assert whole.spec.prompt.caption == "It is"


def test_parts_of_another_run_are_taken_and_held_against_their_own_parts(base, tmp_path):
    run = mllm.train(str(base), out=tmp_path / "run")
    start = {"init": {"from": str(run.path), "parts": ["connector"]}}
    one = mllm.train(
        str(base), {**start, "stages.0.steps": 1, "stages.0.train": {"connector": 1e-9}}, out=tmp_path / "a"
    )
    torch.testing.assert_close(mllm.load(one.path).trained_state(), mllm.load(run.path).trained_state())
    other = tiny_lm(tmp_path / "other", seed=5)
    for overrides, message in (
        ({**start, "lm.model": other}, "was trained on another lm"),
        ({"init": {"from": str(run.path), "parts": ["conector"]}}, "'conector'.*Did you mean 'connector'"),
    ):
        with pytest.raises(MLLMError, match=message):
            mllm.train(str(base), overrides, out=tmp_path / "bad")
        assert not (tmp_path / "bad/model").exists()
        for path in (tmp_path / "bad").iterdir():
            path.unlink()


def test_the_best_is_kept_and_patience_ends_a_stage(base, tmp_path):
    """Validated on pictures with each other's captions: what is learnt first helps there, what comes later does not."""
    rows = json.loads((base.parent / "train.json").read_text())
    wrong = [{**row, "caption": rows[place - 1]["caption"]} for place, row in enumerate(rows)]
    (base.parent / "wrong.json").write_text(json.dumps(wrong))
    settings = "steps: 200, batch_size: 8, validate_every: 1, keep: best, patience: 3"
    one = f"{{name: one, train: {{lm.model.model.layers: 0.01, connector: 0.01}}, {settings}}}"
    run = mllm.train(str(base), [stages(one), f"data.val.path={base.parent}/wrong.json"], out=tmp_path / "run")
    losses = log(run, "val_loss")
    assert 4 < len(losses) < 200 and len(losses) - 1 - losses.index(min(losses)) == 3
    model, config = mllm.load(run.path), mllm.config.loading.load(str(run.path / "recipe.yaml")).stages[0]
    shown = Stream(read_all(config.data.val), config.prompt, seed=0, lm=model.lm).take(16)
    found = validate(model, shown, FeatureStore(model), [Caption()], [1.0])
    assert found == pytest.approx(min(losses), rel=1e-5)
    with pytest.raises(MLLMError, match=r"give validate_every and data\.val"):
        mllm.train(str(base), ["stages.0.keep=best"], out=tmp_path / "none")


def test_answers_and_suites_are_logged_while_training(base, tmp_path):
    run = mllm.train(str(base), {"eval.every": 2, "eval.show": 2, "decoding.max_new_tokens": 3}, out=tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "answer" in row] == [2, 2, 4, 4]
    silent = mllm.train(str(base), out=tmp_path / "silent")
    assert log(run, "loss") == log(silent, "loss")  # looking changes nothing


def test_a_suite_of_ones_own_is_run_while_training(base, tmp_path):
    suite = tmp_path / "mine.yaml"
    data = f"{{format: table, path: {base.parent}/train.json}}"
    suite.write_text(f"name: mine\nabout: of its own\ndata: {data}\nmetrics: [caption/rouge-l]\n")
    options = {"eval.every": 2, "eval.suites": [str(suite)], "eval.limit": 2, "eval.show": 0}
    run = mllm.train(str(base), {**options, "decoding.max_new_tokens": 3}, out=tmp_path / "run")
    assert log(run, "suite") == ["mine/caption/rouge-l"] * 2
    assert sorted(path.parent.name for path in run.path.glob("eval/*/mine/report.html")) == ["mine"] * 2
    assert not (tmp_path / "report.html").exists() and not suite.with_suffix("").exists()


def test_losses_go_to_a_tracker_and_one_that_is_not_installed_is_named(base, tmp_path):
    with pytest.raises(MLLMError, match="track: wandb cannot be imported"):
        mllm.train(str(base), {"track": ["wandb"]}, out=tmp_path / "none")
    pytest.importorskip("tensorboard", reason="the extra 'track' is not installed")
    run = mllm.train(str(base), {"track": ["tensorboard"]}, out=tmp_path / "run")
    assert any((run.path / "one").iterdir())


def test_recomputed_activations_give_the_same_losses(base, tmp_path):
    kept = mllm.train(str(base), out=tmp_path / "kept")
    again = mllm.train(str(base), {"optim.checkpointing": True}, out=tmp_path / "again")
    assert log(again, "loss") == pytest.approx(log(kept, "loss"), rel=1e-6)


def test_a_connector_that_a_stage_does_not_train_is_left_as_it_is(base, tmp_path):
    recipe = tmp_path / "heads.yaml"
    recipe.write_text(
        f"extends: {base}\nheads: [{{type: retrieval, dim: 6}}]\ntokens: ['[RET]']\nstages: [{{name: one, steps: 2, "
        "batch_size: 8, train: {heads: 0.01}, objectives: [{type: retrieval}]}]\n"
    )
    run = mllm.train(str(recipe), out=tmp_path / "run")
    frozen = json.loads((run.path / "frozen.json").read_text())["one"]
    assert "connector" in frozen["before"] and frozen["before"] == frozen["after"]


def test_new_tokens_stand_beside_tables_that_stay(tiny_parts, tmp_path):
    bare = mllm.assemble(*tiny_parts)
    model = mllm.assemble(*tiny_parts, tokens=["[RET]", "[IMG]"])
    vocabulary = bare.lm.model.get_input_embeddings().weight.shape[0]
    assert model.lm.new_tokens == {"[RET]": vocabulary, "[IMG]": vocabulary + 1}
    batch = collate([bare.encode(["Some words"])], bare.lm.pad)
    logits = model.logits(None, batch)
    assert logits.shape[-1] == vocabulary + 2
    assert torch.equal(logits[..., :vocabulary], bare.logits(None, batch))
    with model.adapters_off():
        assert torch.equal(model.logits(None, batch), bare.logits(None, batch))
    assert model.lm.tokenize("a[RET]", control=True) == [*bare.lm.tokenize("a"), vocabulary]
    assert model.lm.tokenize("a[RET]") == bare.lm.tokenize("a[RET]")  # a user's words are words
    ids = torch.tensor([[vocabulary, 5]])
    assert torch.equal(model.lm.embed(ids)[0, 0], model.tokens.rows[0])
    again = mllm.load(model.save(tmp_path / "saved"))
    assert torch.equal(again.logits(None, batch), logits)


def test_tokens_of_a_head_are_added_once_to_the_model_of_the_next_stage(tiny_parts):
    model = mllm.assemble(
        tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4}, heads=[{"type": "retrieval", "dim": 6}]
    )
    batch = collate([model.encode(["Some words"])], model.lm.pad)
    expected = model.logits(None, batch)
    spec = AssemblySpec.model_validate({**model.spec.model_dump(), "adapters": [{"type": "lora", "r": 2}]})
    new = carry_over(model, spec)
    assert len(new.adapters) == 1 and torch.equal(new.tokens.rows, model.tokens.rows)
    assert torch.equal(new.logits(None, batch), expected)  # a new LoRA changes nothing yet


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_rows_train(tied, tiny_parts, tmp_path):
    folder = tiny_parts[1]
    if not tied:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        lm = AutoModelForCausalLM.from_pretrained(folder)
        lm.config.tie_word_embeddings = False
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone() + 0.1)
        lm.save_pretrained(tmp_path / "untied")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "untied")
        folder = str(tmp_path / "untied")
    model = mllm.assemble(tiny_parts[0], folder, tokens=["[RET]"])
    tables = model.lm.model
    tied = tables.get_input_embeddings().weight.data_ptr() == tables.get_output_embeddings().weight.data_ptr()
    assert (model.tokens.scores is None) == tied
    stage = mllm.config.loading.check(
        {"name": "x", "stages": [{"name": "s", "train": {"tokens": 0.1}, "steps": 1}]}, "x"
    ).stages[0]
    (group,) = parameter_groups(model, stage)
    rows = [["Say ", Target(" it [RET]")]]
    encoded = model.encode(rows[0])
    encoded.ids[-2:-1] = [model.lm.new_tokens["[RET]"]]
    encoded.labels[-2:-1] = [model.lm.new_tokens["[RET]"]]
    Caption()(Inputs(model, rows, None, collate([encoded], model.lm.pad))).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in group["params"])
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("tokens."))
