"""Keep frozen models that a stage asks and its model does not contain: scorers, other runs, language models."""
