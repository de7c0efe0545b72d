"""Parse YAML that a person wrote, or that was damaged: every fault is one message, and none ends the process.

Notable: libyaml composes nested values by recursion in C, which 100,000 brackets crash, so the depth is checked before.
A message names the line and never quotes the text: the file may be one that was named by mistake, with secrets in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mllm.errors import MLLMError
from mllm.system import read_regular

DEPTH = 50  # of nested lists and mappings
SIZE = 2**20  # bytes
INTEGERS = range(-(2**63), 2**63)
_OPENING = (yaml.SequenceStartEvent, yaml.MappingStartEvent)
_CLOSING = (yaml.SequenceEndEvent, yaml.MappingEndEvent)
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """Return the plain content of a YAML file; interpolations in it stay as they are written.

    Raises:
        MLLMError: the file is missing, no regular file, too large, or not YAML.
    """
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        MLLMError: the file is missing, no regular file, too large, or not UTF-8.
    """
    label = str(path)[:200]
    try:
        data = read_regular(path)
        if len(data) > SIZE:
            raise MLLMError(f"{label} is larger than {SIZE // 2**20} MiB. Expected a YAML file of a few kilobytes.")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MLLMError(f"{label} cannot be read: it is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        reason = error.strerror or error
        raise MLLMError(f"{label!r} cannot be read: {reason}. Check the path.") from None


def mapping_of(values: Any, label: str) -> dict[str, Any]:
    """Return a file's content, which has to be a mapping.

    Raises:
        MLLMError: it is another value.
    """
    if not isinstance(values, dict):
        raise MLLMError(f"{label} is no mapping of keys to values. Give another file.")
    return values


def parse_yaml(text: str, label: str) -> Any:
    """Return the plain content of a YAML text; interpolations in it stay as they are written.

    Raises:
        MLLMError: it is not YAML, is nested too deeply, or has an integer beyond 64 bits.
    """
    try:
        _check_depth(text)
        content = OmegaConf.create(text)
        values = {} if content is None else OmegaConf.to_container(content)
        _check_integers(values)
    except Exception as error:  # tags are converted by Python's own constructors, each with errors of its own
        raise MLLMError(f"{label} is not a YAML file: {_reason(error)}. Correct it.") from None
    return values


def resolved(values: Any, label: str) -> Any:
    """Return plain values with their interpolations, ``${another.key}``, replaced by the keys' values.

    Raises:
        MLLMError: an interpolation names no key, or calls a function (``${oc.env:HOME}``): a recipe reads nothing
            outside of itself, neither the environment nor the time.
    """
    for text in _texts(values):
        if _calls(text):
            raise MLLMError(
                f"{label}: {text[:80]!r} reads something outside of the file. Only ${{another.key}} is possible: write "
                "the value itself, or set it by an override."
            )
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        raise MLLMError(f"{label}: {_reason(error)}. Text with ${{...}} in it names another key.") from None


def _check_depth(text: str) -> None:
    """Read the text event by event, which needs no recursion, up to the first that is too deep."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, _OPENING) - isinstance(event, _CLOSING)
        if depth > DEPTH:
            raise MLLMError(f"it is nested deeper than {DEPTH} levels")


def _check_integers(values: Any) -> None:
    for value in _scalars(values):
        if isinstance(value, int) and value not in INTEGERS:
            raise MLLMError("it has an integer beyond 64 bits")


def _calls(text: str) -> bool:
    """Whether an interpolation in a text has a colon, which only a call of a function has."""
    depth = 0
    for index, character in enumerate(text):
        if text.startswith("${", index):
            depth += 1
        elif depth and character == "}":
            depth -= 1
        elif depth and character == ":":
            return True
    return False


def _texts(values: Any) -> Iterator[str]:
    return (value for value in _scalars(values) if isinstance(value, str))


def _scalars(values: Any) -> Iterator[Any]:
    """Yield the keys and values inside lists and mappings."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from _scalars(value)
    elif isinstance(values, list):
        for value in values:
            yield from _scalars(value)
    else:
        yield values


def _reason(error: Exception) -> str:
    """Return what is wrong, with the line where it is known, and without the text itself."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        return place + (error.problem or error.context or "it is not YAML").partition("\n")[0].rstrip(".")
    if isinstance(error, yaml.YAMLError):
        return "it has characters that YAML does not allow"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, (MLLMError, OmegaConfBaseException)):
        return str(error).partition("\n")[0].rstrip(".")
    return f"a value is none of its type ({type(error).__name__})"
