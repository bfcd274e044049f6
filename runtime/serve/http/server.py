"""`HttpServer`: the HTTP door's port, with limits on connections, headers and time. uvicorn does the work."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

from ...api.limits import MAX_CONNECTIONS, MAX_METADATA_BYTES
from ...errors import InvalidRequestError, MissingPackageError, PortInUseError
from ...trust.tls import TlsFiles

try:
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError as error:
    raise MissingPackageError(
        f"the HTTP door needs packages ({error}); install them with `pip install 'motet[http]'`"
    ) from error

from .app import App
from .statuses import error_response

_HEADERS_S = 10.0  # for the headers of a request to come, from the connection or the first byte on
_KEEP_ALIVE_S = 75.0
_STOP_S = 1.0


class _Protocol(HttpToolsProtocol):
    """A connection whose headers are bounded in size and time. `extensions` of a scope has what breaks the connection."""

    _header_bytes = 0
    _in_headers = True
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        self._in_headers, self._header_bytes = True, 0
        self._stop_waiting()
        self._deadline = self.loop.call_later(_HEADERS_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_METADATA_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the headers have more than {MAX_METADATA_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """uvicorn's own is plain text."""
        body = error_response(InvalidRequestError(msg)).body
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"motet.break": {"abort": self.transport.abort}}
        self._wait_for_headers()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_headers, self._header_bytes = True, 0  # what comes now are the next request's

    def on_response_complete(self) -> None:
        """uvicorn's own timer is ended by any byte, and waits for a client that does not read."""
        super().on_response_complete()
        self._stop_waiting()
        if self.cycle.response_complete:  # else the next request is there already
            self._deadline = self.loop.call_later(_KEEP_ALIVE_S, self.transport.abort)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process has one place that takes signals, and it is not here."""
        yield


class HttpServer:
    """OpenAI's HTTP API, on a port. `start` binds the port; `port` is the bound one. It does not drain: the service
    does, for all doors."""

    def __init__(
        self,
        app: App,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: TlsFiles | None = None,
    ) -> None:
        self.host, self.port = host, port
        self._app = app
        self._tls = tls

    async def start(self) -> None:
        """Raises `PortInUseError`."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host.strip("[]"), self.port), family=family)
        except OSError as error:
            raise PortInUseError(
                f"cannot listen on {self.host}:{self.port} for HTTP ({error}); choose another --http-port"
            ) from error
        self.port = int(listener.getsockname()[1])
        config = uvicorn.Config(
            self._app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=int(_KEEP_ALIVE_S),
            timeout_graceful_shutdown=int(_STOP_S),
        )
        config.load()
        if self._tls is not None:
            config.ssl = _following(self._tls)
        self._server = _Uvicorn(config)
        self._running = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started and not self._running.done():
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Close the port; what still runs is cut."""
        self._server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self._running


def _following(tls: TlsFiles) -> ssl.SSLContext:
    """A context that has the files' certificate of the time of each handshake."""
    first = tls.content.value.context

    def follow(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = tls.content.value.context

    first.sni_callback = follow
    return first
