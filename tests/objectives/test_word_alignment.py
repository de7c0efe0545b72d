"""Visual tokens aligned with the words of captions: torch's cross-entropy over a table made by hand."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

import mllm
from mllm.errors import MLLMError
from mllm.hub.fingerprints import tensor_hash
from mllm.objectives.word_alignment import WordAlignment
from mllm.planning.check import problems
from mllm.prompts.pieces import Target
from mllm.registry import table
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.training.stages import carry_over

CAPTIONS = ["cab", "a", "fact"]
LETTERS = ".abcft"


def rows_of(captions: list[str]) -> list[list[Any]]:
    return [[tiny_image(seed), "A picture of", Target(f" {caption}")] for seed, caption in enumerate(captions)]


def inputs_of(model: Any, captions: list[str] = CAPTIONS) -> Inputs:
    rows = rows_of(captions)
    return Inputs(model, rows, model.features([row[0] for row in rows]), None)


def some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def assembled(tiny_parts: tuple[str, str], connector: str = "mapper", **options: Any) -> Any:
    small = {"tokens": 4, "dim": 16, "layers": 1, "heads": 2} if connector == "mapper" else {}
    return mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": connector, **small, **options})


def letters(model: Any, text: str) -> list[int]:
    ids: list[int] = model.lm.tokenizer.convert_tokens_to_ids(list(text))
    return ids


def logits_over(model: Any, tokens: torch.Tensor, words: str, temperature: float) -> torch.Tensor:
    """Cosines ``(B, Q, words)`` with the embeddings of letters, over the temperature."""
    embeddings = model.lm.model.get_input_embeddings().weight[letters(model, words)]
    return torch.stack([cosine_similarity(tokens, word, dim=-1) for word in embeddings], -1) / temperature


@pytest.mark.parametrize("words", [list("abcft"), list("abc"), "data"])
def test_token_q_is_the_qth_of_the_caption(tiny_parts, words):
    model = assembled(tiny_parts, vocabulary={"words": words, "temperature": 0.2})
    objective, inputs = WordAlignment(), inputs_of(model)
    objective.read_data(model, CAPTIONS)
    logits = logits_over(model, some(inputs.before_words), ".abc" if words == ["a", "b", "c"] else LETTERS, 0.2)
    known = LETTERS[: logits.shape[-1]]
    total = 0.0
    for row, target in zip(logits, ["cab.", "a...", "fact"], strict=True):
        places = [q for q, letter in enumerate(target) if letter in known]  # others are not in the table
        right = torch.tensor([known.index(target[q]) for q in places])
        total += cross_entropy(row[places], right, reduction="sum").item() / 4
    assert objective(inputs).item() == pytest.approx(total, rel=1e-5)
    assert objective.count(inputs.rows, None) == 3


def test_a_connector_without_a_vocabulary_has_a_fixed_temperature(tiny_parts):
    model = assembled(tiny_parts)
    objective, inputs = WordAlignment(temperature=0.3, negatives=None), inputs_of(model, ["cab."])
    alphabet = "".join(sorted({chr(n) for n in range(256) if chr(n).isascii() and chr(n).isalnum()} | {"."}))
    logits = logits_over(model, some(inputs.visual), alphabet, 0.3)[0]
    expected = cross_entropy(logits, torch.tensor([alphabet.index(letter) for letter in "cab."])).item()
    assert objective(inputs).item() == pytest.approx(expected, rel=1e-5)
    objective(inputs).backward()
    assert all(parameter.grad is not None for parameter in model.connector.parameters())


def test_a_set_is_assigned_to_the_tokens_that_are_closest(tiny_parts):
    """Tokens near the words of the caption in another order, and one near none: the loss is that of the right order."""
    model = assembled(tiny_parts, vocabulary={"words": list("abcft"), "temperature": 0.1})
    embeddings = model.lm.model.get_input_embeddings().weight
    orders = ["b.ac", "...a", "tcaf"]
    inputs = inputs_of(model)
    inputs.before_words = torch.stack([embeddings[letters(model, order)] for order in orders])
    inputs.before_words = inputs.before_words + 0.1 * torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    logits = logits_over(model, some(inputs.before_words), LETTERS, 0.1)
    targets = torch.tensor([[LETTERS.index(letter) for letter in order] for order in orders])
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item() / 4
    assert WordAlignment(order="set")(inputs).item() == pytest.approx(expected, rel=1e-5)
    assert WordAlignment(order="sequence")(inputs).item() > expected


def test_a_repeated_word_of_a_set_counts_once(tiny_parts):
    model = assembled(tiny_parts, vocabulary={"words": list("abcft")})
    one, other = (WordAlignment(order="set")(inputs_of(model, [caption])).item() for caption in ("abba", "ab"))
    assert one == other


@pytest.mark.parametrize("order", ["sequence", "set"])
def test_a_batch_is_the_sum_of_its_examples(tiny_parts, order):
    model, objective = assembled(tiny_parts, vocabulary=True), WordAlignment(order=order, negatives=None)
    whole = inputs_of(model)
    alone = [Inputs(model, [row], some(whole.features)[[index]], None) for index, row in enumerate(whole.rows)]
    assert objective(whole).item() == pytest.approx(sum(objective(one).item() for one in alone), rel=1e-5)
    assert objective.per_example and not WordAlignment(negatives=8).per_example


def test_a_caption_belongs_to_the_last_image_before_it(tiny_parts):
    """Examples with images before it are not trained on, and text alone costs nothing."""
    model, objective = assembled(tiny_parts, vocabulary=True), WordAlignment(negatives=None)
    images = [tiny_image(seed) for seed in range(3)]
    example = [images[0], "A picture of a bat\n", images[1], "A picture of", Target(" cab")]
    rows: list[list[Any]] = [[Target(" text")], example, [images[2], "A picture of", Target(" fact")]]
    inputs = Inputs(model, rows, model.features(images), None)
    plain: list[list[Any]] = [[images[1], Target(" cab")], [images[2], Target(" fact")]]
    expected = objective(Inputs(model, plain, model.features(images[1:]), None)).item()
    assert objective(inputs).item() == pytest.approx(expected, rel=1e-5) and objective.count(rows, None) == 2
    alone = objective(Inputs(model, rows[:1], None, None))
    alone.backward()
    assert alone.item() == 0 and objective.count(rows[:1], None) == 0


@pytest.mark.parametrize("connector", sorted(table("connectors")))
@pytest.mark.parametrize("order", ["sequence", "set"])
def test_every_connector_learns_and_the_frozen_parts_do_not(tiny_parts, connector, order):
    options = (
        {"frames": 1} if connector == "temporal" else import_module("mllm.eval.bench.matrix").OPTIONS.get(connector, {})
    )
    whole = {"type": connector, **options, "vocabulary": True}
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], whole)
    model.train()
    WordAlignment(order=order, negatives=16)(inputs_of(model)).backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"connector"}
    assert model.connector.vocabulary.log_scale.grad is not None


def test_captions_and_words_can_be_learned_together(tiny_parts):
    """The language model reads expected words of the same visual tokens that are aligned."""
    model = assembled(tiny_parts, dropout=0.5, vocabulary=True).train()
    inputs = inputs_of(model)
    torch.testing.assert_close(inputs.visual, model.connector.vocabulary(inputs.before_words))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"order": "random"}, "sequence or set"), ({"negatives": 0}, "1 or more")],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(MLLMError, match=message):
        WordAlignment(**options)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_parts) -> Path:
    folder = tmp_path_factory.mktemp("words")
    rows = []
    for index in range(12):
        image = tiny_image(index)
        image.paste([(220, 30, 30), (30, 200, 40), (40, 60, 220)][index % 3], (0, 0, 40, 32))
        image.save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": ["red", "dark", "blue!"][index % 3]})
    (folder / "train.json").write_text(json.dumps(rows))
    path = folder / "words.yaml"
    path.write_text(f"""
