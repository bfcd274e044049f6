"""The `motet` command. Each subcommand parses its options and calls one function.

A user's mistake ends with exit code 2 and one line on stderr, any other failure with 1, Ctrl-C with 130. Text is
UTF-8: arguments, files and standard input that are not are the user's mistake.
"""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .batch_cli import mount as mount_batch
from .bench_serve_cli import bench
from .cluster_options import Actors, OutFormat, RayAddress, refuse_cluster_options, run_on_cluster
from .finetune_cli import mount
from .generate_cli import mount as mount_generate
from .openmp import wait_passively
from .options import (
    MixOption,
    SpaceOption,
    Threads,
    by_name,
    check_arguments,
    coefficients,
    progress_bar,
    read_ensemble,
)
from .runtime.api.config import EngineConfig
from .runtime.api.request import Space
from .runtime.errors import BundleError, ConfigError, MotetError, NotFoundError
from .runtime.model.members import MemberKind
from .serve_cli import mount as mount_serve
from .tables import table
from .top_cli import mount as mount_top

# Typer does not export its parser's exceptions; this is the base class of those for wrong options.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(bench, name="bench")
mount(app, bench)


def main() -> None:
    """Entry point: runs the app and turns errors into exit codes."""
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows such characters as escapes
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    wait_passively()
    try:
        check_arguments(sys.argv[1:])
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except MotetError as error:
        print(f"motet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:  # a full disk, a folder without permission, a reader of stdout that has gone
        print(f"motet: {error}", file=sys.stderr)
        sys.exit(1)
    except _UsageError as error:
        print(f"motet: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        needed = {"torch": "export", "transformers": "export", "onnx": "export", "matplotlib": "bench", "ray": "ray"}
        needed |= dict.fromkeys(("pytorch_lightning", "peft", "optuna", "scipy", "opacus", "pyarrow"), "finetune")
        extra = needed.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(
            f"motet: this command needs {error.name}; install it with `pip install 'motet[{extra}]'`", file=sys.stderr
        )
        sys.exit(2)


# ---- models and bundles ----------------------------------------------------------------------------------------------


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="smollm2-135m, a Hugging Face directory, a GGUF file, or a hub id.")],
    name: Annotated[
        str | None, typer.Option(help="Name in the local store; default: the directory's, the file's, or the hub id.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Fetch again, even if the copy is intact or another model's.")] = False,
) -> None:
    """Bring a model into the local store."""
    from .runtime.checkpoints import store

    print(store.pull(source, name=name, force=force, on_status=lambda text: print(text, file=sys.stderr)))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A pulled model's name or a model directory.")],
    out: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    tail: Annotated[
        list[str] | None,
        typer.Option(f"--{MemberKind.TAIL.flag}", help="name=DIR of a tail, or name for the base itself."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(f"--{MemberKind.ADAPTER.flag}", help="name=DIR of an adapter.")
    ] = None,
    fusion: Annotated[
        Path | None,
        typer.Option(help="Directory of a fusion: the members, mix and space that `motet fuse` has chosen."),
    ] = None,
    merge: Annotated[bool, typer.Option(help="Add adapters to the weights instead of keeping them apart.")] = False,
    mix: MixOption = None,
    space: Annotated[Space | None, typer.Option(help="Where members are mixed; default: logits.")] = None,
    bits: Annotated[int, typer.Option(help="8, 4 (head and embedding in 8), or 32.")] = 8,
    group: Annotated[
        int | None,
        typer.Option(
            help="Columns per quantisation group of the layers; default: 64 for 8 bits, 32 for 4. The head has 32."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers per tail; default: as many as the tails need.")] = None,
    graphs: Annotated[bool, typer.Option(help="Write ONNX graphs, which the onnx backend needs.")] = True,
    parity: Annotated[bool, typer.Option(help="Measure every member, as it is served, against fp32.")] = True,
) -> None:
    """Quantise a model and its members into one bundle, and measure it against fp32."""
    from rich.console import Console
    from rich.progress import Progress

    from .export.base_model import BaseModel
    from .export.bundle_writer import export_bundle
    from .export.parity import HeldOut
    from .finetune.data.dataset import heldout_token_ids  # only here: export itself does not need finetune
    from .runtime.checkpoints.store import resolve_model

    base = BaseModel(resolve_model(model))
    if fusion is None:
        chosen = _members(tail or [], lora or [], mix, space or Space.LOGITS)
    elif tail or lora or mix is not None or space is not None:
        raise ConfigError("--fusion has its own members, mix and space; leave out --tail, --lora, --mix and --space")
    else:
        chosen = _fused_members(fusion, base.digest)
    num_members = len(chosen["tails"]) + len(chosen["loras"])
    tokenizer, context = base.tokenizer, base.config.max_position_embeddings
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        held_out = None
        if parity:
            chunks = heldout_token_ids(tokenizer, 4096, context=context)
            task = progress.add_task("parity", total=len(chunks) * max(1, num_members))
            held_out = HeldOut(chunks, on_chunk=lambda: progress.advance(task))
        export_bundle(
            base,
            out,
            **chosen,
            merge=merge,
            bits=bits,
            group_size=group,
            num_tail_layers=layers,
            calibration=heldout_token_ids(tokenizer, 1024, context=context, split="train") if bits == 8 else (),
            graphs=graphs,
            held_out=held_out,
        )
    print(out)
    if parity:
        Console().print(_parity_table(out))


def _parity_table(bundle: Path) -> Table:
    from .export.parity import read_parity

    report = read_parity(bundle)
    rows = [
        [m.name, f"{m.num_tokens:,}", f"{m.nll:.3f}", f"{m.nll_change:+.2%}", f"{m.kl:.4f}", f"{m.top1:.1%}"]
        for m in report.members
    ]
    title = (
        f"{bundle.name}: {report.bits} bits, {report.size_bytes / 1e6:.0f} MB, {report.overhead:.3f} × the bits it holds; "
        f"served by the {report.backend} backend, KV cache {report.kv_dtype}"
    )
    return table(title, ["member", "tokens", "NLL fp32", "ΔNLL", "KL", "top-1 equal"], rows)


def _members(tail: list[str], lora: list[str], mix: str | None, space: Space) -> dict[str, Any]:
    """Members, mix and space, as `export_bundle` takes them, from what the user wrote."""
    return {
        "tails": by_name(map(_tail, tail)),
        "loras": by_name(map(_adapter, lora)),
        "mix": None if mix is None else coefficients(mix),
        "space": space,
    }


def _fused_members(directory: Path, base_digest: str) -> dict[str, Any]:
    """The same from the directory of a fusion."""
    from .finetune.search.fusion import read_fusion
    from .runtime.checkpoints.members.registry import format_at

    fusion = read_fusion(directory)
    if fusion.base_digest != base_digest:
        raise BundleError(f"the fusion at '{directory}' is of members of another base; export it with that one")
    kinds = {name: MemberKind.BASE if path is None else format_at(path).kind for name, path in fusion.members.items()}
    return {
        "tails": {n: path for n, path in fusion.members.items() if kinds[n] is not MemberKind.ADAPTER},
        "loras": {n: path for n, path in fusion.members.items() if kinds[n] is MemberKind.ADAPTER},
        "mix": fusion.mix,
        "mix_chosen_by": fusion.chosen_by,
        "space": fusion.space,
    }


def _tail(text: str) -> tuple[str, Path | None]:
    name, found, path = text.partition("=")
    return name, Path(path) if found else None


def _adapter(text: str) -> tuple[str, Path]:
    name, path = _tail(text)
    if path is None:
        raise ConfigError(f"--{MemberKind.ADAPTER.flag} takes name=DIR, got '{text}'")
    return name, path


# ---- serving and jobs --------------------------------------------------------------------------------------------------

mount_serve(app)
mount_batch(app)
mount_top(app)
mount_generate(app)


@app.command()
def summarise(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="JSONL with one text per record, or a folder of text files.")
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="JSONL, with --ray a folder; finished records are kept on a rerun.")
    ],
    bundle: Annotated[Path, typer.Option(help="The bundle.")],
    mix: MixOption = None,
    space: SpaceOption = None,
    max_summary_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a summary; default: 96, or what the context allows.")
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens per chunk of a long document; default: 1024, or what the context allows."),
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="What to do with each text.")] = None,
    abstain_below: Annotated[
        float | None, typer.Option(help="Mark summaries with less confidence (0 to 1); the bundle must be calibrated.")
    ] = None,
    drafts: Annotated[
        int,
        typer.Option(help="Each summary is the one of so many drafts that agrees most with the others; 0: no drafts."),
    ] = 0,
    threads: Threads = 0,
    ray: RayAddress = None,
    actors: Actors = None,
    out_format: OutFormat = None,
) -> None:
    """Summarise many documents offline. A record that fails has an error in OUT, and is tried again on a rerun. Exit
    code 1: there are such records."""
    from .runtime.engine.engine import Engine
    from .runtime.jobs.records import check_output
    from .runtime.jobs.summarise import summarise as run
    from .runtime.text.summary import INSTRUCTION, SummariseParams

    ensemble = read_ensemble(mix, space)
    told = INSTRUCTION if instruction is None else instruction
    params = SummariseParams(told, max_summary_tokens, chunk_tokens, abstain_below=abstain_below, drafts=drafts)
    if ray is not None:
        from .runtime.jobs.work import SummariseWork

        run_on_cluster(ray, SummariseWork(ensemble, params), bundle, threads, source, out, actors, out_format)
        return
    refuse_cluster_options(actors, out_format)
    in_path, out_path = Path(source), Path(out)
    if not in_path.exists():  # before the bundle is loaded
        raise NotFoundError(f"there is no file or folder '{source}'")
    check_output(in_path, out_path)
    with Engine.from_bundle(bundle, EngineConfig(threads=threads)) as engine, progress_bar("summarising") as show:
        report = run(engine, in_path, out_path, ensemble=ensemble, params=params, on_progress=show)
    rate = report.completion_tokens / report.seconds if report.seconds else 0.0
    print(f"{out}: {report.done} done, {report.skipped} skipped, {report.failed} failed, {rate:.0f} tok/s")
    if report.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
