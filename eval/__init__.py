"""Evaluate models: suites, answer modes, metrics, reports."""

if __name__ != "mllm.eval":
    raise ImportError("This folder is installed as mllm.eval: import it by that name (pip install -e .).")
