"""Serve a model over HTTP: OpenAI's chat completions, and a chat page. Needs the extra ``serve``."""
