"""Export a model as an equivalent transformers class, and verify that both compute the same."""
