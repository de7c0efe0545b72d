"""Run a chat in the terminal: read lines, stream the answers, and run the chat's commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mllm.answering.chat import Chat
from mllm.errors import MLLMError, near
from mllm.outputs import with_files
from mllm.system import read_json

HELP = {
    "/image PATH": "add an image to the next message",
    "/reset": "start a new conversation",
    "/drop": "remove the oldest question and its answer",
    "/save PATH": "save the conversation as JSON",
    "/help": "show this list",
    "/exit": "exit (also at the end of the input)",
}
COMMANDS = [line.split()[0] for line in HELP]


def converse(chat: Chat, images: Sequence[Path] = (), show: dict[str, Any] | None = None, **decoding: Any) -> None:
    """Read lines until the input ends; answer each, or run it as a command.

    Args:
        chat: the conversation.
        images: images of the first turn.
        show: ``folder`` for generated images, and arguments of `Chat.show`; None: answers are streamed text.
        decoding: fields of `transformers.GenerationConfig`.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it adds line editing and history to `input`
    console = Console(highlight=False)
    if sys.stdin.isatty():
        console.print("Type a question, or /help for the list of commands.", style="dim")
    pending = list(images)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/exit":
                return
            if line.startswith("/"):
                _command(console, chat, pending, line)
            elif line:
                _answer(console, chat, line, pending, show, decoding)
        except (EOFError, KeyboardInterrupt):
            return
        except MLLMError as error:  # the conversation continues
            console.print(f"mllm: {error}", style="red", markup=False)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the messages of a saved conversation.

    Raises:
        MLLMError: the file cannot be read, or is not a list of messages.
    """
    try:
        messages = read_json(path)
    except (OSError, ValueError) as error:
        raise MLLMError(
            f"The conversation {path} cannot be read: {error}. Give a file that /save has written."
        ) from None
    if not isinstance(messages, list):
        raise MLLMError(
            f"{path} is not a conversation: expected a list of messages. Give a file that /save has written."
        )
    return messages


def _answer(
    console: Console,
    chat: Chat,
    line: str,
    pending: list[Path],
    show: dict[str, Any] | None,
    decoding: dict[str, Any],
) -> None:
    """Print the answer to a line, and clear the pending images."""
    if show is None:
        for text in chat.stream(line, list(pending), **decoding):
            console.print(text, end="", markup=False, soft_wrap=True)
        console.print()
    else:
        options = {key: value for key, value in show.items() if key != "folder"}
        output = chat.show(line, list(pending), **options, **decoding)
        console.print(with_files(output, show["folder"]), markup=False, soft_wrap=True)
    pending.clear()


def _command(console: Console, chat: Chat, pending: list[Path], line: str) -> None:
    """Run a command of the chat."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise MLLMError(f"No command is called {name!r}. {near(name, COMMANDS)}")
    if name in ("/image", "/save") and not argument.strip():
        raise MLLMError(f"{name} needs a path: {name} PATH.")
    if name == "/image":
        path = Path(argument.strip()).expanduser()
        if not os.path.isfile(path):
            raise MLLMError(f"There is no image file {str(path)[:200]!r}. Check the path.")
        pending.append(path)
        console.print(f"{path.name}: added to your next message.", style="dim", markup=False)
    elif name == "/save":
        console.print(f"Saved: {chat.save(Path(argument.strip()).expanduser())}", style="dim", markup=False)
    elif name == "/reset":
        chat.reset()
        pending.clear()
    elif name == "/drop":
        chat.drop()
    else:
        for command, description in HELP.items():
            console.print(f"  {command:<14}{description}", markup=False)
