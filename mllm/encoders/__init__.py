"""Provide the encoders that a recipe selects with ``encoder.type``."""
