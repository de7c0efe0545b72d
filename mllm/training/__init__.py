"""Train a recipe: stages, the loop, checkpoints and the run."""
