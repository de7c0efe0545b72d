"""What an engine cannot run is refused by name before anything is started; what it can run reaches it whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mllm
from mllm.build import load
from mllm.engines.base import Engine, Request
from mllm.engines.choose import engine_of
from mllm.engines.options import sampling_of
from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding
from mllm.testing import LM_FAMILIES, tiny_image

IMAGE = tiny_image(1)
PROMPTS: list[list[Any]] = [["Once upon a time"], [IMAGE, "A picture of"]]


class Refusing(Engine):
    """An engine that must not be started."""

    label = "refusing"

    async def start(self, source: Any) -> int | None:
        raise AssertionError("it was started")

    def check(self, decoding: Decoding) -> None:
        raise AssertionError("it was asked")

    async def stream(self, request: Request) -> Any:
        raise AssertionError("it was asked")
        yield


@pytest.fixture(scope="module")
def refusing() -> Refusing:
    return Refusing()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": ["[RET]"]}, r"new tokens.*\[RET\]"),
        ({"heads": [{"type": "retrieval"}]}, "new tokens"),
        ({"adapters": [{"type": "gated"}]}, "gated"),
        ({"adapters": [{"type": "bottleneck"}]}, "bottleneck"),
        ({"adapters": [{"type": "prefix"}]}, "prefix"),
        ({"adapters": [{"type": "lora", "dora": True}]}, "lora.*dora"),
        ({"adapters": [{"type": "lora"}, {"type": "lora", "r": 2}]}, "several adapters"),
    ],
)
def test_parts_inside_the_layers_are_refused(
    options: dict[str, Any], named: str, tiny_model: Callable[..., Any], tmp_path: Path, refusing: Refusing
) -> None:
    folder = tiny_model(**options).save(tmp_path)
    with pytest.raises(MLLMError, match=f"{named}.*engine: transformers"):
        load(folder, engine=refusing)


def test_other_language_models_are_refused(tiny_parts: tuple[str, str], tmp_path: Path, refusing: Refusing) -> None:
    t5 = LM_FAMILIES["t5"](tmp_path / "t5")
    for number, (lm, named) in enumerate(
        [
            ({"model": t5}, "encoder-decoder"),
            ({"model": tiny_parts[1], "init": "random"}, "random weights"),
            ({"type": "sentences", "model": tiny_parts[1]}, "no language model that generates text"),
        ]
    ):
        folder = mllm.assemble(tiny_parts[0], lm).save(tmp_path / str(number))
        with pytest.raises(MLLMError, match=named):
            load(folder, engine=refusing)


@pytest.fixture(scope="module")
def prompted(
    tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, stock: Any, tiny_parts: tuple[str, str]
) -> Iterator[tuple[Any, Any]]:
    """A model with learned embeddings before the prompt: here, and with an engine at a URL."""
    model = tiny_model(adapters=[{"type": "prompt", "positions": 3}])
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    folder = model.save(tmp_path_factory.mktemp("prompted"))
    with stock(tiny_parts[1]) as server:
        yield load(folder), load(folder, engine=server.url)


def test_prompt_tuning_is_embeddings(prompted: tuple[Any, Any]) -> None:
    local, remote = ([str(answer) for answer in model.generate(PROMPTS, max_new_tokens=8)] for model in prompted)
    assert local == remote
    assert prompted[0].lm.context == prompted[1].lm.context == 253


@pytest.fixture(scope="module")
def with_lora(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with a LoRA whose update is not zero."""
    model = tiny_model(adapters=[{"type": "lora", "r": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(std=0.2, generator=generator)
    model.folder = model.save(tmp_path_factory.mktemp("lora"))
    return model


class Recording(Engine):
    """An engine that remembers what it was started with."""

    label = "recording"

    async def start(self, source: Any) -> int | None:
        self.source = source
        return None

    def check(self, decoding: Decoding) -> None:
        """Take everything."""

    async def stream(self, request: Request) -> Any:
        yield [int(request.ends[0])]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of peft's own code
def test_a_lora_reaches_the_engine_as_files_that_peft_reads(
    with_lora: Any, tiny_parts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Recording()
    model = load(with_lora.folder, engine=engine)
    assert engine.source.rank == 4 and engine.source.targets == ("down_proj", "q_proj")
    assert json.loads((engine.source.lora / "adapter_config.json").read_text())["r"] == 4
    bare = AutoModelForCausalLM.from_pretrained(tiny_parts[1], dtype=torch.float32, trust_remote_code=False)
    adapted = PeftModel.from_pretrained(bare, str(engine.source.lora))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = with_lora.lm.model(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(input_ids=ids).logits, expected, atol=0.1)
    (answer,) = model.generate([PROMPTS[0]])
    assert str(answer) == "" and answer.finish_reason == "stop"


def test_an_engine_at_a_url_without_the_lora_says_how_to_give_it(
    with_lora: Any, stock: Any, tiny_parts: tuple[str, str]
) -> None:
    with stock(tiny_parts[1]) as server:
        with pytest.raises(
            MLLMError, match="--max-lora-rank 8 --lora-target-modules down_proj q_proj --lora-modules mllm-"
        ):
            load(with_lora.folder, engine=server.url)
        server.options["loads"] = True
        assert load(with_lora.folder, engine=server.url).lm.engine._model.startswith("mllm-")


def test_options_of_the_models_generation_config_count(saved: str, tmp_path: Path) -> None:
    class Strict(Recording):
        def check(self, decoding: Decoding) -> None:
            assert decoding.generation["repetition_penalty"] == 1.3

    from transformers import AutoTokenizer, GenerationConfig

    about = json.loads((Path(saved) / "assembly.json").read_text())
    lm = Path(about["spec"]["lm"]["model"])
    folder = tmp_path / "lm"
    AutoModelForCausalLM.from_pretrained(lm, trust_remote_code=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(lm, trust_remote_code=False).save_pretrained(folder)
    GenerationConfig(repetition_penalty=1.3, eos_token_id=7).save_pretrained(folder)
    model = mllm.assemble(about["spec"]["encoder"]["model"], str(folder))
    loaded = load(model.save(tmp_path / "model"), engine=Strict())
    assert loaded.lm.text.ends == model.lm.text.ends and 7 in loaded.lm.text.ends


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (Decoding(), {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": None}),
        (Decoding(seed=3), {"temperature": 1.0, "seed": 3}),
        (Decoding(seed=-1), {"seed": 2**63 - 1}),
        (Decoding(warpers={"top_p": 0.0}), {"temperature": 0.0, "top_p": 1.0}),
        (Decoding(warpers={"temperature": 0.0, "top_k": 4}), {"temperature": 0.0, "top_k": 0}),
        (Decoding(do_sample=False, warpers={"top_k": 4}), {"temperature": 0.0, "top_k": 0}),
        (Decoding(warpers={"min_p": 0.1, "top_k": 4}), {"temperature": 1.0, "min_p": 0.1, "top_k": 4}),
        (Decoding(stop_strings="a", generation={"min_new_tokens": 2}), {"stop": ["a"], "min_tokens": 2}),
    ],
)
def test_options_are_vllms_one_to_one(decoding: Decoding, expected: dict[str, Any]) -> None:
    parameters = sampling_of(decoding, [2])
    assert {name: parameters[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("vlm", "'vllm'"),
        ("{type: url}", "urls"),
        ("{urls: [a]}", "type"),
        (["ftp://host"], "http://HOST:PORT"),
        ("{type: [", "line"),
    ],
)
def test_an_engine_that_is_named_wrongly_is_one_message(given: Any, message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        engine_of(given)


def test_transformers_is_no_engine(saved: str) -> None:
    assert engine_of("transformers") is engine_of(None) is None
    assert str(load(saved, engine="transformers").generate([["a"]], max_new_tokens=2)[0]) == str(
        load(saved).generate([["a"]], max_new_tokens=2)[0]
    )
