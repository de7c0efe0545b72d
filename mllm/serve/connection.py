"""Run the server: requests that arrive within a deadline, and an end within a stated time.

Notable: uvicorn has no deadline for a request that is sent in part, its head or its body, and waits for it at SIGTERM.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mllm.errors import MLLMError
from mllm.serve.schema import Limits, error_response, invalid_request

LINGER = 2.0  # seconds after the deadline in which a client is told that its request was too slow


class Connection(H11Protocol):
    """A connection that is closed when a request was not sent completely before the deadline.

    Args:
        deadline: seconds for a request, from the end of the one before it.
        most: connections at the same time; further ones are closed.
        options: of uvicorn's.
    """

    def __init__(self, *, deadline: float, most: int, **options: Any) -> None:
        super().__init__(**options)
        self._deadline, self._most = deadline + LINGER, most
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a new connection."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        super().connection_lost(exc)
        self._stop()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._time()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._time()

    def shutdown(self) -> None:
        """Close the connection if no whole request is being answered; else after its answer."""
        if self._half_sent:
            self.transport.close()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in OpenAI's schema."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            self.transport.close()
            return
        response = error_response(invalid_request(f"This is not a request of HTTP/1.1: {msg}"))
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _half_sent(self) -> bool:
        """Whether a request is missing or incomplete."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _time(self) -> None:
        """Start the clock where a request is incomplete, stop it where it is complete."""
        if not self._half_sent or self.transport.is_closing():
            self._stop()
        elif self._clock is None:
            self._clock = self.loop.call_later(self._deadline, self.transport.abort)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


def make_server(app: Any, limits: Limits, **options: Any) -> uvicorn.Server:
    """Return a server of an app.

    Args:
        app: from `mllm.serve.app.create_app`.
        limits: of requests.
        options: of ``uvicorn.Config``.
    """
    connection: Any = functools.partial(Connection, deadline=limits.deadline, most=limits.connections)
    settings = {"http": connection, "ws": "none", "timeout_keep_alive": 5, "timeout_graceful_shutdown": limits.grace}
    return uvicorn.Server(uvicorn.Config(app, **settings, **options))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, and does not listen yet.

    Raises:
        MLLMError: it cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MLLMError(
            f"The server cannot listen on {host}, port {port}: {reason}. Choose another --host or --port; "
            "port 0 is any free one."
        ) from None
    return bound


def run(app: Any, limits: Limits, bound: socket.socket) -> None:
    """Serve an app on a bound socket until SIGTERM or Ctrl-C.

    Raises:
        MLLMError: another process listens on the address by now.
    """
    host, port = bound.getsockname()[:2]
    server = make_server(app, limits, log_level="info")
    try:
        bound.listen()
    except OSError as error:
        raise MLLMError(f"The server cannot listen on {host}, port {port}: {error.strerror}.") from None
    logger = logging.getLogger("uvicorn.error")
    logger.info("Requests need up to %.1f GB of memory, next to the model", limits.memory / 1e9)
    logger.info("mllm running on http://%s:%d (Ctrl-C: quit)", f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[bound])
