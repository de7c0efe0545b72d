"""Send requests over HTTP/1.1 and read their answers line by line, in asyncio: enough for an engine at a URL.

Notable: a request that is cancelled closes its connection, by which a server notices that nobody waits any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

CONNECT = 10.0  # seconds
LONGEST = 2**24  # bytes of a line


class HTTPError(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status}: {_message(body)}")
        self.status = status


@contextlib.asynccontextmanager
async def opened(url: str, body: Any = None, key: str | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
    """Send a request, and return an iterator over the answer's lines; the connection ends with the block.

    Args:
        url: http or https; what it has beside host and path is ignored.
        body: sent as JSON by POST; None: GET.
        key: a bearer token.

    Raises:
        OSError: nobody answers there, or the connection broke.
        HTTPError: the answer's status is not 200.
    """
    parts = urlsplit(url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if secure else 80)
    connecting = asyncio.open_connection(parts.hostname, port, ssl=secure, limit=LONGEST)
    reader, writer = await asyncio.wait_for(connecting, CONNECT)
    try:
        writer.write(_request(parts.path or "/", parts.netloc.rpartition("@")[2], body, key))
        await writer.drain()
        status, headers = await _head(reader)
        lines = _lines(_body(reader, headers))
        if status != 200:
            raise HTTPError(status, b"".join([line async for line in lines]))
        yield lines
    except asyncio.IncompleteReadError:
        raise ConnectionError("the connection ended within an answer") from None
    finally:
        writer.close()


async def read_json(url: str, body: Any = None, key: str | None = None) -> Any:
    """Return the JSON of an answer.

    Raises:
        OSError: as `opened`.
        HTTPError: as `opened`.
        ValueError: it is not JSON.
    """
    async with opened(url, body, key) as lines:
        return json.loads(b"".join([line async for line in lines]))


def _request(path: str, host: str, body: Any, key: str | None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [] if body is None else ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Return the status and the headers of an answer.

    Raises:
        OSError: this is no answer of HTTP.
    """
    first = await reader.readline()
    words = first.split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ConnectionError("the answer is not HTTP" if first else "the connection ended before an answer")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Yield the pieces of a body, as they arrive."""
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readuntil(b"\n")
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(2**16):
            yield piece


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of pieces, each with its end; the last may have none."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _message(body: bytes) -> str:
    """Return what an error says, in OpenAI's schema or another one."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        error = json.loads(body)
        error = error.get("error", error)
        return str(error["message"] if "message" in error else error["detail"])[:500]
    return body.decode("utf-8", errors="replace").strip()[:200] or "no message"
