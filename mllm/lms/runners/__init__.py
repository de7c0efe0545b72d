"""The ways a language model is run."""
