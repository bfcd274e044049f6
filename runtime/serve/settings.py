"""`Settings`: how to serve, from a file, the environment and the command line, the later before the earlier.

The file is TOML:

    [server]
    host = "0.0.0.0"
    keys = "/etc/motet/keys.json"
    [engine]
    max_num_seqs = 32
    [tenants.acme]
    tokens_per_minute = 60000

A variable of the environment is the name of a key of `server` or `engine` in capitals, after MOTET_SERVE_.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..api.config import EngineConfig, check_keys, described
from ..errors import ConfigError, NotFoundError
from ..trust.access import Access
from ..trust.keys import KeyFile
from ..trust.quotas import TenantLimits, read_limits
from ..trust.tls import TlsFiles
from ..trust.tokens import TokenVerifier

ENVIRONMENT = "MOTET_SERVE_"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Whom a server answers, and how it ends. Raises `ConfigError` if two settings contradict each other."""

    host: str = described(
        "127.0.0.1", "Address to listen on. Others than this machine's need TLS and --keys or --jwks."
    )
    port: int = described(50051, "Port of gRPC; 0: any that is free.")
    http_port: int | None = described(None, "Answer OpenAI's HTTP API on this port too; 0: any that is free.")
    gateways: bool = described(
        False,
        "Answer the gRPC of gateways on the same port: vllm.grpc.engine.VllmEngine and KServe's inference protocol.",
    )
    state_dir: Path | None = described(
        None, "Keep batch jobs in this directory, and answer them behind other requests."
    )
    monitor_port: int | None = described(None, "HTTP with /metrics (Prometheus), /livez and /readyz on this port.")
    tls_cert: Path | None = described(None, "The server's certificate chain, PEM; read again when it changes.")
    tls_key: Path | None = described(None, "The certificate's private key, PEM.")
    tls_client_ca: Path | None = described(None, "Clients must show a certificate of these authorities, PEM (mTLS).")
    keys: Path | None = described(None, "Key file (motet keys add): callers must send one of its keys.")
    jwks: Path | None = described(None, "JSON Web Key Set, a file: callers may send a token that it verifies.")
    jwt_issuer: str | None = described(None, "The `iss` that a token must have.")
    jwt_audience: str | None = described(None, "The `aud` that a token must have.")
    insecure: bool = described(False, "Listen on an address of the network without TLS or without authentication.")
    allow_drain: bool = described(False, "Without authentication: whoever reaches the port may call Admin.Drain.")
    reflection: bool = described(False, "Answer gRPC reflection.")
    lame_duck: float = described(0.0, "Seconds between NOT_SERVING and the refusal of new requests, at the end.")
    drain_timeout: float = described(300.0, "Seconds that running requests have at the end; then they are cut.")
    send_timeout: float = described(60.0, "Seconds that a client may leave an answer unread; then it is ended.")
    stream_interval: int = described(
        1, "Tokens of a choice per message of a stream, after its first; more are fewer messages to send and to read."
    )
    ray: str | None = described(
        None, "Serve replicas on this Ray cluster: its address, auto, or local (one of this machine's own)."
    )
    replicas: int | None = described(None, "With ray: replicas, each with --threads CPUs; default: 2.")
    max_replicas: int | None = described(
        None, "With ray: most replicas; more than --replicas come and go with the load."
    )
    queued_tokens: int | None = described(
        None, "With ray: tokens that wait at a replica before there is one more; default: 4096."
    )
    audit: Path | None = described(None, "Directory of the audit log; see `motet audit`.")
    audit_content: bool = described(False, "Keep prompts and answers in the audit log, encrypted for each subject.")
    traces: bool = described(False, "Export OpenTelemetry traces by OTLP; OTEL_EXPORTER_OTLP_ENDPOINT says where.")
    otlp_metrics: bool = described(
        False,
        "Export the metrics by OTLP too; OTEL_EXPORTER_OTLP_ENDPOINT says where, OTEL_METRIC_EXPORT_INTERVAL how often.",
    )
    log_format: Literal["text", "json"] = described("text", "text, or json: one object per line.")
    log_level: Literal["debug", "info", "warning", "error"] = described("info", "What is logged, at least.")

    def __post_init__(self) -> None:
        if (
            isinstance(self.stream_interval, bool)
            or not isinstance(self.stream_interval, int)
            or self.stream_interval < 1
        ):
            raise ConfigError(f"stream_interval must be an integer of at least 1, got {self.stream_interval!r}")
        if self.send_timeout == 0:
            raise ConfigError("send_timeout must be above 0 seconds; no client reads in none")
        for name in ("lame_duck", "drain_timeout", "send_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
                raise ConfigError(f"{name} must be a number of seconds in [0, 1000000), got {value!r}")
        for name in ("port", "http_port", "monitor_port"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not 0 <= value <= 65535):
                raise ConfigError(f"{name} must be an integer in 0…65535, got {value!r}")
        for name, known in (("log_format", ("text", "json")), ("log_level", ("debug", "info", "warning", "error"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key belong together; give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError(
                "tls_client_ca asks clients for certificates, which needs TLS; give tls_cert and tls_key too"
            )
        tokens = (self.jwks, self.jwt_issuer, self.jwt_audience)
        if any(value is not None for value in tokens) and None in tokens:
            raise ConfigError("jwks, jwt_issuer and jwt_audience belong together; give all or none")
        if self.allow_drain and self.has_authentication:
            raise ConfigError("with keys or tokens the role admin may drain the server; leave allow_drain out")
        scaling = {"replicas": self.replicas, "max_replicas": self.max_replicas, "queued_tokens": self.queued_tokens}
        if self.ray is None and (given := [name for name, value in scaling.items() if value is not None]):
            raise ConfigError(f"{', '.join(given)}: these are for replicas on a Ray cluster; give ray too")
        if self.audit_content and self.audit is None:
            raise ConfigError("audit_content is part of an audit log; give audit too")
        is_safe = is_loopback(self.host) or (self.tls_cert is not None and self.has_authentication)
        if not is_safe and not self.insecure:
            missing = [] if self.tls_cert is not None else ["TLS (tls_cert, tls_key)"]
            missing += [] if self.has_authentication else ["authentication (keys, or jwks)"]
            raise ConfigError(
                f"{self.host} is reached from other machines; that needs {' and '.join(missing)}, or insecure, which says that "
                "everyone who reaches the port may do everything there and read what others send"
            )
        if is_safe and self.insecure:
            raise ConfigError("insecure permits nothing that this server would not do; leave it out")

    @property
    def has_authentication(self) -> bool:
        return self.keys is not None or self.jwks is not None

    def access(self) -> Access:
        """How callers are known. Raises what `KeyFile` and `TokenVerifier` raise."""
        if not self.has_authentication:
            return Access.open_to_all(may_drain=self.allow_drain)
        tokens = None
        if self.jwks is not None:
            assert self.jwt_issuer is not None and self.jwt_audience is not None
            tokens = TokenVerifier(self.jwks, issuer=self.jwt_issuer, audience=self.jwt_audience)
        return Access(KeyFile(self.keys) if self.keys is not None else None, tokens)

    def tls(self) -> TlsFiles | None:
        """Raises what `TlsFiles` raises."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)


@dataclass(frozen=True, slots=True)
class Settings:
    """All that `motet serve` depends on, besides the bundle."""

    server: ServerSettings = field(default_factory=ServerSettings)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        file: Path | None = None,
        environment: Mapping[str, str] | None = None,
        server: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
    ) -> Settings:
        """`server`, `engine`: what the command line says. Raises `NotFoundError`, `ConfigError` (an unknown table, key or
        variable, a value out of range), naming it."""
        tables = _read(file) if file is not None else {}
        unknown = sorted(set(tables) - {"server", "engine", "tenants"})
        if unknown:
            raise ConfigError(f"the settings '{file}' have unknown tables {unknown}; known are server, engine, tenants")
        found = {}
        for name, kind, given in (("server", ServerSettings, server), ("engine", EngineConfig, engine)):
            check_keys(kind, tables.get(name, {}))
            hints = get_type_hints(kind)
            from_file = {key: _typed(key, hints[key], value) for key, value in tables.get(name, {}).items()}
            found[name] = {**from_file, **_from_environment(hints, environment or {}), **(given or {})}
        _check_environment(environment or {})
        return cls(
            ServerSettings(**found["server"]), EngineConfig(**found["engine"]), read_limits(tables.get("tenants", {}))
        )

    def to_toml(self) -> str:
        """The settings as a file that `load` reads; what has no value is a comment."""
        lines = []
        tables = {"server": self.server, "engine": self.engine}
        tables |= {f"tenants.{name}": limits for name, limits in self.tenants.items()}
        for name, table in tables.items():
            lines.append(f"[{name}]")
            for one in dataclasses.fields(table):  # type: ignore[arg-type]
                value = getattr(table, one.name)
                text = json.dumps(str(value) if isinstance(value, Path) else value)
                lines.append(f"# {one.name} =" if value is None else f"{one.name} = {text}")
            lines.append("")
        return "\n".join(lines)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name: it may be any address


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"there is no file '{file}' with settings") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the settings '{file}' cannot be read: {error}") from None


def _from_environment(hints: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    names = {f"{ENVIRONMENT}{name.upper()}": name for name in hints}
    return {
        names[variable]: _typed(variable, hints[names[variable]], text)
        for variable, text in environment.items()
        if variable in names
    }


def _check_environment(environment: Mapping[str, str]) -> None:
    known = {
        f"{ENVIRONMENT}{one.name.upper()}"
        for kind in (ServerSettings, EngineConfig)
        for one in dataclasses.fields(kind)
    }
    unknown = sorted(name for name in environment if name.startswith(ENVIRONMENT) and name not in known)
    if unknown:
        raise ConfigError(
            f"the environment has {unknown}, which are no settings of a server; `motet serve --help` lists them"
        )


def _typed(name: str, hint: Any, value: Any) -> Any:
    """The value of a file (of TOML's types) or of the environment (text) as a field's type. Raises `ConfigError`."""
    kinds = [kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if kind is not NoneType]
    kind = str if get_origin(kinds[0]) is Literal else kinds[0]
    try:
        if isinstance(value, str):
            return _FLAGS[value.lower()] if kind is bool else kind(value)
        if isinstance(value, bool) is (kind is bool) and isinstance(value, (int, float) if kind is float else kind):
            return kind(value)
    except (KeyError, ValueError):
        pass  # refused below
    raise ConfigError(f"{name} must be {_NOUN[kind]}, got {value!r}")


_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_NOUN = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
