"""Read the language model's states at a head's tokens."""
