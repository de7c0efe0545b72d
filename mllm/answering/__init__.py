"""From prompts to answers: texts, conversations, images that are found or made."""
