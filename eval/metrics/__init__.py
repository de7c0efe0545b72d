"""Metrics, each a function from predictions and references to a `mllm.scores.Score`."""
