"""`motet batch`: jobs of a server, which it answers behind its other requests."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cluster_options import (
    Actors,
    OutFormat,
    RayAddress,
    format_of,
    refuse_cluster_options,
    run_on_cluster,
    tell,
)
from .options import CONNECTION, DEFAULT_ADDRESS, KEY_VARIABLE, Threads, progress_bar, with_options, with_signature
from .runtime.api.config import EngineConfig
from .runtime.errors import ConfigError, DataError, NotFoundError
from .tables import table

if TYPE_CHECKING:
    from .runtime.client.batch import BatchClient, JobInfo, RecordResult

batch = typer.Typer(no_args_is_help=True, help="Batch jobs of a server that was started with --state-dir.")
JobId = Annotated[str, typer.Argument(help="The job's id, which `submit` prints.")]


def mount(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.add_typer(batch, name="batch")


@contextmanager
def _client(
    address: str | None, tls: bool, ca: Path | None, cert: Path | None, cert_key: Path | None
) -> Iterator[BatchClient]:
    from .runtime.client.batch import BatchClient
    from .runtime.client.connection import Connection

    key = os.environ.get(KEY_VARIABLE) or None
    with BatchClient(Connection(address or DEFAULT_ADDRESS, key, tls, ca, cert, cert_key)) as client:
        yield client


@batch.command()
@with_options(CONNECTION)
def submit(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="JSONL of {id, text} or of OpenAI's batch API ({custom_id, url, body}), or a folder of text files.",
        ),
    ],
    endpoint: Annotated[
        str | None, typer.Option(help="What answers the records; default: /v1/summarise, or the url of the lines.")
    ] = None,
    defaults: Annotated[
        str, typer.Option(help="JSON: fields of every request that does not have them, such as '{\"max_tokens\": 50}'.")
    ] = "{}",
    **connection: Any,
) -> None:
    """Submit a job and print its id. All records are taken, or none."""
    if not source.exists():
        raise NotFoundError(f"there is no file or folder '{source}'")
    fields = _fields(defaults)
    url = None if source.is_dir() else _first_url(source)
    if url is not None and endpoint not in (None, url):
        raise ConfigError(f"--endpoint is {endpoint}, and the lines of '{source}' are for {url}; leave it out")
    records = _texts(source) if url is None else _lines(source, url)
    with _client(**connection) as client:
        print(client.submit(endpoint or url or "/v1/summarise", records, defaults=fields).id)


@batch.command("run")
@with_signature
def run_job(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="JSONL of {id, text} or of OpenAI's batch API ({custom_id, url, body}), or a folder of text files.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of parts; finished records are kept on a rerun.")],
    bundle: Annotated[Path, typer.Option(help="The bundle.")],
    trust: EngineConfig,
    endpoint: Annotated[str, typer.Option(help="What answers the records.")] = "/v1/summarise",
    defaults: Annotated[str, typer.Option(help="JSON: fields of every request that does not have them.")] = "{}",
    threads: Threads = 0,
    ray: RayAddress = None,
    actors: Actors = None,
    out_format: OutFormat = None,
) -> None:
    """Answer a job without a server: in this process, or on a Ray cluster. Exit code 1: records failed."""
    from .runtime.jobs.parts import Parts
    from .runtime.jobs.work import RequestWork, run

    work = RequestWork(endpoint, _fields(defaults))
    config = dataclasses.replace(trust, threads=threads)
    if ray is not None:
        run_on_cluster(ray, work, bundle, config, source, out, actors, out_format)
        return
    refuse_cluster_options(actors, None)
    if not Path(source).exists():
        raise NotFoundError(f"there is no file or folder '{source}'")
    with progress_bar("answering") as show:
        report = run(work, bundle, config, Path(source), Parts(out, format_of(out_format)), show)
    tell(out, report)


def _fields(defaults: str) -> dict[str, Any]:
    try:
        fields = json.loads(defaults)
    except ValueError as error:
        raise ConfigError(f"--defaults is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError("--defaults must be a JSON object")
    return fields


def _first_url(source: Path) -> str | None:
    """Of a file in OpenAI's form."""
    with source.open("rb") as file:
        first = next((line for line in file if line.strip()), b"{}")
    try:
        found = json.loads(first)
    except ValueError:
        return None  # told by whoever reads the records
    return found.get("url") if isinstance(found, dict) and isinstance(found.get("url"), str) else None


