"""The words of the field: pages, docstrings and messages use the terms of transformers, PyTorch and the papers.

Each row of `WORDS` is a pattern that is not written, and what is written instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "docs" / "reference.md"  # from docstrings and help texts, which are checked in the code
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {GENERATED})]
WORDS = {
    r"pictur(e|es|ed)": "image",
    r"learnt": "learned",
    r"h(o|e)lds?( \w+){0,4} against": "compare with",
    r"to the bit": "bit for bit",
    r"(go|goes|going|gone|went) on": "continue",
    r"what (it|they|a recipe) (will|would) take": "memory, FLOPs and time",
    r"on paper": "on the meta device",
    r"noughts?": "zeros",
    r"foret(ell|ells|old)": "predict",
    r"(tell|tells|told) in words": "replaced by the nearest tokens",
    r"(put|puts|stand|stands|stood|standing) beside": "next to, outside the sequence",
    r"(places|positions)( that)? an? image": "tokens per image",
    r"sa(y|ys|id) (a|an|the|its)( \w+)? tokens?": "generate a token",
    r"tells? \w+( \w+)? from others?": "identify",
    r"key-value states": "KV cache",
    r"stock class(es)?": "class of transformers",
    r"proves? (it|them) equal": "compare",
    r"mend(s|ed)?": "fix, repair",
    r"doors?": "entry point, access",
    r"initialis\w+": "initialize",
    r"unasked": "not requested",
    r"what stands (before|behind|there)": "the preceding tokens, the context",
    r"asked for what": "checked for",
}
ALLOWED = ("A picture of", "What is in the picture?", "The picture shows a red square")  # texts of prompts and data
FOLDERS = sorted({path.parent for name in ("mllm", "adapters", "eval") for path in (ROOT / name).rglob("*.py")})


def problems(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line, counted from 0, and the complaint about each word that is not to be written.

    Code is left out: fenced (unless it is ``text``) or in backticks.
    """
    for pattern in (r"^```(?!text)\w+\n.*?^```", r"(?<!`)`{1,2}(?!`)[^`]+`{1,2}(?!`)", *map(re.escape, ALLOWED)):
        flags = re.MULTILINE | re.DOTALL
        text = re.sub(pattern, lambda match: re.sub(r"[^\n]", "_", match[0]), text, flags=flags)
    for words, better in WORDS.items():
        pattern = r"\b(" + words.replace(" ", r"\s+") + r")\b"  # a phrase may run over the end of a line
        for match in re.finditer(pattern, text, flags=re.IGNORECASE):
            yield text.count("\n", 0, match.start()), f"{' '.join(match[0].split())!r}: better {better!r}"


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield docstrings, and the strings in ``raise`` statements and in arguments ``help``, with their lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        roots: list[ast.AST] = []
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            roots = [node.body[0]]
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.keyword) and node.arg == "help"):
            roots = [node]
        for string in (string for root in roots for string in ast.walk(root)):
            if isinstance(string, ast.Constant) and isinstance(string.value, str):
                yield string.lineno, string.value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_in_the_words_of_the_field(page: Path) -> None:
    text = page.read_text()
    if page.name == "log.md":  # its entries are dated, and stay as they were written
        text = text.split("\n## ")[0]
    assert [f"{page.relative_to(ROOT)}:{line + 1}: {problem}" for line, problem in problems(text)] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_docstrings_and_messages_are_in_the_words_of_the_field(folder: Path) -> None:
    paths = sorted(folder.glob("*.py"))
    assert paths
    complaints = [
        f"{path.relative_to(ROOT)}:{start + line}: {problem}"
        for path in paths
        for start, text in texts(ast.parse(path.read_text()))
        for line, problem in problems(text)
    ]
    assert complaints == []


def test_words_are_found_across_lines_and_code_is_left_out() -> None:
    lines = ["A picture of a cat.", "```sh", "ls pictures", "```", "It goes", "on with `pictures` and"]
    lines += ["two Pictures.", "```text", "held against it", "```"]
    assert sorted(problems("\n".join(lines))) == [
        (4, "'goes on': better 'continue'"),
        (6, "'Pictures': better 'image'"),
        (8, "'held against': better 'compare with'"),
    ]


def test_docstrings_raised_strings_and_help_are_read_and_other_strings_are_not() -> None:
    code = '''
"""module"""
def f(x=option(help="help")):
    """function"""
    print("printed")
    raise ValueError(f"raised {x}")
'''
    assert sorted(texts(ast.parse(code))) == [(2, "module"), (3, "help"), (4, "function"), (6, "raised ")]
