"""Read images by URL: refused unless their host or folder was allowed when the server was started.

Notable: a host's addresses are looked up once and the connection goes to the address that was checked, so a name cannot
point to another address between check and use. Redirects are not followed.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mllm.errors import MLLMError
from mllm.media.data_urls import is_data_url
from mllm.media.images import MAX_BYTES

TIMEOUT = 10.0  # seconds, of each step of a download


class Remote:
    """Reads ``image_url`` values.

    Args:
        hosts: host names from which images may be downloaded.
        folders: folders from which local files may be read.
    """

    def __init__(self, hosts: Collection[str] = (), folders: Collection[Path] = ()) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._folders = [folder.resolve() for folder in folders]

    def read(self, url: str) -> str | bytes:
        """Return an image's bytes, or the data URL as it is.

        Raises:
            MLLMError: a host or folder that is not allowed, or that returns no file.
        """
        if is_data_url(url):  # first: `urlsplit` keeps the URLs that it was last given
            return url
        try:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https"):
                return self._download(url)
            if parts.scheme in ("file", ""):
                return self._file(Path(unquote(parts.path)))
        except ValueError as error:
            if isinstance(error, MLLMError):
                raise
            raise MLLMError(f"The image URL {url[:80]!r} is not valid: {error}. Send a data URL.") from None
        raise MLLMError(f"The image URL {url[:80]!r} is not read: expected a data URL.")

    def _file(self, path: Path) -> bytes:
        try:
            real = path.resolve()
            if not any(real.is_relative_to(folder) for folder in self._folders):
                raise MLLMError(f"The server does not read {str(path)[:80]!r}: send the image as a data URL.")
            if not real.is_file() or real.stat().st_size > MAX_BYTES:
                raise MLLMError(f"{str(path)[:80]!r} is no file of at most {MAX_BYTES} bytes.")
            return real.read_bytes()
        except OSError as error:
            raise MLLMError(f"{str(path)[:80]!r} cannot be read: {error.strerror}.") from None

    def _download(self, url: str) -> bytes:
        parts = urlsplit(url)
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
                body = answer.read(MAX_BYTES + 1)
            finally:
                connection.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise MLLMError(f"The image could not be downloaded from {host}: {error}.") from None
        if len(body) > MAX_BYTES:
            raise MLLMError(f"The image from {host} has more than {MAX_BYTES} bytes.")
        return body


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
