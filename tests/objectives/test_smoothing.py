"""Label smoothing of captions: torch's own, on the logits of transformers' models and of BLIP-2's text decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import mllm
from mllm.objectives.caption import Caption
from mllm.objectives.qformer import ImageTextGeneration, tokens_of
from mllm.prompts.batch import IGNORED, collate
from mllm.prompts.pieces import Target
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.testing.lms import LM_FAMILIES, spread, tiny_tokenizer

ROWS = [[tiny_image(0), "A", Target(" red house")], [tiny_image(1), "A picture of", Target(" two")]]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "rwkv", "t5"])
@pytest.mark.parametrize("adapters", [[], [{"type": "prefix", "positions": 3}]])
def test_a_caption_is_smoothed_over_the_vocabulary(
    family: str, adapters: list[Any], tmp_path: Path, tiny_parts: tuple[str, str]
) -> None:
    if adapters and family != "llama":
        pytest.skip("one family is enough for what wraps a runner")
    model = mllm.assemble(tiny_parts[0], LM_FAMILIES[family](tmp_path), "linear", adapters=adapters)
    expected = torch.tensor(0.0)
    for row in ROWS:  # one by one, without padding
        batch = collate([model.encode(row)], model.lm.pad)
        visual = model.connector(model.features([row[0]]))
        embeds = model.embed(visual, batch)
        targets = batch.labels[0][batch.labels[0] != IGNORED]
        if family == "t5":
            start = model.lm.model.config.decoder_start_token_id
            before = int((batch.labels[0] != IGNORED).nonzero()[0])
            decoder_ids = torch.cat([torch.tensor([start]), targets[:-1]])[None]
            end = model.lm.embed(torch.tensor([[model.lm.tokenizer.eos_token_id]]))  # as T5 was trained
            read = torch.cat([embeds[:, :before], end], dim=1)
            logits = model.lm.model(inputs_embeds=read, decoder_input_ids=decoder_ids).logits[0]
        else:
            places = (batch.labels[0, 1:] != IGNORED).nonzero().squeeze(1)
            logits = model.lm.logits(embeds, batch.mask)[0, places]
        expected += cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=0.1)
    batch = collate([model.encode(row) for row in ROWS], model.lm.pad)
    features = model.features([row[0] for row in ROWS])
    (found,) = model(ROWS, features, batch, [Caption(smoothing=0.1)])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    (plain,) = model(ROWS, features, batch, [Caption()])
    assert abs(float(plain - found)) > 0.01


@torch.no_grad()
def test_itg_is_smoothed_as_in_lavis(tmp_path: Path, tiny_parts: tuple[str, str]) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    qformer = {
        "type": "qformer",
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "tokens": 5,
        "words": str(tmp_path),
        "norm": False,
    }
    model = mllm.assemble(tiny_parts[0], None, qformer)  # type: ignore[arg-type]
    spread(model.connector, 0.3)
    inputs = Inputs(model, ROWS, model.features([row[0] for row in ROWS]), None)
    ids, mask = tokens_of(inputs)
    given = ids.clone()
    given[:, 0] = model.connector.words.start
    _, states = model.connector.joint(inputs.features, given, mask, "generation")
    expected = torch.tensor(0.0)
    for logits, labels, inside in zip(model.connector.words.logits(states), ids, mask.bool(), strict=True):
        targets = labels[1:].masked_fill(~inside[1:], -100)
        expected += cross_entropy(logits[:-1], targets, label_smoothing=0.1)  # a caption's mean, as lm_head's loss
    torch.testing.assert_close(ImageTextGeneration(smoothing=0.1)(inputs), expected, atol=1e-4, rtol=1e-4)
    assert abs(float(ImageTextGeneration()(inputs) - expected)) > 0.01
