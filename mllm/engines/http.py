"""Send requests to an engine at a URL, and read their answers line by line.

Notable: a request that is cancelled closes its connection, by which a server notices that nobody waits any more.
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import httpx2

TIMEOUT = httpx2.Timeout(None, connect=10.0)  # seconds; an answer may wait for as long as it likes


class HTTPError(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status}: {_message(body)}")
        self.status = status


@contextlib.asynccontextmanager
async def opened(url: str, body: Any = None, key: str | None = None) -> AsyncIterator[AsyncIterator[str]]:
    """Send a request, and return an iterator over the answer's lines; the connection ends with the block.

    Args:
        url: http or https.
        body: sent as JSON by POST; None: GET.
        key: a bearer token.

    Raises:
        OSError: nobody answers there, or the connection broke.
        HTTPError: the answer's status is not 200.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        async with (
            httpx2.AsyncClient(timeout=TIMEOUT, headers=headers, verify=_certificates()) as client,
            client.stream("GET" if body is None else "POST", url, json=body) as answer,
        ):
            if answer.status_code != 200:
                raise HTTPError(answer.status_code, await answer.aread())
            yield answer.aiter_lines()
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ConnectionError(str(error) or type(error).__name__) from None


async def read_json(url: str, body: Any = None, key: str | None = None) -> Any:
    """Return the JSON of an answer.

    Raises:
        OSError: as `opened`.
        HTTPError: as `opened`.
        ValueError: it is not JSON.
    """
    async with opened(url, body, key) as lines:
        return json.loads("\n".join([line async for line in lines]))


@cache
def _certificates() -> ssl.SSLContext:
    """Return the system's certificates, which take long to read."""
    return ssl.create_default_context()


def _message(body: bytes) -> str:
    """Return what an error says, in OpenAI's schema or another one."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        error = json.loads(body)
        error = error.get("error", error)
        return str(error["message"] if "message" in error else error["detail"])[:500]
    return body.decode("utf-8", errors="replace").strip()[:200] or "no message"
