"""Parts that are stored in half precision, and stages of several precisions."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch.nn.modules.module import register_module_forward_pre_hook

import mllm
from mllm.errors import MLLMError
from mllm.scorers.index import ImageIndex
from mllm.slots import Connector
from mllm.testing import tiny_image, tiny_lm

IMAGE = tiny_image(1)


CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear"},
    "pooled linear": {"type": "linear", "tokens": 4, "norm": True},
    "mlp": {"type": "mlp", "norm": True},
    "mapper": {"type": "mapper", "tokens": 3, "dim": 16, "layers": 1, "heads": 2, "ffn": 16},
    "resampler": {"type": "resampler", "tokens": 3, "depth": 1, "heads": 2},
    "qformer": {"type": "qformer", "tokens": 3, "dim": 16, "layers": 2, "heads": 2},
    "bare qformer": {"type": "qformer", "tokens": 3, "dim": 16, "layers": 2, "heads": 2, "norm": False},
    "temporal": {"type": "temporal", "frames": 4, "dim": 16, "heads": 2},
    "token-merge": {"type": "token-merge", "merge": 3, "layers": 2, "dim": 16, "heads": 2},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 2},
    "bottleneck": {"type": "bottleneck"},
    "prompt": {"type": "prompt", "positions": 3},
    "prefix": {"type": "prefix", "positions": 3},
    "gated": {"type": "gated", "every": 1, "heads": 2, "head_dim": 8},
}
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def half_encoder(tiny_parts, tmp_path_factory):
    """The tiny encoder, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    transformers.AutoModel.from_pretrained(tiny_parts[0]).to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoImageProcessor.from_pretrained(tiny_parts[0], backend="pil").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def half_lm(tiny_parts, tmp_path_factory):
    """The tiny language model, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half-lm")
    transformers.AutoModelForCausalLM.from_pretrained(tiny_parts[1], dtype=torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_parts[1]).save_pretrained(folder)
    return str(folder)


def check_answers(model: Any) -> None:
    """Ask in every way; whatever meets a tensor of another type raises."""
    prompt = [IMAGE, "A"]
    model.generate([prompt, ["only text"]], max_new_tokens=2)
    model.see([IMAGE]).ask("what?", max_new_tokens=2)
    chat = model.chat()
    chat.send("hello", [IMAGE], max_new_tokens=2)
    chat.send("more", max_new_tokens=2)
    assert len(model.score(prompt, ["yes", "no"])) == 2


@pytest.mark.parametrize("connector", CONNECTORS.values(), ids=CONNECTORS)
def test_an_encoder_in_half_precision_answers(half_encoder, tiny_parts, connector):
    model = mllm.assemble(half_encoder, tiny_parts[1], connector)
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.connector.parameters()} == {torch.float32}
    check_answers(model)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_language_model_in_half_precision_answers(half_encoder, half_lm, adapter):
    check_answers(mllm.assemble(half_encoder, half_lm, adapters=[adapter]))


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_quantized_language_model_answers(half_encoder, tmp_path, quantize, adapter):
    lm = {"model": tiny_lm(tmp_path / "lm", dim=64), "quantize": quantize}
    check_answers(mllm.assemble(half_encoder, lm, adapters=[adapter]))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_whole_model_is_converted(tiny_model, dtype, adapter):
    check_answers(tiny_model(adapters=[adapter]).to(dtype))


# dtype=, of the frozen weights.


@pytest.mark.parametrize("dtype", [*HALF, "bfloat16"])
def test_frozen_weights_are_loaded_in_a_type(tiny_model, tmp_path, dtype):
    model = tiny_model(adapters=[{"type": "lora", "r": 2}], heads=[{"type": "retrieval", "dim": 6}], dtype=dtype)
    loaded = mllm.load(tiny_model().save(tmp_path / "run"), dtype=dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    for each in (model, loaded):
        trained = {id(tensor) for tensor in each.trained_tensors().values()}
        kinds = {p.dtype for p in (*each.encoder.parameters(), *each.lm.parameters()) if id(p) not in trained}
        assert kinds == {expected}
        assert {tensor.dtype for tensor in each.trained_tensors().values()} == {torch.float32}
        tables = {name: buffer.dtype for name, buffer in each.named_buffers() if "inv_freq" in name}
        assert tables and set(tables.values()) == {torch.float32}, "as transformers keeps them"
        check_answers(each)
    assert mllm.load(loaded.save(tmp_path / "again")).lm.model.dtype == torch.float32, "it is no setting of the model"


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize("kind", ["transformers", "sentences"])
def test_weights_that_are_converted_keep_their_fingerprint(tiny_parts, tmp_path, init, kind):
    encoder = {"model": tiny_parts[0], "init": init}
    lm = {"type": kind, "model": tiny_parts[1], "init": init}
    folder = mllm.assemble(encoder, lm).save(tmp_path / "run")
    mllm.load(folder, dtype="bfloat16")


def test_heads_decoders_and_scorers_read_states_in_half_precision(tiny_model, tiny_decoder, tiny_clip, tmp_path):
    IMAGE.save(tmp_path / "a.png")
    heads = [
        {"type": "retrieval", "dim": 6, "token": "[IMG0]"},
        {"type": "generation", "tokens": 1, "length": 1, "width": 32, "dim": 16, "layers": 1, "heads": 2},
        {"type": "decision"},
    ]
    decoder, scorer = {"type": "trained", "model": tiny_decoder}, {"type": "dual-encoder", "model": tiny_clip}
    model = tiny_model(heads=heads, decoder=decoder, scorer=scorer, dtype="bfloat16")
    for each in (model, model.to(torch.bfloat16)):
        index = ImageIndex.build(each, [tmp_path / "a.png"])
        assert each.retrieve([[IMAGE, "A"]], index)[0][0].source == str(tmp_path / "a.png")
        assert each.draw([["A cat"]])[0].image.size == (16, 16)
        each.generate([[IMAGE, "A"]], index=index, image_logit_bias=9.0, max_new_tokens=2)
        each.generate([[IMAGE, "A"]], images=0, candidates=2, max_new_tokens=2)


@pytest.fixture
def train(tiny_parts, tmp_path):
    """Return a function that trains stages, beside the encoder of a folder."""
    IMAGE.save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "caption": "a"}] * 4))

    def trained(*stages: dict[str, Any], **parts: Any) -> list[float]:
        parts = {"encoder": tiny_parts[0], "lm": tiny_parts[1], "connector": {"type": "linear"}, **parts}
        named = {name: {"model": part} if isinstance(part, str) else part for name, part in parts.items()}
        recipe = {
            "name": "tiny",
            **named,
            "data": {"train": {"format": "table", "path": str(tmp_path / "rows.json")}},
            "stages": list(stages),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run = mllm.train(str(tmp_path / "recipe.yaml"), out=tmp_path / "run")
        rows = map(json.loads, (run.path / "log.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    return trained


def stage(name: str, **optim: Any) -> dict[str, Any]:
    return {"name": name, "train": ["connector"], "steps": 1, "batch_size": 2, "optim": optim}


@pytest.mark.parametrize("connector", CONNECTORS.values(), ids=CONNECTORS)
def test_an_encoder_in_half_precision_is_trained_on(train, half_encoder, connector):
    assert len(train(stage("align"), encoder=half_encoder, connector=connector)) == 1


@pytest.mark.parametrize("connector", ["linear", "mlp", "qformer"])
def test_an_encoder_in_half_precision_is_fitted_on(train, half_encoder, connector):
    train({"name": "fit", "fit": {}}, encoder=half_encoder, connector=CONNECTORS[connector])


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_is_trained_in_a_language_model_in_half_precision(train, half_encoder, half_lm, adapter):
    parts = {"encoder": half_encoder, "lm": half_lm, "adapters": [adapter]}
    trained = {"connector": 1e-3, "adapters": 1e-3}
    assert len(train({**stage("align"), "train": trained}, **parts)) == 1


@pytest.mark.parametrize(
    ("precisions", "expected"),
    [(("float32", "bfloat16"), [False, True]), (("bfloat16", "float32"), [True, False])],
    ids=["float32 then bfloat16", "bfloat16 then float32"],
)
def test_two_stages_of_two_precisions_are_trained(train, fresh_accelerator, precisions, expected):
    """Each stage's steps are in its own precision."""
    autocast: list[bool] = []

    def note(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, Connector):
            autocast.append(torch.is_autocast_enabled("cpu"))

    handle = register_module_forward_pre_hook(note)
    try:
        assert len(train(*(stage(name, precision=name) for name in precisions))) == 2
    finally:
        handle.remove()
    assert [enabled for enabled, _ in itertools.groupby(autocast)] == expected


def test_weights_in_float16_are_not_trained(train, tiny_parts):
    parts = {"lm": {"model": tiny_parts[1], "dtype": "float16"}}
    with pytest.raises(MLLMError, match=r"lm\.dtype is float16.*Leave out lm\.dtype"):
        train({**stage("tune"), "train": {"lm": 1e-3}}, **parts)
