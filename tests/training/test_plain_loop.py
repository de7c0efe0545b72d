"""The training loop does what a plain loop in torch does: weighted objectives, mean over targets, clipping, AdamW."""

from __future__ import annotations

import json

import pytest
import torch

import mllm
from mllm.config.loading import load
from mllm.data.sources import read_all
from mllm.data.stream import Stream
from mllm.prompts.batch import collate
from mllm.prompts.pieces import images_of
from mllm.testing import tiny_image

STEPS, BATCH = 4, 3


@pytest.fixture
def recipe(tmp_path, tiny_parts):
    """Return a function that writes a recipe with one stage, whose rows have answers of different lengths."""
    rows = []
    for index in range(8):
        tiny_image(index).save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": "red green blue white"[: 3 + 2 * index]})
    (tmp_path / "train.json").write_text(json.dumps(rows))

    def write(objectives: str, clip: object, accumulate: int = 1) -> str:
        (tmp_path / "recipe.yaml").write_text(f"""
name: plain
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{train: {{format: table, path: {tmp_path}/train.json}}}}
optim: {{schedule: constant, warmup: 0, clip: {clip}, weight_decay: 0.1, accumulate: {accumulate}}}
stages: [{{name: one, train: {{connector: 0.02}}, steps: {STEPS}, batch_size: {BATCH}, objectives: {objectives}}}]
""")
        return str(tmp_path / "recipe.yaml")

    return write


def by_hand(
    path: str, weights: list[float], start: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train the connector by torch alone: each loss is cross-entropy summed over targets, by their number.

    Return its weights and the norm of each step's gradients.
    """
    stage = load(path).stages[0]
    assert stage.encoder is not None and stage.encoder.model is not None and stage.lm is not None
    model = mllm.assemble(stage.encoder.model, stage.lm.model, {"type": "linear", "tokens": 4})
    model.load_state_dict(start, strict=False)
    parameters = list(model.connector.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]  # and no bias
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    stream = Stream(
        read_all(stage.data.train), stage.prompt, seed=stage.seed, lm=model.lm, num_visual=4, data=stage.data
    )
    norms = []
    for _ in range(STEPS):
        batches = [stream.take(BATCH) for _ in range(stage.optim.accumulate)]
        sums, count = torch.zeros(()), 0
        for rows in batches:
            batch = collate([model.encode(pieces) for pieces in rows], model.lm.pad)
            features = model.features([model.encoder.open(image) for pieces in rows for image in images_of(pieces)])
            embeds = model.lm.model.get_input_embeddings()(batch.ids)
            embeds = embeds.masked_scatter(batch.visual[..., None], model.connector(features))
            logits = model.lm.model(inputs_embeds=embeds, attention_mask=batch.mask).logits
            targets = batch.labels[:, 1:]
            sums = sums + torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            count += int((targets != -100).sum())
        (sum(weights) * sums / count).backward()
        norms.append(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None) ** 0.5)
        if stage.optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, stage.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in model.connector.state_dict().items()}, norms


@pytest.mark.parametrize(
    ("weights", "clip", "accumulate"),
    [([1.0], "null", 1), ([1.0], 0.05, 1), ([0.25], 1e9, 1), ([1.0, 0.5], 0.3, 1), ([0.0], 1.0, 1), ([1.0], 0.5, 2)],
)
def test_the_loop_is_a_plain_loop(recipe, tmp_path, weights, clip, accumulate):
    objectives = ", ".join(f"{{type: caption, weight: {weight}}}" for weight in weights)
    path = recipe(f"[{objectives}]", clip, accumulate)
    calibrated = mllm.train(path, ["stages.0.steps=1", "stages.0.train.connector=0"], out=tmp_path / "start")
    start = mllm.load(calibrated.path).trained_state()  # calibrated on the data, and not moved by a rate of zero
    run = mllm.train(path, out=tmp_path / "run").path
    trained = mllm.load(run).trained_state()
    expected, norms = by_hand(path, weights, start)
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[f"connector.{name}"], tensor, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(trained[name], start[name]) for name in trained)
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3, abs=1e-6)
