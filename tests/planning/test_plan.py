"""`mllm plan`: counts and FLOPs are those of the real model, memory those of its tensors, and nothing is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from mllm.build import build
from mllm.cli.plan import run
from mllm.config import loading as recipe
from mllm.errors import MLLMError
from mllm.objectives.build import objectives_of
from mllm.planning.advice import bytes_of, fitting
from mllm.planning.draft import Draft
from mllm.planning.plan import Setting, plan, plan_stage
from mllm.planning.probe import probe
from mllm.planning.table import notes
from mllm.planning.trace import Paper, cost
from mllm.planning.workload import workload
from mllm.testing import tiny_image
from mllm.training import setup


@pytest.fixture
def file(tmp_path: Path, tiny_parts: tuple[str, str]) -> str:
    for name in ("a", "b", "c"):
        tiny_image(ord(name)).save(tmp_path / f"{name}.png")
    rows = "a.png,noise\nb.png,a good deal more of it\nc.png,none\n"
    (tmp_path / "train.csv").write_text(f"image,caption\n{rows}")
    path = tmp_path / "small.yaml"
    path.write_text(f"""
name: small
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: mlp, tokens: 4}}
adapters: [{{type: bottleneck, reduction: 4}}]
data: {{train: {{format: table, path: {tmp_path}/train.csv}}}}
stages:
  - {{name: align, train: {{connector: 1.0e-3}}, steps: 6, batch_size: 4}}
  - {{name: tune, train: {{connector: 1.0e-3, adapters: 1.0e-3}}, steps: 2, batch_size: 4}}
