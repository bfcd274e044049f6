"""`motet prune`: a smaller ordinary model from a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .export.prune.params import PruneParams
from .options import by_name
from .parameter_options import with_parameters
from .runtime.errors import ConfigError, DataError
from .runtime.model.members import MemberKind
from .runtime.text.documents import read_document

if TYPE_CHECKING:
    from .runtime.text.tokenizer import Tokenizer

CALIBRATION_TOKENS = 4096


def mount(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(prune)


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
