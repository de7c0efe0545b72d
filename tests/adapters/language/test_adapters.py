"""Adapters inside the language model: what they owe the core, parity with peft, and published sizes."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import mllm
from mllm.config.loading import load as load_recipe
from mllm.errors import MLLMError
from mllm.planning.paper import meta_model
from mllm.registry import lookup
from mllm.slots import Adapter
from mllm.testing import tiny_image

ADAPTERS: list[dict[str, Any]] = [
    {"type": "lora", "r": 3},
    {"type": "lora", "r": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.5},
    {"type": "lora", "r": 2, "dora": True},
    {"type": "bottleneck"},
    {"type": "bottleneck", "after": ["mlp", "attention"], "reduction": 8, "mode": "parallel", "scale": 4.0},
]
PROMPTS: list[list[Any]] = [["A", tiny_image(1)], [tiny_image(2), "b", tiny_image(3), "c d e"], ["no picture here"]]


@pytest.fixture(params=ADAPTERS, ids=lambda options: "-".join(map(str, options.values())))
def model(request, tiny_parts):
    return mllm.assemble(tiny_parts[0], tiny_parts[1], adapters=[request.param])


def shake(model: Any) -> None:
    """Move the adapters far from their start, where they do nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def logits(model: Any, prompts: Any = PROMPTS) -> Any:
    embeds, batch = model.prepare(prompts)
    return model.lm.logits(embeds, batch.mask).detach()


def test_off_or_at_the_start_it_is_the_language_model(model, tiny_parts):
    bare = mllm.assemble(tiny_parts[0], tiny_parts[1])
    torch.testing.assert_close(logits(model), logits(bare), atol=2e-3, rtol=1e-3)
    shake(model)
    assert (logits(model) - logits(bare)).abs().max() > 0.01
    with model.adapters_off():
        assert torch.equal(logits(model), logits(bare))
    assert (logits(model) - logits(bare)).abs().max() > 0.01


def test_only_the_adapter_gets_a_gradient_and_the_frozen_hash_stays(model, tiny_parts):
    bare = mllm.assemble(tiny_parts[0], tiny_parts[1])
    before = model.frozen_hash("lm")
    model.requires_grad_(False)
    model.adapters.requires_grad_(True)
    embeds, batch = model.prepare(PROMPTS)
    model.lm.logits(embeds, batch.mask).square().mean().backward()
    trained = {id(parameter) for parameter in model.adapters.parameters()}
    assert trained
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    shake(model)
    assert model.frozen_hash("lm") == before
    assert model.frozen_hash("encoder") == bare.frozen_hash("encoder")
    with torch.no_grad():
        next(p for p in model.lm.parameters() if id(p) not in trained).add_(1)
    assert model.frozen_hash("lm") != before


def test_batch_equals_single_and_views_equal_generation(model):
    shake(model)
    together = [str(output) for output in model.generate(PROMPTS, max_new_tokens=8)]
    assert together == [str(model.generate([prompt], max_new_tokens=8)[0]) for prompt in PROMPTS]
    seen = model.see(PROMPTS[0]).continue_with(" and", max_new_tokens=8)
    assert seen == str(model.generate([[*PROMPTS[0], " and"]], max_new_tokens=8)[0])


def test_saved_and_loaded_it_gives_equal_logits(model, tmp_path):
    shake(model)
    again = mllm.load(model.save(tmp_path / "saved"))
    assert torch.equal(logits(model), logits(again))
    assert {name.split(".")[0] for name in model.trained_state()} == {"connector", "adapters"}


