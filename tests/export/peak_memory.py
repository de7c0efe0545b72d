"""Print how many times the bytes of its weights in float32 a process holds while it exports a model, at most.

    python peak_memory.py ENCODER TINY_LM LM BYTES OUT DTYPE LORA

Counted are the process's own pages. Those of files that are read belong to the system's cache.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import mllm
from mllm.export.export import export


def own_memory() -> int:
    """Return the bytes of this process's own pages."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Peak(threading.Thread):
    """Reads the memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.done = own_memory(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.highest = max(self.highest, own_memory())


encoder, tiny_lm, lm, size, out, dtype, lora = sys.argv[1:]
adapters = [{"type": "lora", "r": 2}] if lora == "lora" else []
export(mllm.assemble({"model": encoder, "layer": -1}, tiny_lm, "mlp"), f"{out}-first", to="hf-llava")  # imports
model = mllm.assemble({"model": encoder, "layer": -1}, lm, "mlp", adapters=adapters)
before = own_memory()
peak = Peak()
peak.start()
export(model, out, to="hf-llava", dtype=dtype)
peak.done.set()
peak.join()
copies = (sum(p.numel() * p.element_size() for p in model.parameters()) + peak.highest - before) / int(size)
print(f"{copies:.3f}")
