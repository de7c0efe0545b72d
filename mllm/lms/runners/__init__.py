"""Run a language model of transformers on embeddings; `base.Runner` is the protocol."""
