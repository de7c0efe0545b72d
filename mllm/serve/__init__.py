"""A model behind HTTP: OpenAI's chat completions, and a page to talk on. Needs the extra ``serve``."""
