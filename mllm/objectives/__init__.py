"""The kinds of objective, each found by its name in the registry; what every one is: `mllm.slots`."""
