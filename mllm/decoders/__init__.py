"""Image decoders: frozen; a condition to an image, in the place of the text that it was made for."""
