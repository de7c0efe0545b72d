"""Shared by all tests: no network, a cache of their own, and tiny parts that every test may build on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest

TESTS = Path(__file__).parent
READ_INSTALLED = (TESTS / "test_parts.py", TESTS / "data")  # these find the installed parts by themselves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(place) for place in READ_INSTALLED):
            item.add_marker(pytest.mark.installed)


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
def tiny_decoder(tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny image decoder: conditions of 1 x 32, images of 16 pixels."""
    from mllm.assembling import build
    from mllm.spec import AssemblySpec, LMSpec, PartSpec

    lm = LMSpec(type="sentences", model=tiny_parts[1])
    head = PartSpec.model_validate({"type": "pixels", "side": 16, "features": 64, "rank": 8})
    return str(build(AssemblySpec(lm=lm, heads=[head])).save(tmp_path_factory.mktemp("tiny-decoder")))


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
    from mllm import parts
    from mllm.errors import MLLMError

    def needed(*names: str) -> None:
        for name in names:
            try:
                parts.locate(name)
            except MLLMError as error:
                pytest.skip(str(error))

    return needed
