"""Join a frozen vision encoder and a frozen language model by a small trained connector."""

from mllm.version import __version__ as __version__
