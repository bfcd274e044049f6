"""`motet serve`, `motet keys`, `motet audit`, `motet top`: serving a bundle, and who may use it."""

from __future__ import annotations

import json
import os
import sys
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import given_options
from .parameter_options import with_parameters
from .runtime.api.config import EngineConfig
from .runtime.errors import ConfigError
from .runtime.serve.settings import ServerSettings, Settings
from .runtime.trust.identity import Role
from .tables import table

if TYPE_CHECKING:
    from .runtime.serve.run import OpenEngine

keys = typer.Typer(no_args_is_help=True, help="Bearer keys of a server.")
audit = typer.Typer(no_args_is_help=True, help="The audit log of a server.")
KeyFileArgument = Annotated[Path, typer.Argument(help="The key file, which `motet serve --keys` reads.")]
_SHOWN_OF_CALL = ("seq", "time", "method", "tenant", "subject", "peer", "request_id", "bundle")
AuditArgument = Annotated[Path, typer.Argument(help="The directory that `motet serve --audit` writes.")]


def mount(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(serve)
    app.add_typer(keys, name="keys")
    app.add_typer(audit, name="audit")


@with_parameters("engine", EngineConfig())
@with_parameters("server", ServerSettings())
def serve(
    typed: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(help="Directory of the bundle.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings, TOML; the environment (MOTET_SERVE_…) and options come before them.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings that hold, and end.")
    ] = False,
    *,
    server: ServerSettings,
    engine: EngineConfig,
) -> None:
    """Serve a bundle over gRPC. Exit code 0: it was told to end; 1: it failed, and may be started again; 2: its settings or
    the bundle are wrong."""
    given = given_options(typed)
    settings = Settings.load(
        config,
        os.environ,
        server={name: getattr(server, name) for name in ServerSettings.__dataclass_fields__ if name in given},
        engine={name: getattr(engine, name) for name in EngineConfig.__dataclass_fields__ if name in given},
    )
    if print_config:
        print(settings.to_toml(), end="")
        return
    if bundle is None:
        raise ConfigError("give the directory of a bundle to serve")
    from .runtime.serve.run import logging_as
    from .runtime.serve.run import serve as run

    with logging_as(settings.server):
        run(bundle, settings, _engine_of(settings.server))


def _engine_of(server: ServerSettings) -> OpenEngine:
    """In this process, or on a Ray cluster."""
    if server.ray is None:
        from .runtime.engine.engine import Engine

        return Engine.from_bundle
    from .runtime.cluster.engine import ClusterEngine
    from .runtime.cluster.settings import ClusterSettings

    names = ("replicas", "max_replicas", "queued_tokens")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(server, name)) is not None}
    chosen = ClusterSettings(server.ray, **given)
    return lambda bundle, config: ClusterEngine(bundle, config, chosen)


@keys.command("add")
def add(
    file: KeyFileArgument,
    tenant: Annotated[str, typer.Option(help="Whose queue, quotas and cached prefixes it uses.")],
    role: Annotated[list[Role] | None, typer.Option(help="May be given several times; default: infer.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Days after which it expires; default: never.")] = None,
) -> None:
    """Add a key and print it. It is shown this once: the file holds its digest."""
    from .runtime.trust.keys import add_key

    print(add_key(file, tenant, role or [Role.INFER], lifetime_s=None if days is None else days * 86_400))


@keys.command("list")
def list_keys(file: KeyFileArgument) -> None:
    """Show whose keys there are."""
    from rich.console import Console

    from .runtime.trust.keys import read_keys

    def day(seconds: float | None) -> str:
        return "" if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "minutes")

    rows = [
        [key.id, key.tenant, ", ".join(key.roles), day(key.created), day(key.expires), day(key.revoked)]
        for key in read_keys(file)
    ]
    width = None if sys.stdout.isatty() else 160  # a pipe has none, and rich's default of 80 would cut names off
    Console(width=width).print(table(str(file), ["id", "tenant", "roles", "created", "expires", "revoked"], rows))


@keys.command("revoke")
def revoke(file: KeyFileArgument, key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Revoke a key. A running server refuses it from the next call on."""
    from .runtime.trust.keys import revoke_key

    revoke_key(file, key_id)


@audit.command("verify")
def verify_audit(directory: AuditArgument) -> None:
    """Check that no record was changed, removed or moved, and name the calls that have begun and not ended: they still run, or
    the server was killed. Keep the head elsewhere: it proves that all was not rewritten."""
    from .runtime.trust.audit.chain import verify

    report = verify(directory)
    print(f"records {report.first} to {report.last} are whole; head {report.head}")
    for record in report.unended:
        values = {
            name: json.dumps(record[name]) for name in _SHOWN_OF_CALL if record.get(name)
        }  # some are the caller's texts
        print("not ended: " + " ".join(f"{name}={value}" for name, value in values.items()))


@audit.command("show")
def show_audit(directory: AuditArgument) -> None:
    """Print the records, one JSON object per line, with the texts that were kept and not erased."""
    from .runtime.trust.audit.reader import records

    for record in records(directory):
        print(json.dumps(record, ensure_ascii=False))


@audit.command("erase")
def erase_audit(
    directory: AuditArgument, subject: Annotated[str, typer.Option(help="TENANT/SUBJECT, as in the records.")]
) -> None:
    """Make all texts of a subject unreadable. The records stay and the chain stays whole."""
    from .runtime.trust.audit.reader import erase

    erase(directory, subject)


@audit.command("prune")
def prune_audit(
    directory: AuditArgument, before: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="A day, UTC.")]
) -> None:
    """Remove the records of the days before one. Not while a server writes."""
    from .runtime.trust.audit.reader import prune

    day: date = before.date()
    print(f"{prune(directory, day)} records removed")
