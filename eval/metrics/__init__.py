"""Score predictions: each metric is a function of predictions and references that returns a `mllm.evaluation.Score`."""
