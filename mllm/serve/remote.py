"""Read images by URL: refused unless their host or folder was allowed when the server was started.

Notable: a host's addresses are looked up once and the connection goes to the address that was checked, so a name cannot
point to another address between check and use. Redirects are not followed.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from mllm.errors import MLLMError
from mllm.media.images import MAX_BYTES

TIMEOUT = 10.0  # seconds, of each step of a download
CHUNK = 2**20  # bytes that are read at a time
MAX_URL = 8192  # characters


class Remote:
    """Reads ``image_url`` values.

    Args:
        hosts: host names from which images may be downloaded.
        folders: folders from which local files may be read.
        seconds: of a whole download, at most.
    """

    def __init__(self, hosts: Collection[str] = (), folders: Collection[Path] = (), seconds: float = 30.0) -> None:
        self._seconds = seconds
        self._hosts = {host.lower() for host in hosts}
        self._folders = [folder.resolve() for folder in folders]

    def read(self, url: str, limit: int = MAX_BYTES) -> bytes:
        """Return an image's bytes.

        Args:
            url: of a host or file, and no data URL.
            limit: of its bytes.

        Raises:
            MLLMError: a host or folder that is not allowed, or that returns no file.
        """
        if len(url) > MAX_URL:  # `urlsplit` keeps the URLs that it was last given
            raise MLLMError(f"The image URL cannot be read: {len(url)} characters, at most {MAX_URL}. Send a data URL.")
        try:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https"):
                return self._download(parts, limit)
            if parts.scheme in ("file", ""):
                return self._file(Path(unquote(parts.path)), limit)
        except ValueError as error:
            if isinstance(error, MLLMError):
                raise
            raise MLLMError(f"The image URL {url[:80]!r} is not valid: {error}. Send a data URL.") from None
        raise MLLMError(f"The image URL {url[:80]!r} is not read: expected a data URL.")

    def _file(self, path: Path, limit: int) -> bytes:
        try:
            real = path.resolve()
            if not any(real.is_relative_to(folder) for folder in self._folders):
                raise MLLMError(f"The server does not read {str(path)[:80]!r}: send the image as a data URL.")
            if not real.is_file() or real.stat().st_size > limit:
                raise MLLMError(f"{str(path)[:80]!r} is no file of at most {limit} bytes.")
            return real.read_bytes()
        except OSError as error:
            raise MLLMError(f"{str(path)[:80]!r} cannot be read: {error.strerror}.") from None

    def _download(self, parts: SplitResult, limit: int) -> bytes:
        host = (parts.hostname or "").lower()
        if host not in self._hosts:
            raise MLLMError(f"The server does not download from {host!r}: send the image as a data URL.")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            connection = _connect(parts.scheme, host, port, public_address(host, port))
            try:
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", path, headers={"Host": parts.netloc.rpartition("@")[2]})
                answer = connection.getresponse()
                if answer.status != 200:  # a redirect too
                    raise MLLMError(f"{host} answered {answer.status} for the image; redirects are not followed.")
                body = self._body(answer, host, limit)
            finally:
                connection.close()
        except MLLMError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise MLLMError(f"The image could not be downloaded from {host}: {error}.") from None
        return body

    def _body(self, answer: http.client.HTTPResponse, host: str, limit: int) -> bytes:
        """Return the body of an answer, which arrives in time.

        Raises:
            MLLMError: it has too many bytes, or is too slow.
        """
        body, until = bytearray(), time.monotonic() + self._seconds
        while chunk := answer.read1(CHUNK):
            body += chunk
            if len(body) > limit:
                raise MLLMError(f"The image from {host} has more than {limit} bytes.")
            if time.monotonic() > until:
                raise MLLMError(f"The image from {host} did not arrive in {self._seconds:g} seconds.")
        if answer.length:
            raise MLLMError(f"The image from {host} is incomplete: {answer.length} bytes are missing.")
        return bytes(body)


def public_address(host: str, port: int) -> str:
    """Return an address of a host.

    Raises:
        MLLMError: any of its addresses is private, local or reserved.
    """
    addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(ipaddress.ip_address(address).is_global for address in addresses):
        raise MLLMError(f"{host} has a private address: nothing is downloaded from there.")
    return addresses[0]


def _connect(scheme: str, host: str, port: int, address: str) -> http.client.HTTPConnection:
    """Return a connection to a checked address; the certificate must be the host's."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    sock = socket.create_connection((address, port), timeout=TIMEOUT)
    connection.sock = (
        ssl.create_default_context().wrap_socket(sock, server_hostname=host) if scheme == "https" else sock
    )
    return connection
