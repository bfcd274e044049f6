"""`motet top`: what a server is doing, in the terminal, from its /metrics."""

from __future__ import annotations

import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from .options import KEY_VARIABLE
from .runtime.errors import ConfigError, UnauthenticatedError, UnavailableError
from .runtime.serve.settings import is_loopback
from .tables import table

Series = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]  # (name, labels) → value
_TIMEOUT_S = 5.0


def mount(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(top)


def top(
    address: Annotated[str, typer.Argument(help="host:port of `motet serve --monitor-port`.")] = "127.0.0.1:9100",
    ca: Annotated[Path | None, typer.Option(help="The monitor has TLS; these authorities vouch for it (PEM).")] = None,
    cert: Annotated[Path | None, typer.Option(help="This client's certificate and key in one file (PEM).")] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look over the interval, and end.")] = False,
) -> None:
    """Show load, speed and waiting times of a server, by tenant too. The environment's MOTET_KEY has a key with the role
    monitor, if the server asks for one."""
    before, started = read_metrics(address, ca, cert), time.monotonic()
    with Live(console=Console(), auto_refresh=False, transient=once) as live:
        while True:
            time.sleep(interval)
            now, at = read_metrics(address, ca, cert), time.monotonic()
            frame = view(before, now, at - started)
            if once:
                live.console.print(frame)
                return
            live.update(frame, refresh=True)
            before, started = now, at


def read_metrics(
    address: str, ca: Path | None, cert: Path | None = None
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All series of a server. Raises `UnavailableError`, `UnauthenticatedError`, `ConfigError`."""
    from prometheus_client.parser import text_string_to_metric_families

    if cert is not None and ca is None:
        raise ConfigError("--cert is for TLS; give --ca too")
    request = urllib.request.Request(f"{'http' if ca is None else 'https'}://{address}/metrics")
    if key := os.environ.get(KEY_VARIABLE):
        if ca is None and not is_loopback(address.rpartition(":")[0]):
            raise ConfigError(f"a key must not travel to {address} unencrypted; give --ca, or unset {KEY_VARIABLE}")
        request.add_header("Authorization", f"Bearer {key}")
    try:
        context = None if ca is None else ssl.create_default_context(cafile=ca)
        if context is not None and cert is not None:
            context.load_cert_chain(cert)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UnauthenticatedError(
                f"the server asks for a key with the role monitor; put one into {KEY_VARIABLE}"
            ) from None
        raise UnavailableError(f"{address} answered {error.code}; is it the port of --monitor-port?") from None
    except (OSError, ValueError) as error:
        if ca is not None and not ca.is_file():
            raise ConfigError(f"there is no file '{ca}'") from None
        raise UnavailableError(f"nothing answers at {address}: {error}; start the server with --monitor-port") from None
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def view(before: Series, now: Series, seconds: float) -> Group:
    """Two looks, `seconds` apart, as tables."""

    def value(name: str) -> float:
        return now.get((name, ()), 0.0)

    def rate(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return (now.get(key, 0.0) - before.get(key, 0.0)) / seconds

    prompts, blocks = rate("motet_prompt_tokens_total"), value("motet_blocks")
    load = [
        ["running / waiting", f"{value('motet_running_choices'):.0f} / {value('motet_waiting_choices'):.0f}"],
        ["tokens per second, answers / prompts", f"{rate('motet_tokens_total'):.1f} / {prompts:.1f}"],
        ["KV cache in use", f"{1 - value('motet_free_blocks') / blocks:.0%}" if blocks else "–"],
        ["prompt tokens found in the cache", f"{rate('motet_cached_tokens_total') / prompts:.0%}" if prompts else "–"],
        ["preemptions per second", f"{rate('motet_preemptions_total'):.2f}"],
        ["restarts of the engine", f"{value('motet_restarts_total'):.0f}"],
    ]
    waits = [
        [label, *(_quantile(before, now, name, share) for share in (0.5, 0.95, 0.99))]
        for label, name in (
            ("first token", "motet_call_first_token_seconds"),
            ("between tokens", "motet_inter_token_seconds"),
            ("whole call", "motet_call_seconds"),
        )
    ]
    tenants = sorted({dict(labels)["tenant"] for name, labels in now if name == "motet_tenant_tokens_total"})
    shares = [
        [
            tenant or "–",
            *(f"{rate('motet_tenant_tokens_total', tenant=tenant, kind=k):.1f}" for k in ("prompt", "completion")),
        ]
        for tenant in tenants
    ]
    tables: list[Table] = [
        table("load", ["", "now"], load),
        table(f"waiting, of the calls of {seconds:.0f} s", ["", "p50", "p95", "p99"], waits),
        table("tokens per second by tenant", ["tenant", "prompt", "answer"], shares),
    ]
    return Group(*tables)


def _quantile(before: Series, now: Series, name: str, share: float) -> str:
    """The upper bound of the histogram's bucket in which the quantile of the new observations lies; calls that failed do not
    count."""
    counts = {}
    for (series, labels), count in now.items():
        if series == f"{name}_bucket" and not dict(labels).get("error"):
            counts[float(dict(labels)["le"])] = count - before.get((series, labels), 0.0)
    total = counts.get(float("inf"), 0.0)
    bound = next((le for le in sorted(counts) if total and counts[le] >= share * total), None)
    return "–" if bound is None else f"≤ {bound * 1000:g} ms" if bound < float("inf") else "longer"
