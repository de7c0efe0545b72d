"""Check a recipe, and estimate its memory, FLOPs and time, before anything is loaded."""
