"""Embed images and texts in one space, and score their similarity."""
