"""Train these modules: connectors, adapters inside the language model, and heads."""

if __name__ != "mllm.adapters":
    raise ImportError("This folder is installed as mllm.adapters: import it by that name (pip install -e .).")
