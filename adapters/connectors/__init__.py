"""Map the encoder's features to visual tokens of the language model: the connectors."""
