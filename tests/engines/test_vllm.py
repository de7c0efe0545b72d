"""vLLM itself, on the CPU, with the embedded parts: `make test-vllm`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mllm
from mllm.answering.decode import for_prompts, generate_ids, make_decoding
from mllm.engines.base import EngineError
from mllm.prompts.messages import message, text_part, turns
from mllm.testing import tiny_image

pytestmark = [pytest.mark.vllm, pytest.mark.installed, pytest.mark.filterwarnings("ignore")]

TOKENS = 12
TIE = 0.05  # of log-probabilities
ENGINE = {"type": "vllm", "enforce_eager": True, "max_num_seqs": 32, "max_model_len": 512}
TEXTS = ("The capital of France is", "Once upon a time there was", "def add(a, b):", "Two plus two is", "My favourite")
QUESTIONS = ("What is this?", "Which colour is it?", "Is it large?", "Where is it?", "What is beside it?")
COLOURS = ("red", "green", "blue", "yellow", "white")


@pytest.fixture(scope="session", autouse=True)
def _small() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def images(count: int) -> list[Image.Image]:
    plain = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    return [*plain, *(tiny_image(seed, (64, 48)) for seed in range(count - len(plain)))]


def saved(folder: Path, **options: Any) -> Path:
    """A model of the embedded parts; a LoRA in it gets an update that changes answers."""
    encoder = {"model": "mllm/mobilenet-v2", "select": "pooled"}
    model = mllm.assemble(encoder, "mllm/smollm2-135m", {"type": "linear", "tokens": 4}, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.03, generator=generator)
    return model.save(folder)


def prompts_of(model: Any) -> list[list[Any]]:
    """160 prompts: texts, one image, several images, conversations."""
    shown = images(20)
    pairs = list(zip(shown, cycle(QUESTIONS), strict=False))
    texts = [[f"{text} ({number})"] for number, text in enumerate(islice(cycle(TEXTS), 40))]
    single = [[image, f"Question: {text} Answer:"] for image, _ in pairs for text in QUESTIONS[:3]]
    several = [[a, " and ", b, f" {text}"] for (a, text), (b, _) in zip(pairs, pairs[1:] + pairs[:1], strict=True)] * 2
    several = [[*prompt, f" ({number})"] for number, prompt in enumerate(several)]
    chats = []
    for image, text in pairs:
        first = message("user", [{"type": "image", "image": image}, text_part(text)])
        more = [message("assistant", [text_part("I see.")]), message("user", [text_part("And what else?")])]
        chats.append(turns(model, [first, *more]))
    return [*texts, *single, *several, *chats]


def ids_of(model: Any, prompts: Sequence[list[Any]]) -> list[list[int]]:
    """Return the greedy ids of prompts, in one batch."""
    decoding = make_decoding(model, {"max_new_tokens": TOKENS, "do_sample": False})
    decodings = for_prompts(model, prompts, [decoding] * len(prompts))
    embeds, batch = model.prepare(prompts)
    return generate_ids(model, prompts, decodings, batch.mask, inputs_embeds=embeds)


@torch.no_grad()
def gap(model: Any, prompt: list[Any], one: list[int], other: list[int]) -> float:
    """Return by how much the first differing tokens of two answers differ in log-probability."""
    ends = [*one, model.lm.eos], [*other, model.lm.eos]
    at = next(index for index, (a, b) in enumerate(zip(*ends, strict=False)) if a != b)
    embeds, batch = model.prepare([prompt])
    whole = torch.cat([embeds, model.lm.embed(torch.tensor([one[:at]], dtype=torch.long))], dim=1)
    logits = model.lm.logits(whole, batch.mask.new_ones(whole.shape[:2]), torch.tensor([whole.shape[1] - 1]))
    likelihood = logits[0, -1].log_softmax(-1)
    return float((likelihood[ends[0][at]] - likelihood[ends[1][at]]).abs())


def compare(local: Any, prompts: Sequence[list[Any]], here: list[list[int]], there: list[list[int]]) -> int:
    """Return how many answers are equal; the others have to part at a near tie."""
    pairs = list(zip(prompts, here, there, strict=True))
    gaps = [gap(local, prompt, a, b) for prompt, a, b in pairs if a != b]
    assert all(value < TIE for value in gaps), gaps
    return len(pairs) - len(gaps)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    folder = saved(tmp_path_factory.mktemp("plain"))
    remote = mllm.load(folder, dtype="float32", engine=ENGINE)
    yield mllm.load(folder, dtype="float32"), remote
    remote.lm.engine.close()


@pytest.mark.timeout(3600)
def test_greedy_answers_are_those_of_transformers(models: tuple[Any, Any]) -> None:
    local, remote = models
    prompts = prompts_of(local)
    here = [ids for start in range(0, len(prompts), 16) for ids in ids_of(local, prompts[start : start + 16])]
    there = ids_of(remote, prompts)
    equal, count = compare(local, prompts, here, there), len(prompts)
    single = [ids_of(remote, [prompt])[0] for prompt in prompts[::16]]
    print("batch and single:", compare(local, prompts[::16], there[::16], single), "of", len(single))
    print("text, images, chats:", equal, "of", count)
    assert count == 160 and equal >= 0.95 * count


@pytest.mark.timeout(3600)
def test_a_lora_changes_the_answers_as_it_does_in_transformers(tmp_path: Path) -> None:
    folder = saved(tmp_path, adapters=[{"type": "lora", "r": 8}])
    local, remote = mllm.load(folder, dtype="float32"), mllm.load(folder, dtype="float32", engine=ENGINE)
    prompts = prompts_of(local)[20:100:2]
    here = ids_of(local, prompts)
    equal = compare(local, prompts, here, ids_of(remote, prompts))
    remote.lm.engine.close()
    print("LoRA:", equal, "of", len(prompts))
    with local.adapters_off():
        assert sum(a != b for a, b in zip(here, ids_of(local, prompts), strict=True)) > 10
    assert len(prompts) == 40 and equal >= 0.95 * len(prompts)


@pytest.mark.timeout(3600)
def test_prefixes_of_embeddings_are_cached_and_an_engine_that_was_killed_is_started_again(
    models: tuple[Any, Any],
) -> None:
    _, remote = models
    view = remote.see([" ".join(TEXTS * 8), images(6)[5]])
    engine = remote.lm.engine
    cached: list[int] = []
    generate = engine._llm.generate

    async def counted(*arguments: Any, **options: Any) -> Any:
        async for output in generate(*arguments, **options):
            if output.finished:
                cached.append(output.num_cached_tokens)
            yield output

    engine._llm.generate = counted
    answers = [view.continue_with(f" {text}", max_new_tokens=4) for text in QUESTIONS[:3]]
    print("tokens of the KV cache that later questions began with:", cached)
    assert cached[0] < 32 <= cached[1] <= cached[2]

    for process in engine._llm.engine_core.resources.engine_manager.processes:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="started again"):
        view.continue_with(" again", max_new_tokens=4)
    assert view.continue_with(f" {QUESTIONS[0]}", max_new_tokens=4) == answers[0]
