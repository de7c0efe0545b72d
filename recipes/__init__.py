"""Recipes: YAML files only."""

if __name__ != "mllm.recipes":
    raise ImportError("This folder is installed as mllm.recipes: import it by that name (pip install -e .).")
