"""`motet prune`: a smaller ordinary model from a larger one; `motet heal`: it learns again what the larger one says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .export.prune.params import PruneParams
from .finetune.heal_params import HealParams
from .finetune.params import NearDuplicates, TuneParams
from .finetune_cli import STUDENT, CacheDir, CacheSize, Data, NearDuplicatesOption
from .options import by_name
from .parameter_options import with_parameters
from .runtime.errors import ConfigError, DataError
from .runtime.model.members import MemberKind
from .runtime.text.documents import read_document

if TYPE_CHECKING:
    from .runtime.text.tokenizer import Tokenizer

CALIBRATION_TOKENS = 4096


def mount(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the commands to `app` and `bench`."""
    for command in (prune, heal):
        app.command()(command)
    bench.command("prune")(bench_prune)


@with_parameters("params", PruneParams())
def prune(
    model: Annotated[str, typer.Argument(help="A pulled model's name or a model directory.")],
    out: Annotated[Path, typer.Argument(help="Directory of the pruned model.")],
    params: PruneParams,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text that is measured over, in UTF-8; may be repeated. Default: the built-in sets."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that are measured over, at most.")] = CALIBRATION_TOKENS,
    vocabulary: Annotated[
        list[Path] | None,
        typer.Option(help="A text in UTF-8: tokens that none of these texts needs are removed. May be repeated."),
    ] = None,
    tail: Annotated[
        list[str] | None,
        typer.Option(f"--{MemberKind.TAIL.flag}", help="name=DIR of a tail, which is written to OUT/members/name."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(f"--{MemberKind.ADAPTER.flag}", help="name=DIR of an adapter, likewise.")
    ] = None,
) -> None:
    """Remove layers, heads, channels or tokens from a model: what is left is an ordinary Hugging Face directory."""
    from .export.prune.prune import prune as run
    from .runtime.checkpoints.huggingface import read_config
    from .runtime.checkpoints.store import resolve_model
    from .runtime.text.tokenizer import Tokenizer

    model_dir = resolve_model(model)
    chunks: list[list[int]] = []
    source = "built-in"
    if params.measures:
        tokenizer, context = Tokenizer.from_dir(model_dir), read_config(model_dir).max_position_embeddings
        tokenizer.check_ids(read_config(model_dir).vocab_size)
        chunks, source = _calibration(tokenizer, text or [], tokens, context)
    elif text or tokens != CALIBRATION_TOKENS:
        raise ConfigError(
            "--text and --tokens are for what is measured: layers, heads and channels; leave them out, or give one of these"
        )
    record = run(
        model_dir,
        out,
        params,
        chunks=chunks,
        calibration=source,
        vocabulary=vocabulary or (),
        tails=by_name(_member(MemberKind.TAIL, one) for one in tail or []),
        loras=by_name(_member(MemberKind.ADAPTER, one) for one in lora or []),
    )
    before, after = (record["parameters"][when] for when in ("before", "after"))
    print(f"{out}: {before / 1e6:.1f} M parameters → {after / 1e6:.1f} M ({after / before - 1:+.1%})")
    if record["layers"]["removed"]:
        print(f"removed layers: {', '.join(map(str, record['layers']['removed']))}")
    if "vocabulary" in record:
        print(f"tokens: {record['vocabulary']['before']:,} → {record['vocabulary']['after']:,}")


@with_parameters("params", HealParams())
@with_parameters("base", TuneParams(), only=STUDENT)
def heal(
    pruned: Annotated[str, typer.Argument(help="A model directory that `motet prune` wrote.")],
    teacher: Annotated[str, typer.Option(help="The model that it comes from: a pulled model's name or a directory.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory of the healed model. The same call resumes a killed run.")],
    base: TuneParams,
    params: HealParams,
    member: Annotated[
        bool, typer.Option("--member", help="Write a tail or an adapter of the pruned model, instead of a whole model.")
    ] = False,
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
    no_cache: Annotated[bool, typer.Option(help="Run trunk and teacher anew for every batch.")] = False,
    near_duplicates: NearDuplicatesOption = NearDuplicates.DROP,
) -> None:
    """Distil the unpruned model into a pruned one."""
    from .finetune.training.heal import heal as run
    from .finetune.training.progress import Progress
    from .finetune.training.train import Workbench, note_duplicates
    from .finetune.training.trunk_cache import TrunkCache
    from .runtime.checkpoints.store import resolve_model

    store = None if no_cache else TrunkCache(cache, int(cache_gb * 1e9))
    bench = Workbench(resolve_model(pruned), data, store, near_duplicates)
    with Progress() as progress:
        note_duplicates(bench, progress)
        params = dataclasses.replace(params, base=base)
        found = run(bench, resolve_model(teacher), out, params, as_member=member, progress=progress)["healed"]
    for who, loss in found["test"].items():
        print(f"{who:8} {loss:.4f} nats per token on {found['tokens']} test tokens")
    print(out)


def _member(kind: MemberKind, text: str) -> tuple[str, Path]:
    name, found, path = text.partition("=")
    if not found:
        raise ConfigError(f"--{kind.flag} takes name=DIR, got '{text}'")
    return name, Path(path)


def _calibration(tokenizer: Tokenizer, texts: list[Path], count: int, context: int) -> tuple[list[list[int]], str]:
    """(chunks of token ids, what they are). Raises `DataError` for texts without a prediction in them."""
    from .finetune.data.dataset import heldout_token_ids  # only here: export itself does not need finetune

    if not texts:
        chunks = heldout_token_ids(tokenizer, count, context=context, split="train")
        return chunks, "the built-in sets, train split"
    token_ids = [token_id for path in texts for token_id in tokenizer.encode(read_document(path))][:count]
    if len(token_ids) < 2:
        raise DataError(
            f"{', '.join(map(str, texts))}: {len(token_ids)} tokens, too few to measure over; give more text"
        )
    size = min(512, context)
    chunks = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
    return chunks, ", ".join(path.name for path in texts)


def bench_prune(
    model: Annotated[str, typer.Argument(help="A pulled model's name.")] = "smollm2-135m",
    data: str = "stdlib-docs",
    work: Annotated[Path, typer.Option(help="Working directory; finished parts are kept there.")] = Path(
        ".motet/bench-prune"
    ),
    out: Annotated[Path, typer.Option(help="Directory for the JSON and HTML.")] = Path("bench/results"),
    lora: Annotated[Path | None, typer.Option(help="An adapter, which is added to the weights first.")] = None,
    share: Annotated[float, typer.Option(help="Of the layers' parameters, that are removed.")] = 0.25,
    examples: Annotated[int, typer.Option(min=2, help="Examples that heal.")] = 1000,
    test_examples: Annotated[int, typer.Option(min=1, help="Examples that are measured on.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples that heal.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that are answered with and without all tokens.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; speeds are medians.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: the CPUs this process may use.")] = 0,
) -> None:
    """Prune, heal and trim a model: quality, size and speed of each step."""
    from .bench.prune import run_bench

    run_bench(
        model,
        data,
        work,
        out,
        lora=lora,
        share=share,
        examples=examples,
        test_examples=test_examples,
        epochs=epochs,
        prompts=prompts,
        repeats=repeats,
        threads=threads,
    )
