"""Load the model of a command, on the device and in the type that the command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm.assembly import Assembly


def load_run(
    run: Path,
    device: str | None,
    dtype: str | None,
    trusted: Sequence[str] | None = None,
    engine: str | None = None,
) -> Assembly:
    """Return a run's model; whatever else the command loads is on the same device.

    Raises:
        MLLMError: see `mllm.build.load`.
    """
    from mllm.build import load
    from mllm.devices import use_device

    use_device(device)
    return load(run, dtype=dtype, trust_remote_code=trusted or (), engine=engine)
