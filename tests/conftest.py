"""Shared by all tests: no network, one thread, a cache of their own, and tiny parts that every test may build on."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch: small operations crawl on threads that share cores

import pytest

TESTS = Path(__file__).parent
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["mllm.training.train", "mllm.eval.evaluate"])  # imported once, which takes seconds
READ_INSTALLED = (TESTS / "hub" / "test_embedded.py", TESTS / "data")  # these find the installed parts by themselves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    assert all(place.exists() for place in READ_INSTALLED)  # else their tests would be skipped
    for item in items:
        if any(item.path.is_relative_to(place) for place in READ_INSTALLED):
            item.add_marker(pytest.mark.installed)


def pytest_collection_finish() -> None:
    """Keep the collected tests and their modules out of garbage collections, of which every training has some."""
    gc.freeze()


def _command(arguments: list[str], variables: dict[str, str], output: Path) -> None:
    """Run `mllm` in a new process."""
    from mllm.__main__ import main

    os.environ.clear()
    os.environ |= variables
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["mllm", *arguments]
    main()


class Command:
    """`mllm` in processes that find each other as those of torchrun do.

    Args:
        arguments: of the command.
        count: of processes.
        output: the file that all of them write to.
        variables: of their environment.
    """

    def __init__(self, arguments: list[str], count: int, output: Path, variables: dict[str, str]) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._output, variables = output, {**os.environ, **variables}
        if count > 1:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(count)}
            variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_CPU": "true"}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
        self._processes = [
            FORKED.Process(target=_command, args=(arguments, variables | rank, output), daemon=True) for rank in ranks
        ]
        for process in self._processes:
            process.start()

    def running(self) -> bool:
        """Whether none has ended."""
        return all(process.is_alive() for process in self._processes)

    def kill(self) -> None:
        """Kill all of them without notice."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        assert self._processes[0].exitcode == -signal.SIGKILL, "it ended before it was killed"

    def stop(self, number: int, rank: int = 0) -> str:
        """Send a signal to one of them, wait for all, and return their output; each ends with the signal's status."""
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)
        for process in self._processes:
            process.join()
        written = self._output.read_text()
        assert all(process.exitcode in (128 + number, 128 + signal.SIGTERM) for process in self._processes), written
        return written

    def finish(self) -> str:
        """Wait for all of them, which have to succeed, and return their output."""
        for process in self._processes:
            process.join()
        written = self._output.read_text()
        assert [process.exitcode for process in self._processes] == [0] * len(self._processes), written
        return written


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Command]:
    """Return a function that starts `mllm` with arguments in new processes, forked from one that has it imported."""

    def started(*arguments: object, count: int = 1, **variables: str) -> Command:
        output = tmp_path_factory.mktemp("command") / "output"
        return Command([str(argument) for argument in arguments], count, output, variables)

    return started


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Show the installed parts in a cache of the session's own: nothing is written into the user's."""
    from mllm.system import cache_dir

    user, own = cache_dir(), tmp_path_factory.mktemp("mllm-cache")
    for name in ("parts", "wheels"):
        (own / name).symlink_to(user / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLLM_CACHE", str(own))
        yield


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the installed parts from every test that is not marked ``installed``."""
    if request.node.get_closest_marker("installed") is None:
        monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "mllm-cache"))


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The folders of a tiny encoder and a tiny language model."""
    from mllm.testing import tiny_encoder, tiny_lm

    folder = tmp_path_factory.mktemp("tiny-parts")
    return tiny_encoder(folder / "encoder"), tiny_lm(folder / "lm")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny CLIP."""
    from mllm.testing import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("tiny-clip"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny BERT over bytes that has a mask token."""
    import torch
    from transformers import BertConfig, BertModel

    from mllm.testing import tiny_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("tiny-bert"), tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    BertModel(BertConfig(**sizes, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_decoder(tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny image decoder: conditions of 1 x 32, images of 16 pixels."""
    from mllm.build import build
    from mllm.config.lm import LMSpec
    from mllm.config.parts import AssemblySpec, HeadSpec

    lm = LMSpec(type="sentences", model=tiny_parts[1])
    head = HeadSpec.model_validate({"type": "pixels", "side": 16, "features": 64, "rank": 8})
    return str(build(AssemblySpec(lm=lm, heads=[head])).save(tmp_path_factory.mktemp("tiny-decoder")))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """Return a tiny Stable Diffusion with random weights, and the folder that it is saved in."""
    diffusers = pytest.importorskip("diffusers")
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = CLIPTextConfig(
        **sizes,
        num_attention_heads=2,
        vocab_size=54,
        max_position_embeddings=8,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    stable_diffusion = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=8),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stable_diffusion.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("pipeline")
    stable_diffusion.save_pretrained(folder)
    return stable_diffusion, str(folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_parts: tuple[str, str]) -> Callable[..., Any]:
    """Return a function that assembles the tiny parts; it takes the arguments of `mllm.assemble` behind them."""
    import mllm

    return lambda connector="linear", **options: mllm.assemble(*tiny_parts, connector, **options)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Let accelerate choose device and precision anew inside this test, as in a process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def need() -> Callable[..., None]:
    """Return a function that skips a test, with a reason, where installed parts that it names are missing."""
    from mllm.errors import MLLMError
    from mllm.hub import embedded as parts

    def needed(*names: str) -> None:
        for name in names:
            try:
                parts.locate(name)
            except MLLMError as error:
                pytest.skip(str(error))

    return needed


@pytest.fixture(scope="session")
def served() -> Callable[..., Any]:
    """Return a context manager that serves a model on a free port, in a thread, and gives the port.

    It takes the model, the limits by name, and ``show`` and ``change`` (called with the application) if need be.
    """
    from mllm.serve.app import create_app
    from mllm.serve.connection import make_server
    from mllm.serve.schema import Limits

    @contextlib.contextmanager
    def serve(model: Any, *, change: Any = None, show: Any = None, **limits: Any) -> Iterator[int]:
        own = Limits(**limits)
        app = create_app(model, "tiny", own, show)
        if change is not None:
            change(app)
        server = make_server(app, own, port=0, log_level="critical")
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()

    return serve