name: words
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: mapper, tokens: 5, dim: 16, layers: 1, heads: 2, ffn: 32, dropout: 0.1, vocabulary: true}}
data:
  train: {{format: table, path: {folder}/train.json}}
  val: {{format: table, path: {folder}/train.json}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - name: words
    train: {{connector: 0.02}}
    objectives: [{{type: word-alignment, negatives: 20}}]
    steps: 60
    batch_size: 6
    validate_every: 30
    checkpoint_every: 10
""")
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return mllm.train(str(recipe), out=tmp_path_factory.mktemp("run") / "run")


def log(path: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def test_images_are_named_after_training(recipe, run, tiny_parts):
    assert problems(str(recipe)) == []
    model, bare = mllm.load(run.path), mllm.assemble(*tiny_parts)
    losses = log(run.path, "val_loss")
    assert losses[-1] < losses[0]
    assert ["".join(words) for words in model.words([recipe.parent / f"{i}.png" for i in range(3)])] == [
        "red..",
        "dark.",
        "blue!",
    ]
    assert tensor_hash(model.lm) == tensor_hash(bare.lm) and tensor_hash(model.encoder) == tensor_hash(bare.encoder)
    assert model.connector.vocabulary.log_scale.item() != pytest.approx(torch.tensor(20.0).log().item(), abs=1e-3)


def test_a_killed_run_continues_bit_for_bit(recipe, run, start, tmp_path):
    killed = start("train", recipe, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.safetensors").exists():
        assert killed.running()
    killed.kill()
    mllm.train(str(recipe), resume=tmp_path / "run")
    one, other = mllm.load(run.path).trained_state(), mllm.load(tmp_path / "run").trained_state()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_several_processes_have_the_losses_of_one(recipe, start, tmp_path):
    override = "stages.0.objectives=[{type: word-alignment, negatives: null}]"
    options = (override, "stages.0.steps=4", "connector.dropout=0")
    alone = mllm.train(str(recipe), list(options), out=tmp_path / "one")
    start("train", recipe, *options, "--out", tmp_path / "two", count=2).finish()
    assert log(tmp_path / "two", "loss") == pytest.approx(log(alone.path, "loss"), rel=1e-4)


def test_a_vocabulary_may_come_or_go_between_stages(tiny_parts):
    plain, model = assembled(tiny_parts), assembled(tiny_parts, vocabulary=True)
    plain.calibrated = True
    with_words = carry_over(plain, model.spec)
    assert with_words.calibrated  # its output is not scaled once more
    for name, tensor in plain.trained_state().items():
        assert torch.equal(with_words.trained_state()[name], tensor)
    without = carry_over(with_words, plain.spec)
    assert without.trained_state().keys() == plain.trained_state().keys() and without.calibrated
