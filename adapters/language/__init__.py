"""Adapt the frozen language model by trained modules inside it: the adapters."""
