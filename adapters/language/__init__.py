"""Adapters: trained modules inside the frozen language model, a file each."""
