"""The `motet` command. Each subcommand parses its options and calls one function.

A user's mistake ends with exit code 2 and one line on stderr; another failure with 1; Ctrl-C with 130.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench_cli import bench
from .finetune_cli import mount
from .runtime.api.config import EngineConfig
from .runtime.api.output import Output
from .runtime.api.request import Ensemble, Member, SamplingParams, Space
from .runtime.errors import ConfigError, InvalidEnsembleError, MotetError, NotFoundError
from .runtime.text.prompt import Prompt

# Typer keeps its parser's exceptions to itself; this is the base of what a wrong option raises.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(bench, name="bench")
mount(app, bench)

Bundle = Annotated[Path | None, typer.Option(help="Serve from this bundle in this process.")]
Address = Annotated[str, typer.Option(help="A server's host:port.")]
MixOption = Annotated[str | None, typer.Option(help="name=coefficient,…; default: the bundle's own mix.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0: the CPUs this process may use.")]


def main() -> None:
    """Entry point: runs the app and turns errors into exit codes."""
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except MotetError as error:
        print(f"motet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except _UsageError as error:
        print(f"motet: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        needed = {"torch": "export", "transformers": "export", "onnx": "export", "matplotlib": "bench"}
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
    name: Annotated[str | None, typer.Option(help="Name in the local store.")] = None,
    force: Annotated[bool, typer.Option(help="Fetch again even if it is intact.")] = False,
) -> None:
    """Bring a model into the local store."""
    from .runtime.checkpoints import store

    print(store.pull(source, name=name, force=force))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A pulled model's name or a model directory.")],
    out: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    tail: Annotated[list[str] | None, typer.Option(help="name=DIR of a tail, or name for the base itself.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="name=DIR of an adapter.")] = None,
    merge: Annotated[bool, typer.Option(help="Add adapters to the weights instead of keeping them apart.")] = False,
    mix: MixOption = None,
    space: Annotated[Space, typer.Option(help="Where members are mixed.")] = Space.LOGITS,
    bits: Annotated[int, typer.Option(help="8, 4 (head and embedding in 8), or 32.")] = 8,
    group: Annotated[
        int | None,
        typer.Option(
            help="Columns a quantisation group of the layers; default: 64 for 8 bits, 32 for 4. The head has 32."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers a tail; default: what the tails need.")] = None,
    parity: Annotated[bool, typer.Option(help="Measure every member against fp32.")] = True,
) -> None:
    """Quantise a model and its tails into one bundle, and measure it against fp32."""
    from .export.bundle_writer import export_bundle
    from .finetune.data.dataset import heldout_token_ids
    from .runtime.checkpoints.huggingface import read_config
    from .runtime.checkpoints.store import resolve_model
    from .runtime.text.tokenizer import Tokenizer

    directory = resolve_model(model)
    read_config(directory)  # an unknown family is said before anything else
    tails: dict[str, Path | None] = dict(_tail(text) for text in tail or [])
    loras = dict(_adapter(text) for text in lora or [])
    tokenizer = Tokenizer.from_dir(directory)
    export_bundle(
        directory,
        out,
        tails=tails,
        loras=loras,
        merge=merge,
        mix=None if mix is None else _coefficients(mix),
        space=space,
        bits=bits,
        group_size=group,
        num_tail_layers=layers,
        calibration=heldout_token_ids(tokenizer, 1024, split="train") if bits == 8 else (),
    )
    print(out)
    if parity and loras and not merge:
        print("adapters kept apart have no graph to measure; with --merge they have", file=sys.stderr)
    elif parity:
        _report_parity(directory, out, {**tails, **loras}, heldout_token_ids(tokenizer, 4096))


def _report_parity(model_dir: Path, out: Path, tails: dict[str, Path | None], chunks: list[list[int]]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from .bench.lib.report import table
    from .export.parity import measure_parity
    from .runtime.model.bundle import Bundle

    with Progress(transient=True) as progress:
        task = progress.add_task("parity", total=len(chunks) * max(1, len(tails)))
        bundle = Bundle.load(out)
        result = measure_parity(bundle, model_dir, tails, chunks, on_chunk=lambda: progress.advance(task))
    rows = [
        [m.name, f"{m.num_tokens:,}", f"{m.nll:.3f}", f"{m.nll_change:+.2%}", f"{m.kl:.4f}", f"{m.top1:.1%}"]
        for m in result.members
    ]
    title = (
        f"{out.name}: {result.bits} bits, {result.size_bytes / 1e6:.0f} MB, {result.overhead:.3f} × the bits it holds"
    )
    Console().print(table(title, ["member", "tokens", "NLL fp32", "ΔNLL", "KL", "top-1 equal"], rows))


def _tail(text: str) -> tuple[str, Path | None]:
    name, found, path = text.partition("=")
    return name, Path(path) if found else None


def _adapter(text: str) -> tuple[str, Path]:
    name, path = _tail(text)
    if path is None:
        raise ConfigError(f"--lora takes name=DIR, got '{text}'")
    return name, path


def _coefficients(text: str) -> dict[str, float]:
    pairs: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        try:
            pairs[name.strip()] = float(value)
        except ValueError:
            raise InvalidEnsembleError(f"a mix is name=coefficient,…; '{item}' is not") from None
    return pairs


# ---- serving ---------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 50051,
    threads: Threads = 0,
    max_num_seqs: int = 16,
    max_model_len: int = 2048,
    max_num_batched_tokens: int = 512,
    backend: Annotated[str, typer.Option(help="auto, cpu, onnx or torch.")] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="Of the KV cache: auto, int8, bf16 or fp8.")] = "auto",
    onnx_provider: Annotated[str, typer.Option(help="Of the onnx backend: cpu or cuda.")] = "cpu",
    speculative_tokens: Annotated[int, typer.Option(help="Tokens a prompt-lookup draft at most; 0: none.")] = 0,
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus metrics on this port.")] = None,
    reflection: Annotated[bool, typer.Option(help="Answer gRPC reflection.")] = False,
) -> None:
    """Serve a bundle over gRPC."""
    from .runtime.serve.grpc.server import serve as run

    config = EngineConfig.from_dict(
        {
            "threads": threads,
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": max_num_batched_tokens,
            "backend": backend,
            "kv_dtype": kv_dtype,
            "onnx_provider": onnx_provider,
            "speculative_tokens": speculative_tokens,
        }
    )
    run(bundle, host=host, port=port, config=config, metrics_port=metrics_port, with_reflection=reflection)


@contextmanager
def _client(bundle: Path | None, address: str) -> Iterator[Any]:
    """A client of the server at `address`, or of an engine in this process behind a port of its own."""
    from .runtime.client.client import Client
    from .runtime.serve.local import local_server

    if bundle is None:
        with Client(address) as client:
            yield client
    else:
        with local_server(bundle) as local_address, Client(local_address) as client:
            yield client


def _stream(deltas: Iterator[Output]) -> str:
    """Print deltas as they come and a line of figures at the end; return the text."""
    text, started, count = [], time.monotonic(), 0
    for delta in deltas:
        print(delta.text, end="", flush=True)
        text.append(delta.text)
        count += len(delta.token_ids)
        if delta.finish_reason is not None:
            seconds = time.monotonic() - started
            line = f"[{delta.finish_reason}, {count} tokens, {count / seconds:.0f} tok/s, seed {delta.seed}]"
            print()
            print(line, file=sys.stderr)
    return "".join(text)


def _ensemble(mix: str | None, space: Space) -> Ensemble | None:
    if mix is None:
        return None
    return Ensemble(tuple(Member(name, value) for name, value in _coefficients(mix).items()), space)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; sent as a chat message unless --raw.")],
    bundle: Bundle = None,
    address: Address = "127.0.0.1:50051",
    mix: MixOption = None,
    space: Space = Space.LOGITS,
    context: Annotated[Path | None, typer.Option(help="A document to answer from (context-aware decoding).")] = None,
    alpha: Annotated[float, typer.Option(help="How much the document counts: (1 + α) with it − α without.")] = 0.5,
    member: Annotated[str | None, typer.Option(help="The member that context-aware decoding uses.")] = None,
    raw: Annotated[bool, typer.Option(help="Send the text as it is, without the chat template.")] = False,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer; may be given several times.")] = None,
) -> None:
    """Generate from one prompt and stream it to the terminal."""
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    ensemble = _ensemble(mix, space)
    with _client(bundle, address) as client:
        views: Sequence[Prompt] = ()
        text = prompt
        if context is not None:
            if not context.is_file():
                raise NotFoundError(f"there is no file '{context}'")
            if ensemble is not None:
                raise ConfigError("--context makes an ensemble of its own; give --member instead of --mix")
            name = member or client.models()[0].members[0]
            ensemble = Ensemble((Member(name, 1 + alpha), Member(name, -alpha, view=1)))
            views = [_as_prompt(prompt, raw)]
            text = f"{context.read_text()}\n\n{prompt}"
        _stream(client.generate(_as_prompt(text, raw), mix=ensemble, views=views, sampling=sampling))


def _as_prompt(text: str, raw: bool) -> Prompt:
    return text if raw else [{"role": "user", "content": text}]


@app.command()
def chat(
    bundle: Bundle = None,
    address: Address = "127.0.0.1:50051",
    mix: MixOption = None,
    space: Space = Space.LOGITS,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
) -> None:
    """Talk in several turns; an empty line or end of file ends."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    messages = [{"role": "system", "content": system}] if system else []
    ensemble = _ensemble(mix, space)
    with _client(bundle, address) as client:
        while True:
            try:
                text = input("> ")
            except EOFError:
                return
            if not text.strip():
                return
            messages.append({"role": "user", "content": text})
            answer = _stream(client.generate(messages, mix=ensemble, sampling=sampling))
            messages.append({"role": "assistant", "content": answer})


