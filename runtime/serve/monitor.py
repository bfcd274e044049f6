"""`Monitor`: HTTP for those who watch a server: /livez and /readyz for its supervisor, /metrics for Prometheus.

/livez is 200 while the process can go on, /readyz while it takes requests; both are open to all. /metrics needs the role
monitor. Any other path is 404.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ..errors import MotetError, PortInUseError, UnauthenticatedError
from ..trust.access import Access
from ..trust.identity import Role
from ..trust.tls import TlsFiles
from .service import Service

log = logging.getLogger("motet.monitor")
_TIMEOUT_S = 10.0  # of a connection, from its first byte to its last
_MAX_CONNECTIONS = 128


class Monitor(ThreadingHTTPServer):
    """Answers on threads of its own until `close`. `port` is the bound port. Raises `PortInUseError`."""

    daemon_threads = True

    def __init__(
        self,
        service: Service,
        registry: CollectorRegistry,
        access: Access,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: TlsFiles | None = None,
    ) -> None:
        self.service, self.registry, self.access, self.tls = service, registry, access, tls
        self._room = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise PortInUseError(f"cannot listen on {host}:{port} for metrics: {error}; choose another port") from error
        self.port = int(self.server_address[1])
        threading.Thread(target=self.serve_forever, name="motet-monitor", daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        end = threading.Timer(_TIMEOUT_S, _shut, [request])  # however slowly it trickles
        end.daemon = True
        end.start()
        try:
            request.settimeout(_TIMEOUT_S)
            if self.tls is not None:
                request = self.tls.content.value.context.wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except (ssl.SSLError, OSError) as error:
            log.info("%s: %s", client_address, error)
            self.shutdown_request(request)
        finally:
            end.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.info("a connection from %s broke", client_address, exc_info=True)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: Monitor
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        service = self.server.service
        match self.path:
            case "/livez":
                self._answer(HTTPStatus.OK if service.failure is None else HTTPStatus.SERVICE_UNAVAILABLE)
            case "/readyz":
                is_ready = service.failure is None and not service.is_leaving
                self._answer(HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)
            case "/metrics":
                self._metrics()
            case _:
                self._answer(HTTPStatus.NOT_FOUND)

    def _metrics(self) -> None:
        try:
            self.server.access.identify(self.headers.get_all("authorization", [])).require([Role.MONITOR])
        except MotetError as error:
            status = HTTPStatus.UNAUTHORIZED if isinstance(error, UnauthenticatedError) else HTTPStatus.FORBIDDEN
            self._answer(status, f"{error}\n".encode())
            return
        self._answer(HTTPStatus.OK, generate_latest(self.server.registry), CONTENT_TYPE_LATEST)

    def _answer(self, status: HTTPStatus, body: bytes | None = None, kind: str = "text/plain; charset=utf-8") -> None:
        body = f"{status.phrase}\n".encode() if body is None else body
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "motet"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
