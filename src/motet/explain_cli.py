"""`motet explain`: where a bundle's mix is better than its members, as a page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from .finetune.params import MAX_LENGTH_HELP, NearDuplicates
from .options import MixOption, SpaceOption, Threads, read_ensemble, with_signature
from .runtime.api.config import EngineConfig
from .runtime.errors import ConfigError


def mount(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(explain)


@with_signature
def explain(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    data: Annotated[str, typer.Option(help="stdlib-code, stdlib-docs, or a JSONL, JSON, Parquet or text file.")],
    out: Annotated[Path, typer.Option(help="The page, an HTML file.")],
    trust: EngineConfig,
    mix: MixOption = None,
    space: SpaceOption = None,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="The split whose documents are explained.")
    ] = "test",
    documents: Annotated[int, typer.Option(help="Documents, at most.")] = 24,
    max_length: Annotated[int | None, typer.Option(help=MAX_LENGTH_HELP)] = None,
    near_duplicates: Annotated[
        NearDuplicates, typer.Option(help="What is done with training examples that nearly repeat a held-out one.")
    ] = NearDuplicates.DROP,
    threads: Threads = 0,
) -> None:
    """Show token by token what a bundle's mix says better than its members, and which member helped there: one HTML file."""
    from .finetune.search.explain import explain as run
    from .finetune.search.explanation_page import write_page
    from .finetune.training.progress import Progress

    ensemble = read_ensemble(mix, space)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out is an HTML file in a folder that exists, and '{out}' is none")
    with Progress() as progress:
        found = run(
            bundle,
            data,
            ensemble=ensemble,
            split=split,
            documents=documents,
            max_length=max_length,
            near_duplicates=near_duplicates,
            config=dataclasses.replace(trust, threads=threads),
            progress=progress,
        )
    write_page(out, found)
    best = found.members[found.best]
    print(
        f"{out}: {len(found.documents)} documents; the mix has {found.nll():.4f} nats a token, the best single member ({best}) "
        f"{found.member_nll()[found.best]:.4f}"
    )
