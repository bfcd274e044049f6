"""`Connection`: how a client reaches a server: address, TLS, and the key that it shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ..api.limits import MAX_MEDIA_BYTES, MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from ..errors import ConfigError, NotFoundError
from ..serve.settings import is_loopback

OPTIONS = [
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES + MAX_MEDIA_BYTES),  # how much, the server says
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A connection that broke without a word is noticed while an answer is awaited.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True, slots=True)
class Connection:
    """`ca`: with TLS, the authorities of the server's certificate, PEM; `tls` alone means those of the system.
    `certificate` and `certificate_key`: the client's own, for servers that ask for one (mTLS). `key`: a key of `motet keys
    add`, or a token; it goes over TLS, or to this machine, and nowhere else.

    Raises `ConfigError`, `NotFoundError`.
    """

    address: str = "127.0.0.1:50051"
    key: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.certificate_key is None):
            raise ConfigError("a client's certificate and its key belong together; give both or none")
        if self.key is not None and (not self.key or not self.key.isascii() or not self.key.isprintable()):
            raise ConfigError("a key is printable ASCII text; this one is not")
        host, is_local = self.address.rpartition(":")[0], self.address.startswith(("unix:", "unix-abstract:"))
        if self.key is not None and not self.is_encrypted and not is_loopback(host) and not is_local:
            raise ConfigError(
                f"a key must not travel to {self.address} unencrypted; connect with TLS (tls, or ca with the server's authority)"
            )

    @property
    def is_encrypted(self) -> bool:
        return self.tls or self.ca is not None or self.certificate is not None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call shows."""
        return () if self.key is None else (("authorization", f"Bearer {self.key}"),)

    def channel(self) -> grpc.Channel:
        if not self.is_encrypted:
            return grpc.insecure_channel(self.address, options=OPTIONS)
        return grpc.secure_channel(self.address, self._credentials(), options=OPTIONS)

    def aio_channel(self) -> grpc.aio.Channel:
        if not self.is_encrypted:
            return grpc.aio.insecure_channel(self.address, options=OPTIONS)
        return grpc.aio.secure_channel(self.address, self._credentials(), options=OPTIONS)

    def _credentials(self) -> Any:
        files = [None if path is None else _read(path) for path in (self.ca, self.certificate_key, self.certificate)]
        return grpc.ssl_channel_credentials(*files)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"'{path}' cannot be read: {error}") from None
