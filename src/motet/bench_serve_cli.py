"""The `motet bench` commands that load a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bench_cli import BundleArgument, NewTokens, PromptTokens, Repeats, Results, floats, integers
from .bench_cli import bench as bench
from .options import Threads
from .parameter_options import words
from .runtime.errors import ConfigError


@bench.command("serve")
def bench_serve(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    doors: Annotated[str, typer.Option(help="Doors: grpc, http, or both.")] = "grpc",
    rates: Annotated[str, typer.Option(help="Open loop: requests per second.")] = "1,2",
    burstiness: Annotated[
        float, typer.Option(help="Open loop: shape of the gamma distribution of gaps; 1: Poisson, less: in bursts.")
    ] = 1.0,
    clients: Annotated[str, typer.Option(help="Closed loop: number of clients.")] = "1,8",
    duration_s: Annotated[float, typer.Option(help="Seconds per load.")] = 15.0,
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 64,
    ttft_ms: Annotated[float, typer.Option(help="Goodput: most milliseconds to the first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="Goodput: most milliseconds per later token, on average.")] = 100.0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of all loads; figures are medians.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and prompts.")] = 0,
    threads: Threads = 0,
    aiperf: Annotated[
        Path | None, typer.Option(help="Also run this `aiperf` over HTTP; `make aiperf` installs one.")
    ] = None,
) -> None:
    """Latency and throughput over gRPC and HTTP, open-loop and closed-loop."""
    from .bench import serve
    from .bench.lib.load import Objective

    if 0 in floats(rates):
        raise ConfigError(f"every rate in '{rates}' must be above 0")
    if not 0.01 <= burstiness <= 1000:
        raise ConfigError(f"--burstiness must be in 0.01…1000, not {burstiness}")
    chosen = list(dict.fromkeys(words(doors)))
    if not chosen or set(chosen) - {"grpc", "http"}:
        raise ConfigError(f"--doors must be grpc, http, or both with a comma between, not '{doors}'")
    if aiperf is not None and "http" not in chosen:
        raise ConfigError("--aiperf measures the HTTP door; give --doors http or --doors grpc,http")
    serve.run(
        bundle,
        out,
        doors=chosen,
        rates=floats(rates),
        burstiness=burstiness,
        clients=integers(clients),
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        objective=Objective(ttft_ms, tpot_ms),
        repeats=repeats,
        seed=seed,
        threads=threads,
        aiperf_program=aiperf,
    )


@bench.command("scale")
def bench_scale(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    actors: Annotated[int, typer.Option(min=0, help="Engines of one thread; 0: as many as cores.")] = 0,
    records: Annotated[int, typer.Option(min=100, help="Records of the job.")] = 600,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; figures are medians.")] = 3,
) -> None:
    """A job over a Ray cluster of this machine, routing by prefix, and how many machines a load needs."""
    from .bench import scale

    scale.run(bundle, out, actors=actors, records=records, repeats=repeats)


@bench.command("flood")
def bench_flood(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    clients: Annotated[int, typer.Option(min=1, help="Clients that send prompts which are far too long.")] = 12,
    prompt_bytes: Annotated[int, typer.Option(min=1000, max=4_190_000, help="Bytes of such a prompt.")] = 4_000_000,
    duration_s: Annotated[float, typer.Option(min=0.1, help="Seconds without the flood, and with it.")] = 20.0,
    threads: Threads = 0,
) -> None:
    """Streams and health while other clients send prompts that are far too long."""
    from .bench import flood

    flood.run(bundle, out, clients=clients, prompt_bytes=prompt_bytes, duration_s=duration_s, threads=threads)


@bench.command("trust")
def bench_trust(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    streams: Annotated[int, typer.Option(min=1, help="Streams at the same time.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 96,
    repeats: Repeats = 7,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Of each load beside slow readers and beside many requests.")
    ] = 20.0,
    threads: Threads = 0,
) -> None:
    """What TLS, keys and an audit log cost, and what one client notices of another's flood, slow reading and many requests."""
    from .bench import trust

    trust.run(bundle, out, streams=streams, tokens=tokens, repeats=repeats, seconds=seconds, threads=threads)


@bench.command("doors")
def bench_doors(
    bundle: BundleArgument, out: Results = Path("bench/results"), repeats: Repeats = 7, threads: Threads = 0
) -> None:
    """What each door and form of answers costs, and what a stream notices of a batch job."""
    from .bench import doors

    doors.run(bundle, out, repeats=repeats, threads=threads)
