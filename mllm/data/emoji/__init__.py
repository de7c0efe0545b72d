"""Provide the embedded data set `mllm/emoji-scenes`: images of emoji."""
