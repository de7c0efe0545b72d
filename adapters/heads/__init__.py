"""Turn the language model's states into something other than text: the heads."""
