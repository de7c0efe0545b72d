"""Count requests, batches and tokens, for ``/metrics`` in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping

COUNTERS = {
    "requests_total": "Requests to /v1 that were answered, by HTTP status.",
    "disconnects_total": "Requests whose client disconnected before it had its answer.",
    "errors_total": "Requests at which the server or the model failed.",
    "batches_total": "Batches that were decoded.",
    "batched_requests_total": "Requests in these batches.",
    "decoding_seconds_total": "Seconds that batches were decoded for.",
    "prompt_tokens_total": "Tokens of the prompts that were answered.",
    "generated_tokens_total": "Tokens that were generated.",
}
GAUGES = {
    "requests_in_progress": "Requests that were read and are not answered yet.",
    "queue_length": "Requests that wait for their batch.",
    "batch_size": "Requests in the batch that is being decoded.",
    "tokens_per_second": "Tokens per second of the last batch.",
    "body_bytes": "Bytes of request bodies in memory.",
    "image_pixels": "Pixels of decoded images in memory.",
}


class Metrics:
    """The counts of one server; every thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter({(name, ""): 0 for name in COUNTERS if name != LABELLED})
        self._gauges: dict[str, Callable[[], float]] = {}
        self.tokens_per_second = 0.0

    def add(self, name: str, amount: float = 1, status: int | None = None) -> None:
        """Add to a counter of `COUNTERS`."""
        with self._lock:
            self._counts[name, "" if status is None else f'{{status="{status}"}}'] += amount  # type: ignore[assignment]

    def requests(self) -> int:
        """Return how many requests were answered."""
        with self._lock:
            return int(sum(count for (name, _), count in self._counts.items() if name == LABELLED))

    def batch(self, size: int, seconds: float, tokens: int) -> None:
        """Count a batch that was decoded."""
        self.add("batches_total")
        self.add("batched_requests_total", size)
        self.add("decoding_seconds_total", seconds)
        self.tokens_per_second = tokens / max(seconds, 1e-9)

    def watch(self, gauges: Mapping[str, Callable[[], float]]) -> None:
        """Set what returns the value of each gauge of `GAUGES`."""
        self._gauges |= gauges

    def text(self) -> str:
        """Return all values in Prometheus' text format."""
        with self._lock:
            counts = sorted(self._counts.items())
        lines = []
        for name, about in COUNTERS.items():
            lines += _head(name, "counter", about)
            lines += [f"mllm_{name}{label} {value:g}" for (counter, label), value in counts if counter == name]
        for name, about in GAUGES.items():
            lines += [*_head(name, "gauge", about), f"mllm_{name} {self._gauges[name]():g}"]
        return "\n".join(lines) + "\n"


LABELLED = "requests_total"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP mllm_{name} {about}", f"# TYPE mllm_{name} {kind}"]
