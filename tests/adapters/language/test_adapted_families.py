"""Each adapter in each family of language models: off it is not there, on it trains alone, and a batch is its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import mllm
from mllm.errors import MLLMError
from mllm.objectives.caption import Caption
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target, images_of
from mllm.slots import Inputs
from mllm.testing import LM_FAMILIES, tiny_image

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 2},
    "serial": {"type": "bottleneck"},
    "scaled-parallel": {"type": "bottleneck", "after": ["mlp", "attention"], "mode": "parallel", "scale": 4.0},
    "prompt": {"type": "prompt", "positions": 3},
    "prefix": {"type": "prefix", "positions": 3},
    "gated": {"type": "gated", "every": 1, "heads": 2, "head_dim": 8},
}
NO_HALVES = {"t5", "mt5", "umt5", "mamba"}  # their layers are lists of halves, or have none
NO_STATES = {"t5", "mt5", "umt5", "bart", "mamba", "rwkv", "mpt", "mistral", "gemma2", "gemma3"}  # or sliding windows
ENCODED = {"t5", "mt5", "umt5", "bart"}
REFUSED = {
    "serial": NO_HALVES,
    "scaled-parallel": NO_HALVES,
    "prefix": NO_STATES,
    "lora": {"mamba"},
    "gated": ENCODED,
}
PROMPTS: list[list[Any]] = [[tiny_image(1), "A cat.", tiny_image(2), "What?"], ["Short ", tiny_image(3)]]


@pytest.fixture(scope="module", params=LM_FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return request.param, LM_FAMILIES[request.param](folder)


@pytest.fixture(scope="module")
def bare(family: tuple[str, str], tiny_parts: tuple[str, str]) -> Any:
    return losses(assembled(tiny_parts[0], family[1]), PROMPTS).detach()


def assembled(encoder: str, lm: str, *adapters: dict[str, Any]) -> Any:
    return mllm.assemble(encoder, lm, {"type": "linear", "tokens": 4}, adapters=adapters)


def losses(model: Any, prompts: list[list[Any]]) -> Any:
    rows = [[*prompt, Target(" so it is")] for prompt in prompts]
    batch = collate([model.encode(row) for row in rows], model.lm.pad)
    return Caption()(Inputs(model, rows, model.features([image for row in rows for image in images_of(row)]), batch))


def shake(model: Any) -> None:
    """Move the adapters far from their start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter(kind, family, bare, tiny_parts):
    name, folder = family
    if name in REFUSED.get(kind, ()):
        with pytest.raises(MLLMError, match=r"^adapters: "):
            assembled(tiny_parts[0], folder, ADAPTERS[kind])
        return
    model = assembled(tiny_parts[0], folder, ADAPTERS[kind])
    shake(model)
    with model.adapters_off():
        assert torch.equal(losses(model, PROMPTS), bare)
    model.requires_grad_(False)
    model.adapters.requires_grad_(True)
    together = losses(model, PROMPTS)
    together.backward()
    assert abs(float(together.detach() - bare)) > 1e-3
    assert {n.split(".")[0] for n, p in model.adapters.named_parameters() if p.grad is None} == set()
    own = {id(parameter) for parameter in model.adapters.parameters()}
    assert all((parameter.grad is not None) == (id(parameter) in own) for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(together, sum(losses(model, [prompt]) for prompt in PROMPTS), atol=1e-3, rtol=1e-4)
    if kind not in ("prompt", "prefix", "gated"):  # what is inside the layers knows no positions
        return
    whole = [[str(model.generate([[*prompt, " Now?"]], max_new_tokens=3)[0])] for prompt in PROMPTS]
    assert model.see_each(PROMPTS).continue_with([[" Now?"]] * 2, max_new_tokens=3) == whole


def logits(model: Any, ids: Any) -> Any:
    return model.lm.logits(model.lm.embed(ids), torch.ones_like(ids))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-neox"], indirect=True)
def test_prompt_tuning_is_pefts(family, tiny_parts):
    model = assembled(tiny_parts[0], family[1], ADAPTERS["prompt"])
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    reference: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(family[1]), config).eval()
    reference.prompt_encoder["default"].embedding.weight.copy_(model.adapters[0].weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 3:]
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
@pytest.mark.parametrize("family", ["gpt-neox", "opt", "phi"], indirect=True)
def test_prefix_tuning_is_pefts(family, tiny_parts):
    model = assembled(tiny_parts[0], family[1], ADAPTERS["prefix"])
    shake(model)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    reference: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(family[1]), config).eval()
    adapter: Any = model.adapters[0]
    pairs = [part for pair in zip(adapter.keys, adapter.values, strict=True) for part in pair]
    whole = torch.stack(pairs).permute(2, 0, 1, 3).flatten(1)  # (positions, layers x 2 x heads x dim)
    reference.prompt_encoder["default"].embedding.weight.copy_(whole)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)


def test_positions_that_an_adapter_takes_are_counted(tiny_parts):
    bare, led = assembled(*tiny_parts), assembled(*tiny_parts, ADAPTERS["prompt"], {"type": "prompt", "positions": 5})
    assert led.lm.context == bare.lm.context - 8
    answers = led.generate(PROMPTS, max_new_tokens=4)
    assert [str(a) for a in answers] == [str(led.generate([prompt], max_new_tokens=4)[0]) for prompt in PROMPTS]
    chat = led.chat()
    replies = [chat.send("What is it?", images=[PROMPTS[0][0]], max_new_tokens=4), chat.send("Sure?", max_new_tokens=4)]
    assert led.chat(messages=chat.messages[:2]).send("Sure?", max_new_tokens=4) == replies[1]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_what_comes_first_is_saved_and_scores(kind, tiny_parts, tmp_path):
    model = assembled(*tiny_parts, ADAPTERS[kind])
    shake(model)
    again = mllm.load(model.save(tmp_path / "saved"))
    assert torch.equal(losses(model, PROMPTS), losses(again, PROMPTS))
    (score,) = model.score(PROMPTS[0], ["so it is"])
    assert score == pytest.approx(-float(losses(model, PROMPTS[:1]).detach()), abs=1e-4)
