"""The terminal's side of a chat: lines in, the answer as it is written, and a few commands."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mllm.answering.chat import Chat
from mllm.errors import MLLMError, near
from mllm.outputs import with_files

HELP = {
    "/image PATH": "add a picture to what is said next",
    "/reset": "start the conversation anew",
    "/drop": "forget the oldest question and its answer",
    "/save PATH": "write the conversation as JSON",
    "/help": "show this list",
    "/exit": "end (also: the end of the input)",
}
COMMANDS = [line.split()[0] for line in HELP]


def converse(chat: Chat, images: Sequence[Path] = (), show: dict[str, Any] | None = None, **decoding: Any) -> None:
    """Read lines until the input ends; answer each, or do what it commands.

    Args:
        chat: the conversation.
        images: of the first turn.
        show: ``folder`` for images that are made, and what `Chat.show` takes; None: answers are words, as they come.
        decoding: fields of `transformers.GenerationConfig`.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it gives `input` line editing and history
    console = Console(highlight=False)
    if sys.stdin.isatty():
        console.print("Type a question; /help lists what else can be typed.", style="dim")
    waiting = list(images)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/exit":
                return
            if line.startswith("/"):
                _command(console, chat, waiting, line)
            elif line:
                _say(console, chat, line, waiting, show, decoding)
        except (EOFError, KeyboardInterrupt):
            return
        except MLLMError as error:  # the conversation goes on
            console.print(f"mllm: {error}", style="red", markup=False)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the messages of a saved conversation.

    Raises:
        MLLMError: the file cannot be read, or is no list of messages.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MLLMError(f"The conversation {path} cannot be read: {error}.") from None
    if not isinstance(messages, list):
        raise MLLMError(f"{path} holds no conversation: expected a list of messages, as /save writes it.")
    return messages


def _say(
    console: Console,
    chat: Chat,
    line: str,
    waiting: list[Path],
    show: dict[str, Any] | None,
    decoding: dict[str, Any],
) -> None:
    if show is None:
        for new in chat.stream(line, list(waiting), **decoding):
            console.print(new, end="", markup=False, soft_wrap=True)
        console.print()
    else:
        options = {key: value for key, value in show.items() if key != "folder"}
        output = chat.show(line, list(waiting), **options, **decoding)
        console.print(with_files(output, show["folder"]), markup=False, soft_wrap=True)
    waiting.clear()


def _command(console: Console, chat: Chat, waiting: list[Path], line: str) -> None:
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise MLLMError(f"No command is called {name!r}. {near(name, COMMANDS)}")
    if name in ("/image", "/save") and not argument.strip():
        raise MLLMError(f"{name} needs a path: {name} PATH.")
    if name == "/image":
        path = Path(argument.strip()).expanduser()
        if not path.is_file():
            raise MLLMError(f"There is no picture file {str(path)!r}.")
        waiting.append(path)
        console.print(f"{path.name}: goes with what you say next.", style="dim", markup=False)
    elif name == "/save":
        console.print(f"Saved: {chat.save(Path(argument.strip()).expanduser())}", style="dim", markup=False)
    elif name == "/reset":
        chat.reset()
        waiting.clear()
    elif name == "/drop":
        chat.drop()
    else:
        for typed, meaning in HELP.items():
            console.print(f"  {typed:<14}{meaning}", markup=False)
