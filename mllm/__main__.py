"""Run the command line: print an error that the user can fix as one message, and others with their traceback."""

from __future__ import annotations

import logging
import os
import sys

from mllm.errors import MLLMError
from mllm.system import keep_freed_memory


def main() -> None:
    """Run `mllm`: status 0; 1 with one message where the user can fix it; 2 for wrong usage."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes warns on import of an optional package that nothing here needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    keep_freed_memory()
    debug = "--debug" in sys.argv
    from mllm.cli.app import app

    try:
        app(args=[argument for argument in sys.argv[1:] if argument != "--debug"], prog_name="mllm")
    except MLLMError as error:
        if debug:
            raise
        sys.exit(f"mllm: {error}")
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if debug or error.errno is None:
            raise
        sys.exit(
            f"mllm: {str(error.filename or 'a file')[:200]}: {error.strerror}. Check the path, and the disk's space."
        )
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
