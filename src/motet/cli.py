"""The `motet` command. Each subcommand parses its options and calls one function.

A user's mistake ends with exit code 2 and one line on stderr, any other failure with 1, Ctrl-C with 130. Text is
UTF-8: arguments, files and standard input that are not are the user's mistake.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .batch_cli import mount as mount_batch
from .bench_serve_cli import bench
from .bundle_cli import mount as mount_bundle
from .cluster_options import Actors, OutFormat, RayAddress, refuse_cluster_options, run_on_cluster
from .explain_cli import mount as mount_explain
from .export_cli import mount as mount_export
from .finetune_cli import mount
from .generate_cli import mount as mount_generate
from .openmp import wait_passively
from .options import (
    MixOption,
    SpaceOption,
    Threads,
    check_arguments,
    progress_bar,
    read_ensemble,
    with_signature,
)
from .prune_cli import mount as mount_prune
from .runtime.api.config import EngineConfig
from .runtime.errors import MotetError, NotFoundError
from .serve_cli import mount as mount_serve
from .top_cli import mount as mount_top

if TYPE_CHECKING:
    from .runtime.checkpoints.store import Plan

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
    dry_run: Annotated[
        bool, typer.Option(help="Say what would be fetched, how large it is and from where; fetch nothing.")
    ] = False,
) -> None:
    """Bring a model into the local store."""
    from .runtime.checkpoints import store

    if dry_run:
        _print_plan(store.plan_pull(source, name=name, force=force))
        return
    print(store.pull(source, name=name, force=force, on_status=lambda text: print(text, file=sys.stderr)))


def _print_plan(plan: Plan) -> None:
    """A line for each file, then what would be done with them."""
    from .runtime.model.files import size_text

    for file in plan.files if plan.reason is not None else ():
        print(f"{file.name}  {size_text(file.size)}" + (f"  ({size_text(file.held)} here)" if file.held else ""))
    if plan.reason is None:
        print(f"{plan.target.name}: the copy is intact and would be kept: {plan.target}")
    else:
        again = f"would be fetched again ({plan.reason})" if plan.reason else "would be fetched"
        print(f"{plan.target.name}: {again}: {plan.summary()}; to {plan.target}")


mount_export(app)
mount_bundle(app)


mount_explain(app)
mount_prune(app, bench)

# ---- serving and jobs --------------------------------------------------------------------------------------------------

mount_serve(app)
mount_batch(app)
mount_top(app)
mount_generate(app)


@app.command()
@with_signature
def summarise(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="JSONL with one text per record, or a folder of text files.")
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="JSONL, with --ray a folder; finished records are kept on a rerun.")
    ],
    bundle: Annotated[Path, typer.Option(help="The bundle.")],
    trust: EngineConfig,
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
    config = dataclasses.replace(trust, threads=threads)
    if ray is not None:
        from .runtime.jobs.work import SummariseWork

        run_on_cluster(ray, SummariseWork(ensemble, params), bundle, config, source, out, actors, out_format)
        return
    refuse_cluster_options(actors, out_format)
    in_path, out_path = Path(source), Path(out)
    if not in_path.exists():  # before the bundle is loaded
        raise NotFoundError(f"there is no file or folder '{source}'")
    check_output(in_path, out_path)
    with Engine.from_bundle(bundle, config) as engine, progress_bar("summarising") as show:
        report = run(engine, in_path, out_path, ensemble=ensemble, params=params, on_progress=show)
    rate = report.completion_tokens / report.seconds if report.seconds else 0.0
    print(f"{out}: {report.done} done, {report.skipped} skipped, {report.failed} failed, {rate:.0f} tok/s")
    if report.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
