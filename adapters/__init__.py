"""Everything that is trained: connectors, adapters in the language model, heads."""

if __name__ != "mllm.adapters":
    raise ImportError("This folder is installed as mllm.adapters: import it by that name (pip install -e .).")
