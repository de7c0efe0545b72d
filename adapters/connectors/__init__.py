"""Connectors: features of the encoder to visual tokens of the language model."""
