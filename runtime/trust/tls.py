"""`TlsFiles`: a server's certificate and key, and the authority of its clients' certificates. Changed files are read again for
new connections."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, NotFoundError
from .watched import Watched


@dataclass(frozen=True, slots=True)
class TlsContent:
    """PEM texts."""

    certificate: bytes  # the chain, leaf first
    key: bytes
    context: ssl.SSLContext  # the same, for servers of the standard library
    client_ca: bytes | None  # authorities that a client's certificate must come from; None: clients need none


class TlsFiles:
    """Raises `NotFoundError`, `ConfigError` (a file is no PEM, or the key is of another certificate) at construction."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._paths = [certificate, key, *([client_ca] if client_ca else [])]
        self._client_ca = client_ca
        for path in self._paths:
            if not path.is_file():
                raise NotFoundError(f"there is no file '{path}' for TLS")
        self.content = Watched(self._paths, self._read, "TLS certificate")

    @property
    def asks_clients(self) -> bool:
        """Whether a client must show a certificate (mTLS)."""
        return self._client_ca is not None

    def _read(self) -> TlsContent:
        certificate, key, *authority = (path.read_bytes() for path in self._paths)
        context = self._context()  # a pair that does not fit must not replace one that does
        return TlsContent(certificate, key, context, authority[0] if authority else None)

    def _context(self) -> ssl.SSLContext:
        """Raises `ConfigError`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._paths[0], self._paths[1])
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"the files of TLS do not fit together: {error}; give a certificate and its key in PEM"
            ) from None
        return context