""")
    return str(path)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("safetensors.safe_open", loaded)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", loaded)


def real(file: str, stage: int, overrides: list[str] | None = None) -> tuple[Any, Any, Any]:
    """Return the loaded model of a stage, the stage, and its batches."""
    config = recipe.load(file, overrides or [])
    own = config.stages[stage]
    model: Any = build(own.assembly)
    setup.parameter_groups(model, own)
    return model, own, workload(model, own, processes=1, images=None, text=None)


def test_parameters_are_those_of_the_model(file: str, nothing_is_loaded: None) -> None:
    planned = plan(file).stages
    assert [stage.name for stage in planned] == ["align", "tune"]
    sizes = {part.name: part for part in planned[1].parts}
    assert sizes["encoder"].trained == sizes["lm"].trained == 0
    assert sizes["connector"].trained == sizes["connector"].parameters
    assert sizes["adapters"].trained == sizes["adapters"].parameters > 0
    assert {part.trained for part in planned[0].parts if part.name == "adapters"} == {0}


def test_sizes_and_states_are_those_of_the_loaded_model(file: str) -> None:
    model, stage, _ = real(file, 1)
    planned = plan(file).stages[1]
    inside = sum(p.numel() for p in model.adapters.parameters())
    whole = {part.name: part.parameters for part in planned.parts}
    assert whole["lm"] == sum(p.numel() for p in model.lm.parameters())
    assert (whole["adapters"], whole["encoder"]) == (inside, sum(p.numel() for p in model.encoder.parameters()))
    optimizer = torch.optim.AdamW(setup.parameter_groups(model, stage))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert planned.memory.optimizer == sum(t.nbytes for t in states)
    assert planned.memory.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    length = model.connector.num_tokens + len(model.lm.tokenize(stage.prompt.question)) + 20
    cache, _ = model.lm.prefill(torch.randn(1, length, model.lm.dim), torch.ones(1, length, dtype=torch.long))
    assert planned.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("stage", [0, 1])
def test_flops_are_those_that_torch_counts_on_real_tensors(file: str, stage: int) -> None:
    model, own, load = real(file, stage)
    rows, objectives = load.typical, objectives_of(own.objectives)
    features = torch.randn(rows.images, model.encoder.num_patches, model.encoder.dim)
    model.train()
    torch.stack(model(rows.pieces, features, rows.batch, objectives))  # what is tried once is tried now
    with FlopCounterMode(display=False) as counter:
        torch.stack(model(rows.pieces, features, rows.batch, objectives)).sum().backward()
    with FlopCounterMode(display=False) as encoder, torch.no_grad():
        model.encoder(torch.zeros(1, *model.encoder.shape))
    planned = plan(file).stages[stage].flops
    # The counter does not know the attention of CPUs, which ours does: 4 forward, 10 backward, for each pair of
    # positions and channel.
    pairs = rows.batch.ids.numel() * rows.batch.ids.shape[1] * 32 * 2  # two layers of width 32
    assert planned.connector + planned.lm == counter.get_total_flops() + 14 * pairs
    vit = 2 * 4 * 17**2 * 24  # two layers, 16 patches and CLS, width 24
    assert planned.encoder == encoder.get_total_flops() + vit


def test_words_are_aligned_without_a_pass_through_the_language_model(file: str, nothing_is_loaded: None) -> None:
    overrides = [
        "connector={type: mlp, tokens: 4, vocabulary: true}",
        "stages.0.objectives=[{type: word-alignment, negatives: null}]",
    ]
    planned = plan(file, overrides).stages[0].flops
    words = 26 + 26 + 10 + 1  # letters and digits are the whole words of the tiny tokenizer, and the full stop
    assert planned.lm == 2 * 2 * (4 * 4) * words * 32  # cosines of 4 x 4 visual tokens of width 32, and their gradient


def test_flops_follow_from_the_shapes_of_a_linear_connector(file: str) -> None:
    planned = plan(file, ["connector={type: linear, tokens: 4}", "adapters=[]", "stages.1.train=[connector]"]).stages[0]
    forward = 2 * 4 * 4 * 24 * 32  # four pictures, four tokens each, from width 24 to 32
    assert planned.flops.connector == 2 * forward  # and the weight's gradient; features need none
    whole = planned.flops.encoder * planned.images + 6 * (planned.flops.connector + planned.flops.lm)
    assert planned.flops.total == whole and planned.images == 3


def test_a_computation_on_paper_peaks_where_its_tensors_do() -> None:
    paper = Paper()
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))
    paper.put(model)
    given = paper.empty(100, 64)
    with torch.no_grad():
        found = cost(lambda: model(given))
    assert found.flops == 2 * 100 * (64 * 256 + 256 * 8)
    assert found.peak == 4 * 100 * 2 * 256  # before and behind the tanh
    kept = cost(lambda: model(given).sum().backward())
    assert kept.flops == 2 * 100 * (2 * 64 * 256 + 3 * 256 * 8)  # the first map's input needs no gradient
    assert kept.peak > found.peak


def test_a_closed_form_takes_its_sums(file: str) -> None:
    planned = plan(file, ["stages=[{name: fit, fit: {part: connector}}]"]).stages[0]
    assert planned.memory.gradients == planned.memory.activations == planned.flops.lm == 0
    assert planned.flops.total == 3 * planned.flops.encoder


def test_recomputing_keeps_less_and_computes_more(file: str) -> None:
    plain, again = (plan(file, [f"optim.checkpointing={value}"], Setting("gpu")).stages[0] for value in (False, True))
    assert again.memory.activations < plain.memory.activations
    assert again.flops.lm > plain.flops.lm


def test_processes_divide_what_they_are_told_to(file: str) -> None:
    alone = plan(file).stages[1]
    ddp, fsdp = (plan(file, (), Setting("cpu", 2, how)).stages[1] for how in ("none", "fsdp"))
    assert [s.rows for s in (alone, ddp)] == [4, 2]
    assert ddp.memory.gradients == 2 * alone.memory.gradients  # the buckets
    config = recipe.load(file)
    lm = build(config.stages[1].assembly).lm
    layers = sum(p.numel() * p.element_size() for layer in lm.layers for p in layer.parameters())
    assert ddp.memory.weights == alone.memory.weights and fsdp.memory.weights == alone.memory.weights - layers // 2
    assert ddp.memory.optimizer == fsdp.memory.optimizer == alone.memory.optimizer
    with pytest.raises(MLLMError, match="batch_size is 4, and 8 processes"):
        plan(file, (), Setting(processes=8))


def test_the_cache_is_judged_by_what_it_saves(file: str) -> None:
    once = plan(file, ["stages.0.steps=1", "stages.0.batch_size=2"]).stages[0].cache
    assert not once.recommended and "is read once" in once.reason
    often = plan(file).stages[0]
    assert often.cache.bytes == 3 * 16 * 24 * 4
    work = 24 * often.flops.encoder + 6 * (often.flops.connector + often.flops.lm)
    assert often.cache.saves == pytest.approx(21 * often.flops.encoder / work)
    assert often.cache.recommended == (often.cache.saves >= 0.1)
    off = plan(file, ["cache='off'"]).stages[0]
    assert off.flops.total - often.flops.total == 21 * often.flops.encoder and off.memory.features == 0


def test_features_are_counted_as_they_are_stored_and_kept(file: str) -> None:
    row = 16 * 24 * 4  # bytes, of three images
    settings: tuple[list[str], ...] = ([], ["cache.dtype=bfloat16"], [f"cache.limit={row}"])
    whole, rounded, limited = (plan(file, overrides).stages[0] for overrides in settings)
    assert rounded.cache.bytes == rounded.cache.disk == whole.cache.bytes // 2 == row * 3 // 2
    assert (limited.cache.bytes, limited.cache.disk) == (3 * row, row)
    assert "only 33.3% of the features fit into the limit" in limited.cache.reason
    encoder = whole.flops.encoder  # 24 reads of three images: eight of the one that is kept, and 16 of the others
    assert limited.flops.total - whole.flops.total == (1 + 16 - 3) * encoder
    assert limited.cache.saves == pytest.approx(whole.cache.saves / 3)
    assert whole.memory.features == 3 * row
    many = plan(file, ["stages.0.steps=2000", "cache=on", "cache.memory=1MiB"], Setting(images=2000)).stages[0]
    assert many.memory.features == 2**20 < many.cache.disk


def test_features_are_not_in_the_memory_of_a_gpu(file: str) -> None:
    on, off = (plan(file, [f"cache={mode}"], Setting("gpu")).stages[0].memory for mode in ("on", "off"))
    assert on.features > off.features == 0 and on.peak == off.peak


def test_a_cache_that_does_not_fit_or_is_slower_is_not_recommended(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm.planning.feature_cache.WORTH", 0.01)
    often = ["stages.0.steps=1000", "cache=on"]
    assert plan(file, often).stages[0].cache.recommended
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=4000))
        full = plan(file, often).stages[0].cache
        assert not full.recommended and "it does not fit" in full.reason
        assert plan(file, [*often, "cache.dtype=bfloat16"]).stages[0].cache.recommended  # 2,304 bytes
    row, encoder = 16 * 24 * 4, plan(file, often).stages[0].flops.encoder
    for rate, pays in ((0.9e9, True), (1.1e9, False)):  # bytes a second; a disk is taken to read 1e9
        for memory, fits in (("1MiB", False), ("4MiB", True)):
            setting = Setting(flops=encoder / row * rate, utilisation=1.0, images=2000)
            planned = plan(file, ["stages.0.steps=2000", "cache=on", f"cache.memory={memory}"], setting).stages[0].cache
            assert planned.bytes == 2000 * row and planned.recommended == (pays or fits)
            assert ("1.1 GB/s is faster" in planned.reason) != planned.recommended


def test_time_follows_from_the_flops_and_the_images(file: str) -> None:
    """On a GPU images are prepared while it computes; on a CPU both take their time. Three images are read once."""
    for seconds, bound in ((1e-9, "device"), (9.0, "data")):
        gpu, cpu = (
            plan(file, (), Setting(device, 2, flops=1e9, utilisation=0.5, workers=3, image_seconds=seconds)).stages[0]
            for device in ("gpu", "cpu")
        )
        computing, data = gpu.flops.total / 1e9, 3 * seconds / (2 * 3)
        assert gpu.seconds == pytest.approx(max(computing, data)) and gpu.bound == bound
        assert cpu.seconds == pytest.approx(cpu.flops.total / 1e9 + data)
        assert gpu.time is not None and gpu.time.encoder == pytest.approx(3 * gpu.flops.encoder / 1e9)
    uncached = plan(file, ["cache='off'"], Setting("gpu", flops=1e15, workers=1, image_seconds=9)).stages[0]
    assert uncached.seconds == pytest.approx(24 * 9)  # six steps of four
    assert plan(file).stages[0].seconds is None


def test_text_is_as_long_as_that_of_the_data(file: str, tmp_path: Path, tiny_parts: tuple[str, str]) -> None:
    captions = ["w " * (1 + index) for index in range(100)]
    for index in range(100):
        shutil.copyfile(tmp_path / "a.png", tmp_path / f"{index}.png")
    rows = "".join(f"{index}.png,{caption.strip()}\n" for index, caption in enumerate(captions))
    (tmp_path / "train.csv").write_text(f"image,caption\n{rows}")
    one = ["stages.0.steps=25", "stages.1.steps=1"]  # an epoch
    planned = plan(file, one).stages[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_parts[1], trust_remote_code=False)
    prompt = recipe.load(file).stages[0].prompt.caption
    texts = [f"{prompt} {caption.strip()}" for caption in captions]
    lengths = sorted(len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in texts)  # and the end
    assert planned.text is not None and planned.text.mean == pytest.approx(sum(lengths) / 100)
    assert planned.text.most == lengths[98] and planned.assumed == ""  # 99 of 100 are no longer
    assert planned.length == lengths[-1] + 4  # the longest of all decides memory
    given = plan(file, one, Setting(text=40)).stages[0]
    assert (given.length, given.text) == (44, None)


def test_without_the_tokenizer_text_is_estimated_by_its_characters(file: str, tmp_path: Path) -> None:
    rows = "".join(f"a.png,{'x' * (40 * number)}\n" for number in (1, 2, 3, 4) * 3)
    (tmp_path / "train.csv").write_text(f"image,caption\n{rows}")
    config = recipe.load(file, ["stages.0.steps=3"])
    draft = Draft(config.stages[0], "gpu")
    draft.model.lm.text.tokenizer = None
    load = workload(draft.model, config.stages[0], processes=1, images=None, text=None)
    prompt = len(config.stages[0].prompt.caption)
    assert load.text is not None and load.text.mean == pytest.approx(100 / 4 + prompt / 4, abs=1.5)
    assert "4 characters a token" in load.assumed and "tokenizer" in load.assumed


def test_epochs_of_data_that_are_elsewhere_need_the_number_of_images(file: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").unlink()
    epochs = ["stages.0.steps=null", "stages.0.epochs=2"]
    with pytest.raises(MLLMError, match=r"align trains for 2 epochs.*--images"):
        plan(file, epochs)
    assert plan(file, epochs, Setting(images=10)).stages[0].steps == 5


def test_adapters_that_no_stage_has_trained_are_named_with_what_they_take(file: str) -> None:
    align, tune = plan(file).stages
    assert tune.idle is None and align.idle is not None
    without = plan(file, ["stages.0.adapters=[]"]).stages[0]
    assert (align.idle.types, align.idle.peak) == ("bottleneck", without.memory.peak)
    assert align.idle.flops == without.flops.total < align.flops.total
    (note,) = (note for note in notes(plan(file)) if "not trained" in note)
    assert note.startswith("align: holds the adapters bottleneck") and "first stage that trains them" in note
    kept = "stages.1.train={connector: 1.0e-3}"  # trained in the first stage, and held by the second
    assert [stage.idle for stage in plan(file, ["stages.0.train={adapters: 1.0e-3}", kept]).stages] == [None, None]


def test_what_is_not_here_is_assumed_and_said(file: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").unlink()
    planned = plan(file, (), Setting(text=40, images=5)).stages[0]
    assert (planned.length, planned.images, planned.examples) == (44, 5, 24)
    assert "40 tokens of text" in planned.assumed and "not on this machine" in planned.assumed


def test_a_probe_measures_the_shape_that_is_planned(file: str) -> None:
    measured, planned = probe(file, processes=2), plan(file, (), Setting(processes=2)).stages[1]
    assert (measured.stage, measured.rows, measured.gpu, measured.peak) == ("tune", planned.rows, False, None)
    assert planned.rows == 2 and measured.length <= planned.length
    draft = Draft(recipe.load(file).stages[1], "cpu")
    typical = workload(draft.model, draft.stage, processes=2, images=None, text=None).typical
    assert measured.flops * measured.seconds == pytest.approx(draft.step(typical).flops)
    assert measured.image_seconds is not None and 0 < measured.image_seconds < 1


PUBLISHED = {  # from the papers and model cards
    "encoder": 303_507_456 - 12_598_272,  # CLIP ViT-L/14 at 336 px without its last layer and norm, which are not used
    "lm": 6_738_415_616,
    "connector": 20_979_712,
}


def test_a_published_recipe_is_planned_offline(nothing_is_loaded: None) -> None:
    config = recipe.load("llava", ["adapters=[]", "lm.dtype=bfloat16"])
    setting = Setting("gpu", processes=8, text=40)
    draft = Draft(config.stages[0], "gpu")
    planned = plan_stage(draft, setting)
    assert {part.name: part.parameters for part in planned.parts} == PUBLISHED
    assert planned.tokens_per_image == 576
    # Two FLOPs for each weight and position forward, and as many for the gradient towards the connector.
    body = PUBLISHED["lm"] - 2 * 32_000 * 4096
    products = 4 * body * 256 * (576 + 40)
    assert planned.flops.lm == pytest.approx(products, rel=0.06)  # and attention, and the vocabulary at targets
    assert planned.cache.saves_later == pytest.approx(0.02, abs=0.005) and not planned.cache.recommended
    assert planned.memory.weights == 2 * PUBLISHED["lm"] + 4 * (PUBLISHED["encoder"] + PUBLISHED["connector"])


def test_what_does_not_fit_is_told_what_would(file: str) -> None:
    config = recipe.load(file, ["stages.0.batch_size=32"])
    stage, setting = config.stages[0], Setting("gpu")
    whole = plan_stage(Draft(stage, "gpu"), setting).memory.peak
    assert fitting(stage, 0, setting, whole) == []
    smaller = fitting(stage, 0, setting, whole - 50_000)
    assert smaller is not None and smaller[0].startswith("stages.0.batch_size=")
    changed = recipe.load(file, ["stages.0.batch_size=32", *smaller])
    own = changed.stages[0]
    assert own.batch_size * own.optim.accumulate == 32
    assert plan_stage(Draft(own, "gpu"), setting).memory.peak <= whole - 50_000


def test_where_memory_is_short_fewer_features_are_in_it(file: str) -> None:
    overrides, setting = ["stages.0.steps=1000000", "cache=on"], Setting(images=1_000_000)
    whole = plan(file, overrides, setting).stages[0].memory
    assert whole.features == 1_000_000 * 16 * 24 * 4
    changes = fitting(recipe.load(file, overrides).stages[0], 0, setting, whole.peak - 2**30)
    assert changes is not None and not any("batch_size" in change for change in changes)
    changed = recipe.load(file, [*overrides, *changes]).stages[0]
    assert changed.cache.mode == "on" and changed.cache.memory < 2**29
    assert plan_stage(Draft(changed, "cpu"), setting).memory.peak <= whole.peak - 2**30


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("24G", 24 * 2**30), ("1.5 gb", 1_500_000_000), ("7", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3G", "-4G", "24 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(MLLMError, match="expected a number and a unit"):
        bytes_of(text)


def test_the_command_prints_a_table_or_json(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"device": "cpu", "processes": 1, "sharding": "none", "flops": 1e9, "utilisation": 0.5}
    one = ["adapters=[]", "stages=[{name: align, train: [connector], steps: 2, batch_size: 1}]"]
    run(file, one, {**options, "images": None, "text": None}, memory="1KiB", probe=False, as_json=False)
    shown = capsys.readouterr().out
    assert "small on 1 CPU" in shown and "align: does not fit into 1 KiB" in shown
    run(file, one, {**options, "images": None, "text": None}, memory=None, probe=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["setting"]["utilisation"] == 1.0 and told["stages"][0]["seconds"] > 0
    assert told["measured"]["peak"] is None and not told["measured"]["gpu"]
    for name, value in (("device", "tpu"), ("sharding", "zero9")):
        with pytest.raises(MLLMError, match=f"--{name} {value}"):
            run(file, one, {**options, name: value}, memory=None, probe=False, as_json=False)
