"""The kinds of encoder: a recipe's ``encoder.type`` names them."""
