"""The public surface: its names, and that naming it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mllm

HEAVY = ("torch", "transformers", "numpy", "PIL", "pydantic", "omegaconf", "accelerate", "peft", "matplotlib")


def loaded(code: str, *heavy: str) -> list[str]:
    """Run code in a fresh interpreter and return which of the modules it has imported."""
    report = f"import sys\nprint('LOADED', *[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1].split()
    assert last[0] == "LOADED", done.stderr
    return last[1:]


def test_public_names_are_pinned() -> None:
    names = {"Assembly", "MLLMError", "__version__", "assemble", "evaluate", "load", "metric", "train"}
    assert set(mllm.__all__) == names == set(dir(mllm))
    for name in names:
        assert getattr(mllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'asemble'"):
        _ = mllm.asemble


def test_error_is_the_one_that_is_raised() -> None:
    from mllm.errors import MLLMError

    assert mllm.MLLMError is MLLMError
    assert issubclass(MLLMError, ValueError)


def test_import_costs_nothing() -> None:
    assert loaded("import mllm", *HEAVY) == []
    assert loaded("import mllm; mllm.MLLMError", *HEAVY) == []
    assert loaded("import mllm.config.loading", *HEAVY) == ["pydantic", "omegaconf"], "what is imported shows"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["parts", "--help"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["mllm", *{arguments!r}]
from mllm.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded(code, "torch", "transformers", "numpy") == []
