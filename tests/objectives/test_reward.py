"""Rewards of sampled answers: the policy gradient against its formula, the rewards against their sources, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from transformers import AutoModelForCausalLM

import mllm
from mllm import registry
from mllm.build import guides_of
from mllm.config.base import PartSpec
from mllm.errors import MLLMError
from mllm.guides.contracts import Samples
from mllm.objectives.reward import RewardLoss, advantages
from mllm.planning.check import problems
from mllm.planning.plan import plan
from mllm.prompts.pieces import Target
from mllm.rewards.closeness import Closeness
from mllm.rewards.fluency import Fluency
from mllm.rewards.metric import MetricReward
from mllm.rewards.repetition import Repetition
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.training.batches import inputs
from mllm.training.loop import Loop

ROWS: list[list[Any]] = [
    [tiny_image(0), "A picture of", Target(" a cat")],
    [tiny_image(1), tiny_image(2), "Two of", Target(" two red birds")],
]
LENGTHS = [{"type": "letters"}]
RECIPE = """
name: rewarded
encoder: {{model: {encoder}}}
lm: {{model: {lm}}}
connector: {{type: linear, tokens: 1, dropout: 0.1}}
guides: {{judge: {{type: dual-encoder, model: {clip}}}}}
data:
  train: {{format: table, path: {data}/train.csv, unlabeled: true}}
  val: {{format: table, path: {data}/train.csv, unlabeled: true, fraction: 0.3}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - name: reward
    train: {{connector: 0.01}}
    objectives:
      - {{type: reward, samples: 2, length: 4, kl: 0.1, of: [{{type: closeness}}, {{type: fluency, weight: 0.1}}]}}
    steps: 4
    batch_size: 2
    checkpoint_every: 2
    validate_every: 2
"""


def letters(text: str) -> float:
    return float(sum(map(ord, text)) % 7)


class Letters:
    """The reward of a test: a number that depends on each letter."""

    per_example = True
    reads_no_answer = True

    def __call__(self, samples: Samples) -> torch.Tensor:
        return torch.tensor([letters(text) for text in samples.texts])


class NoNumber(Letters):
    def __call__(self, samples: Samples) -> torch.Tensor:
        return super().__call__(samples) * torch.nan


@pytest.fixture(autouse=True)
def _rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"letters": f"{__name__}:Letters", "no-number": f"{__name__}:NoNumber"}
    monkeypatch.setitem(registry.table("rewards"), "letters", own["letters"])
    monkeypatch.setitem(registry.table("rewards"), "no-number", own["no-number"])


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    made = tiny_model({"type": "linear", "tokens": 4}, seed=1)
    made.requires_grad_(False)
    made.connector.requires_grad_(True)
    return made


def loss_of(model: Any, objective: RewardLoss, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    rows, features, batch = inputs(model, ROWS, model.features)
    return objective(Inputs(model, rows, features, batch))


@pytest.mark.parametrize("baseline", ["leave-one-out", "mean"])
def test_the_gradient_is_that_of_rewards_times_log_likelihoods(model: Any, baseline: Any) -> None:
    """By hand: for each prompt and each sample, stock logits of prompt and answer, and the answer's log-likelihood."""
    objective = RewardLoss(of=LENGTHS, samples=3, length=5, baseline=baseline)
    caught: list[list[int]] = []
    sampled = objective._sampled

    def catching(*arguments: Any) -> list[list[int]]:
        caught.extend(sampled(*arguments))
        return caught

    objective._sampled = catching  # type: ignore[assignment,method-assign]
    loss = loss_of(model, objective)
    loss.backward()
    gradient = model.connector.project.weight.grad.clone()
    model.connector.zero_grad()
    rewards = torch.tensor([letters(model.lm.decode(ids).strip()) for ids in caught]).view(2, 3)
    expected = torch.tensor(0.0)
    for row, prompt in enumerate(ROWS):
        for k in range(3):
            others = [rewards[row, j] for j in range(3) if baseline == "mean" or j != k]
            ids = torch.tensor(caught[3 * row + k])
            visual = model.connector(model.features([piece for piece in prompt if not isinstance(piece, str | Target)]))
            text = model.lm.embed(torch.tensor(model.lm.tokenize(prompt[-2])))
            whole = torch.cat([visual.flatten(0, 1), text, model.lm.embed(ids)])[None]
            logits = model.lm.model(inputs_embeds=whole).logits[0, -len(ids) - 1 : -1]
            likelihood = -cross_entropy(logits, ids, reduction="sum")
            expected = expected - (rewards[row, k] - sum(others) / len(others)) * likelihood / 3
    expected.backward()
    torch.testing.assert_close(gradient, model.connector.project.weight.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(loss.detach(), -rewards.mean(1).sum())
    assert gradient.abs().max() > 0 and len({tuple(ids) for ids in caught}) > 2


def test_samples_are_those_of_generate_with_the_generators_seeds(model: Any) -> None:
    objective, texts = RewardLoss(of=LENGTHS, samples=2, length=6), list[str]()

    class Noting(Letters):
        def __call__(self, samples: Samples) -> torch.Tensor:
            texts.extend(samples.texts)
            return super().__call__(samples)

    objective.rewards = [("letters", 1.0, Noting())]
    with torch.no_grad():
        loss_of(model, objective)
    torch.manual_seed(0)
    seeds = [int(torch.randint(2**62, ())) for _ in range(4)]
    prompts = [row[:-1] for row in ROWS for _ in range(2)]
    expected = [
        str(model.generate([prompt], temperature=1.0, seed=seed, max_new_tokens=6)[0])
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert texts == expected and len(set(texts)) > 2


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert advantages(rewards, "mean").tolist() == [[-2.0, -1.0, 3.0]]
    assert advantages(rewards, "leave-one-out").tolist() == [[-3.0, -1.5, 4.5]]


def test_the_divergence_is_that_of_stock_logits(model: Any, tiny_parts: tuple[str, str]) -> None:
    objective, ids = RewardLoss(of=LENGTHS, samples=2, length=3, kl=0.5), [[65, 66, 67], [70, 71, 72]] * 2
    objective._sampled = lambda *_: ids  # type: ignore[method-assign]
    with torch.no_grad():
        loss = loss_of(model, objective)
        base = AutoModelForCausalLM.from_pretrained(tiny_parts[1])
        expected = -torch.tensor([letters(model.lm.decode(each).strip()) for each in ids[:2]]).sum()
        for number, answer in enumerate(ids):
            prompt = ROWS[number // 2]
            prefix = model.lm.tokenize(prompt[-2])
            q = base(torch.tensor([prefix + answer])).logits[0, len(prefix) - 1 : -1].log_softmax(-1)
            visual = model.connector(model.features([piece for piece in prompt if not isinstance(piece, str | Target)]))
            whole = torch.cat([visual.flatten(0, 1), model.lm.embed(torch.tensor(prefix + answer))])[None]
            p = base(inputs_embeds=whole).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            expected += 0.5 / 2 * kl_div(q, p, reduction="sum", log_target=True) / len(answer)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_each_reward_has_its_sources_value(model: Any, tiny_clip: str, tiny_parts: tuple[str, str]) -> None:
    guides = {"judge": PartSpec.model_validate({"type": "dual-encoder", "model": tiny_clip})}
    model.guides = guides_of(None, guides)
    texts, prompts = ["a cat", "a cat cat", "two birds"], [ROWS[0][:-1], ROWS[0][:-1], ROWS[1][:-1]]
    samples = Samples(model, texts, prompts, [["a cat"], ["a cat"], ["two red birds"]])
    clip = guides_of(None, guides).open("judge")
    images = clip.embed_images([tiny_image(0), tiny_image(0), tiny_image(2)])  # the last one of a prompt
    torch.testing.assert_close(Closeness()(samples), cosine_similarity(images, clip.embed_texts(texts)))
    base = AutoModelForCausalLM.from_pretrained(tiny_parts[1])
    expected = []
    for text, prompt in zip(texts, prompts, strict=True):
        prefix, answer = model.lm.tokenize(prompt[-1]), model.lm.tokenize(f" {text}")
        with torch.no_grad():
            logits = base(torch.tensor([prefix + answer])).logits[0, len(prefix) - 1 : -1]
        expected.append(-cross_entropy(logits, torch.tensor(answer)))
    torch.testing.assert_close(Fluency()(samples), torch.stack(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(Repetition()(samples), torch.tensor([0.0, 1 / 3, 0.0]))
    assert MetricReward(name="vqa/exact-match")(samples).tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(MLLMError, match="needs images and scorer"):
        MetricReward(name="caption/clipscore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_parts: tuple[str, str], tiny_clip: str) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    for number in range(8):
        tiny_image(number).save(folder / f"{number}.png")
    (folder / "train.csv").write_text("image,caption\n" + "".join(f"{n}.png,noise {n}\n" for n in range(8)))
    recipe = RECIPE.format(encoder=tiny_parts[0], lm=tiny_parts[1], clip=tiny_clip, data=folder)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


class Killed(BaseException):
    """The end of a process, which nothing handles."""


def test_a_killed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, log = str(folder / "recipe.yaml"), Loop._log
    assert problems(recipe) == []
    (stage,) = plan(recipe).stages
    assert stage.flops.lm > 0
    whole = mllm.train(recipe, out=tmp_path / "whole")

    def stopping(self: Loop, step: int, *rest: Any) -> None:
        log(self, step, *rest)
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Loop, "_log", stopping)
        mllm.train(recipe, out=tmp_path / "run")
    resumed = mllm.train(recipe, resume=tmp_path / "run")
    one, two = (mllm.load(run.path).trained_state() for run in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [
        [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()] for run in (whole, resumed)
    ]
    assert logs[0] == logs[1] and any("val_loss" in row for row in logs[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "samples=1; expected a number of at least 2"),
        ({"of": []}, "has no rewards"),
        ({"of": ["closeness"]}, "expected a mapping"),
        ({"of": [{"type": "close"}]}, "No part called 'close' in mllm.rewards"),
        ({"of": [{"type": "closeness", "guide": "jugde"}]}, "No guide is called 'jugde'"),
        ({"of": [{"type": "closeness", "weight": "high"}]}, "has the weight 'high'"),
        ({"of": [{"type": "metric", "name": "vqa/exact-match"}]}, "unlabeled: true, and the objective 'reward' learns"),
        ({"baseline": "median"}, "expected leave-one-out or mean"),
        ({"of": [{"type": "no-number"}]}, "The reward no-number of the answer"),
    ],
)
def test_what_is_wrong_is_said_before_anything_trains(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    objective = {"type": "reward", "samples": 2, "length": 3, "of": [{"type": "closeness"}], **changes}
    overrides = {"stages.0.objectives": [objective]}
    if "nan" not in message and "no-number" not in str(changes):
        found = problems(str(folder / "recipe.yaml"), overrides)
        assert [problem for problem in found if message in problem], found
    with pytest.raises(MLLMError) as raised:
        mllm.train(str(folder / "recipe.yaml"), overrides, out=tmp_path / "run")
    assert message in str(raised.value)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