def test_training_mode_reaches_dropout_inside_the_language_model(tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], adapters=[ADAPTERS[1]])
    dropouts = [module for module in model.adapters.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and not any(module.training for module in dropouts)
    model.train()
    assert all(module.training for module in dropouts)
    own = {id(module) for module in model.adapters.modules()}
    assert not any(module.training for module in model.lm.modules() if id(module) not in own)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_lora_is_pefts(tiny_parts):
    model = mllm.assemble(
        tiny_parts[0], tiny_parts[1], adapters=[{"type": "lora", "r": 3, "alpha": 6, "targets": ["q_proj"]}]
    )
    shake(model)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_parts[1]), config).eval()
    state = dict(model.lm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.get_base_model().named_parameters():
            parameter.copy_(state[name])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model.lm.model(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_loras_of_one_model_are_added_and_saved_apart(tiny_parts, tmp_path):
    adapters = [
        {"type": "lora", "r": 3, "alpha": 6, "targets": ["q_proj"]},
        {"type": "lora", "r": 2, "alpha": 8, "targets": ["q_proj", "v_proj"]},
    ]
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], adapters=adapters)
    shake(model)
    bare = AutoModelForCausalLM.from_pretrained(tiny_parts[1]).eval()
    only_second = copy.deepcopy(bare)
    ids = torch.tensor([[5, 6, 7, 8]])
    for number, scale, changed in ((0, 2.0, [bare]), (1, 4.0, [bare, only_second])):
        matrices = {k: v for k, v in model.trained_state().items() if k.startswith(f"adapters.{number}.")}
        assert len(matrices) == 2 * 2 * (1 + number)
        for name in [name for name in matrices if ".lora_A." in name]:
            update = matrices[name.replace("lora_A", "lora_B")] @ matrices[name] * scale
            path = name.removeprefix(f"adapters.{number}.layers.").partition(".lora_A")[0].replace("/", ".")
            for lm in changed:
                lm.get_submodule(path).weight.data += update
    with torch.no_grad():
        torch.testing.assert_close(model.lm.model(input_ids=ids).logits, bare(input_ids=ids).logits)
        with cast(Adapter, model.adapters[0]).off():
            torch.testing.assert_close(model.lm.model(input_ids=ids).logits, only_second(input_ids=ids).logits)
        torch.testing.assert_close(model.lm.model(input_ids=ids).logits, bare(input_ids=ids).logits)
        again = mllm.load(model.save(tmp_path / "saved"))
        assert torch.equal(model.lm.model(input_ids=ids).logits, again.lm.model(input_ids=ids).logits)


def test_bottleneck_is_its_formula():
    config = OPTConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=8
    )
    model: Any = OPTForCausalLM(config).eval()
    bare = copy.deepcopy(model)
    adapter = lookup("adapters", "bottleneck")(model, reduction=2, std=0.3)
    seen = []
    bare.model.decoder.layers[0].fc2.register_forward_hook(lambda module, args, output: seen.append(output))
    ids = torch.tensor([[3, 4, 5]])
    bare(ids)
    down, up = adapter.layers[0][0], adapter.layers[0][2]
    expected = seen[0] + torch.relu(seen[0] @ down.weight.T + down.bias) @ up.weight.T + up.bias
    found = []
    model.model.decoder.layers[0].fc2.register_forward_hook(lambda module, args, output: found.append(output))
    model(ids)
    torch.testing.assert_close(found[0], expected)


def test_a_learned_scale_multiplies_the_parallel_branch_and_trains():
    config = OPTConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=8
    )
    model: Any = OPTForCausalLM(config).eval()
    options: dict[str, Any] = {"reduction": 2, "std": 0.3, "mode": "parallel"}
    adapter = lookup("adapters", "bottleneck")(model, scale="learned", **options)
    assert [scale.tolist() for scale in adapter.scales] == [[1.0], [1.0]]
    for scale, value in zip(adapter.scales, (2.5, -1.5), strict=True):
        scale.data.fill_(value)
    seen: list[Any] = []
    layer = model.model.decoder.layers[1]
    layer.fc1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    layer.fc2.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    before, inside, after = seen
    down, up = adapter.layers[1][0], adapter.layers[1][2]
    branch = torch.relu(before @ down.weight.T + down.bias) @ up.weight.T + up.bias
    expected = inside @ layer.fc2.weight.T + layer.fc2.bias - 1.5 * branch
    torch.testing.assert_close(after, expected)
    assert all(scale.grad is not None and scale.grad.abs() > 0 for scale in adapter.scales)
    with pytest.raises(MLLMError, match="expected a number, or 'learned'"):
        lookup("adapters", "bottleneck")(model, scale="learnt")


@pytest.mark.parametrize(
    ("options", "weights"),
    [({"reduction": 4}, 235_024_384), ({"reduction": 8, "after": ["mlp", "attention"]}, 235_139_072)],
)
def test_magmas_adapters_have_their_published_size(options, weights):
    config = load_recipe("limber", {"adapters": [{"type": "bottleneck", **options}]})
    model = meta_model(config.stages[0])
    assert sum(parameter.numel() for parameter in model.adapters.parameters()) == weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"type": "lora", "targets": ["q_prj"]},
            "no module of the language model is called 'q_prj'. Did you mean 'q_proj'",
        ),
        ({"type": "lora", "rank": 3}, "does not take these arguments"),
        ({"type": "bottleneck", "after": ["ffn"]}, "after names 'ffn'; expected mlp or attention"),
        ({"type": "bottleneck", "mode": "around"}, "expected 'serial' or 'parallel'"),
        ({"type": "lara"}, "Did you mean 'lora'"),
    ],
)
def test_what_is_wrong_is_said(tiny_parts, options, message):
    with pytest.raises(MLLMError, match=message):
        mllm.assemble(tiny_parts[0], tiny_parts[1], adapters=[options])