def _lines(source: Path, url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise DataError(f"{source}:{number} is not JSON: {error}") from None
            kinds = {"custom_id": str, "url": str, "body": dict}
            if not isinstance(found, dict) or not all(isinstance(found.get(k), kind) for k, kind in kinds.items()):
                raise DataError(
                    f"{source}:{number} must have custom_id and url, which are strings, and body, an object"
                )
            if found["url"] != url:
                raise DataError(f"{source}:{number} is for {found['url']}, and the first line for {url}")
            yield found["custom_id"], found["body"]


def _texts(source: Path) -> Iterator[tuple[str, str]]:
    from .runtime.jobs.records import read_records

    for record in read_records(source):
        if record.error is not None:
            raise record.error
        yield record.id, record.text


@batch.command()
@with_options(CONNECTION)
def watch(
    job: JobId,
    **connection: Any,
) -> None:
    """Show a job's progress until it has ended. Exit code 1: records failed, or it was cancelled."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    last: JobInfo | None = None
    with _client(**connection) as client, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        for last, _results in client.watch(job):
            bar.update(task, description=last.state, total=last.total, completed=last.done + last.failed)
    assert last is not None
    print(f"{last.state}: {last.done} done, {last.failed} failed, of {last.total}")
    if last.failed or last.state != "done":
        raise typer.Exit(1)


@batch.command()
@with_options(CONNECTION)
def results(
    job: JobId,
    out: Annotated[Path | None, typer.Option(help="Write them to this file; default: print them.")] = None,
    **connection: Any,
) -> None:
    """The results that a job has, one line of JSON each, as OpenAI's batch API writes them."""
    with _client(**connection) as client:
        if out is None:
            for result in client.results(job):
                print(_line(result))
            return
        if out.exists():
            raise ConfigError(f"'{out}' exists; choose another file")
        new = out.with_name(f"{out.name}.new")
        try:
            with new.open("w", encoding="utf-8") as file:
                file.writelines(f"{_line(result)}\n" for result in client.results(job))
            os.replace(new, out)
        finally:
            new.unlink(missing_ok=True)


def _line(result: RecordResult) -> str:
    response = {"status_code": result.status, "body": result.response}
    return json.dumps({"custom_id": result.id, "response": response}, ensure_ascii=False)


@batch.command("list")
@with_options(CONNECTION)
def list_jobs(
    limit: Annotated[int, typer.Option(help="Most jobs, the newest first.")] = 100,
    **connection: Any,
) -> None:
    """The jobs of the caller's tenant."""
    from rich.console import Console

    with _client(**connection) as client:
        rows = [
            [
                one.id,
                one.state,
                f"{one.done + one.failed}/{one.total}",
                str(one.failed),
                one.endpoint,
                f"{datetime.fromtimestamp(one.created):%Y-%m-%d %H:%M}",
            ]
            for one in client.jobs(limit)
        ]
    width = None if sys.stdout.isatty() else 160  # a pipe has no width, and ids must not be cut
    Console(width=width).print(table("jobs", ["job", "state", "ended", "failed", "endpoint", "created"], rows))


@batch.command()
@with_options(CONNECTION)
def cancel(
    job: JobId,
    **connection: Any,
) -> None:
    """End a job; the results that it has stay."""
    with _client(**connection) as client:
        print(client.cancel(job).state)


@batch.command()
@with_options(CONNECTION)
def delete(
    job: JobId,
    **connection: Any,
) -> None:
    """Remove a job with its records and results, running or not."""
    with _client(**connection) as client:
        client.delete(job)
