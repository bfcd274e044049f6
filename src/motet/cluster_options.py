"""Options of jobs that may run on a Ray cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .runtime.errors import ConfigError

if TYPE_CHECKING:
    from .runtime.api.config import EngineConfig
    from .runtime.jobs.work import JobReport, Work

RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Run on a Ray cluster: its address, auto, or local (one of this machine's own). IN may be Parquet, and IN and OUT "
        "URIs of object stores; OUT is a folder of parts.",
    ),
]
Actors = Annotated[
    int | None, typer.Option(min=1, help="With --ray: engines, each with --threads CPUs (default 1); default: 2.")
]
OutFormat = Annotated[str | None, typer.Option("--format", help="Of the parts: jsonl (default) or parquet.")]


def run_on_cluster(
    address: str,
    work: Work,
    bundle: Path,
    config: EngineConfig,
    source: str,
    out: str,
    actors: int | None,
    out_format: str | None,
) -> None:
    """Run a job, print its counts, and end with exit code 1 if records failed."""
    from .runtime.cluster import jobs

    config, count = dataclasses.replace(config, threads=config.threads or 1), actors or 2
    with jobs.cluster(address, count * config.threads):
        report = jobs.run(work, bundle, config, source, out, actors=count, out_format=format_of(out_format))
    tell(out, report)


def format_of(text: str | None) -> Literal["jsonl", "parquet"]:
    if text in (None, "jsonl"):
        return "jsonl"
    if text == "parquet":
        return "parquet"
    raise ConfigError(f"--format must be jsonl or parquet, not '{text}'")


def tell(out: str, report: JobReport) -> None:
    """Print the counts. Exit code 1: records failed."""
    print(f"{out}: {report.done} done, {report.skipped} skipped, {report.failed} failed")
    if report.failed:
        raise typer.Exit(1)


def refuse_cluster_options(actors: int | None, out_format: str | None) -> None:
    """Raises `ConfigError` for options that need --ray."""
    for name, value in (("--actors", actors), ("--format", out_format)):
        if value is not None:
            raise ConfigError(f"{name} is for a Ray cluster; give --ray too")
