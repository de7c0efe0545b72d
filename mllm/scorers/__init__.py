"""Put images and texts into one space: the kinds of scorer."""
