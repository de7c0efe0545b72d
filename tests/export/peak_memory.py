"""Print how many times the bytes of its weights in float32 a process holds while it exports a model, at most.

    python peak_memory.py ENCODER TINY_LM LM BYTES OUT DTYPE LORA

Counted are all pages in memory, with those of files that are read.
"""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import mllm
from mllm.export.export import export


def memory() -> int:
    """Return the bytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


class Peak(threading.Thread):
    """Reads the memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.done = memory(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.highest = max(self.highest, memory())


encoder, tiny_lm, lm, size, out, dtype, lora = sys.argv[1:]
adapters = [{"type": "lora", "r": 2}] if lora == "lora" else []
export(mllm.assemble({"model": encoder, "layer": -1}, tiny_lm, "mlp"), f"{out}-first", to="hf-llava")  # imports
model = mllm.assemble({"model": encoder, "layer": -1}, lm, "mlp", adapters=adapters)
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data = tensor.data.clone()  # it was a part of the file
gc.collect()
others = memory() - sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
peak = Peak()
peak.start()
export(model, out, to="hf-llava", dtype=dtype)
peak.done.set()
peak.join()
print(f"{(peak.highest - others) / int(size):.3f}")