@app.command()
def summarise(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="JSONL with a text a record, or a folder of text files.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL; finished records are kept on a rerun.")],
    bundle: Annotated[Path, typer.Option(help="The bundle.")],
    mix: MixOption = None,
    space: Space = Space.LOGITS,
    max_summary_tokens: int = 96,
    chunk_tokens: Annotated[int | None, typer.Option(help="Tokens a piece of a long document.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What to do with each text.")] = None,
    threads: Threads = 0,
) -> None:
    """Summarise many documents offline."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .runtime.engine.engine import Engine
    from .runtime.jobs.summarise import INSTRUCTION, SummariseParams
    from .runtime.jobs.summarise import summarise as run

    params = SummariseParams(instruction or INSTRUCTION, max_summary_tokens, chunk_tokens)
    if not source.exists():
        raise NotFoundError(f"there is no file or folder '{source}'")
    columns = (TextColumn("summarising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Engine.from_bundle(bundle, EngineConfig(threads=threads)) as engine, Progress(*columns) as progress:
        task = progress.add_task("", total=None)

        def show(ended: int, total: int) -> None:
            progress.update(task, completed=ended, total=total)

        report = run(engine, source, out, ensemble=_ensemble(mix, space), params=params, on_progress=show)
    rate = report.completion_tokens / report.seconds if report.seconds else 0.0
    print(f"{out}: {report.done} done, {report.skipped} skipped, {report.failed} failed, {rate:.0f} tok/s")


if __name__ == "__main__":
    main()
