"""Metrics, each a function from predictions and references to a `mllm.evaluation.Score`."""
