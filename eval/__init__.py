"""How a model is scored: the runner, the metrics, the suites and the report."""

if __name__ != "mllm.eval":
    raise ImportError("This folder is installed as mllm.eval: import it by that name (pip install -e .).")
