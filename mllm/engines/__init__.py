"""Engines: what runs a language model's layers on prompts' embeddings, in this process, in another one or at a URL."""
