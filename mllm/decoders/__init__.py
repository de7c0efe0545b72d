"""Generate images with frozen decoders, from a condition in place of their text encoder's output."""
