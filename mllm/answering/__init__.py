"""Answer prompts: with texts, in conversations, and with images that are retrieved or drawn."""
