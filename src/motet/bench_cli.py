"""The `motet bench` commands. Each parses its options and calls one function of `motet.bench`."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .options import Threads, given_options
from .parameter_options import words
from .runtime.errors import ConfigError, MissingPackageError

Value = TypeVar("Value", int, float)

bench = typer.Typer(no_args_is_help=True, help="Measure. Each command writes JSON and an HTML page.")

BundleArgument = Annotated[Path, typer.Argument(help="Directory of the bundle.")]
Bundles = Annotated[list[Path], typer.Argument(help="Directories of bundles of one model, with different bits.")]
Model = Annotated[str, typer.Option(help="The model that the bundles were exported from.")]
PeerPython = Annotated[
    Path | None, typer.Option(help="Interpreter that has the peers; default: the one that `make peers` made.")
]
Results = Annotated[Path, typer.Option(help="Directory for the JSON and HTML.")]
BatchSizes = Annotated[str, typer.Option(help="Sequences at the same time.")]
Context = Annotated[int, typer.Option(min=1, help="Positions per sequence.")]
DecodedTokens = Annotated[int, typer.Option(min=2, help="Tokens to generate per sequence.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate per sequence.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens per prompt.")]
Repeats = Annotated[int, typer.Option(min=1, help="Repeats; figures are medians.")]


@bench.command("decode")
def bench_decode(
    typed: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(help="Directory of the bundle; leave it out with --random.")] = None,
    out: Results = Path("bench/results"),
    batch_sizes: BatchSizes = "1,4,8,16",
    ensemble_sizes: Annotated[str, typer.Option(help="Numbers of members per request; default: 1 and all.")] = "",
    prompt_tokens: PromptTokens = 512,
    context: Context = 256,
    new_tokens: NewTokens = 32,
    repeats: Repeats = 5,
    threads: Threads = 0,
    backend: Annotated[str, typer.Option(help="auto; with --random: torch.")] = "auto",
    random: Annotated[str, typer.Option(help="Random weights of a shape: llama-8b, llama-1b, smollm2-135m.")] = "",
    bits: Annotated[int, typer.Option(help="Bits of random weights: 16, 8 or 4.")] = 16,
) -> None:
    """Prefill and decode speed, by batch size and ensemble size, against the machine's limits."""
    if random:
        if backend != "torch" or bundle is not None:
            raise ConfigError("--random makes a model for the torch backend; give --backend torch and no bundle")
        _refuse(typed, {"prompt_tokens", "new_tokens"}, "bundles; leave it out with --random")
        torch_decode = _gpu_bench("torch_decode")
        sizes = (integers(batch_sizes), integers(ensemble_sizes or "1"))
        options = {"bits": bits, "context": context, "repeats": repeats, "threads": threads}
        torch_decode.run(random, out, batch_sizes=sizes[0], ensemble_sizes=sizes[1], **options)
        return
    if bundle is None or backend != "auto":
        raise ConfigError("give a bundle, or --backend torch with --random SHAPE")
    _refuse(typed, {"bits"}, "random weights; give --random too")
    from .bench import decode

    decode.run(
        bundle,
        out,
        batch_sizes=integers(batch_sizes),
        ensemble_sizes=integers(ensemble_sizes) if ensemble_sizes else None,
        prompt_tokens=prompt_tokens,
        context=context,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
    )


@bench.command("isa")
def bench_isa(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    paths: Annotated[str, typer.Option(help="Instruction sets, such as amx,avx512; default: all of this CPU.")] = "",
    batch_sizes: BatchSizes = "1,16",
    prompt_tokens: PromptTokens = 512,
    context: Context = 256,
    new_tokens: DecodedTokens = 16,
    repeats: Repeats = 5,
    threads: Threads = 0,
) -> None:
    """Every instruction set of this CPU beside the others: dot products, speed, and whether the bits are the same."""
    from .bench import isa

    isa.run(
        bundle,
        out,
        paths=words(paths) if paths else (),
        batch_sizes=integers(batch_sizes),
        prompt_tokens=prompt_tokens,
        context=context,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
    )


@bench.command("pages")
def bench_pages(results: Annotated[Path, typer.Argument(help="Directory of results.")] = Path("bench/results")) -> None:
    """Draw the HTML pages of results, and `index.html`, anew from their JSON."""
    from .bench.lib import report

    if not results.is_dir():
        raise ConfigError(f"{results} is not a directory")
    typer.echo(f"{report.draw(results)} pages, listed in {results / 'index.html'}")


@bench.command("kernels")
def bench_kernels(
    out: Results = Path("bench/results"),
    static: Annotated[bool, typer.Option("--static", help="Compile only: needs no GPU, predicts times.")] = False,
) -> None:
    """Speed of every GPU kernel: bytes moved, and the share of the bandwidth. Needs an NVIDIA GPU, but for --static."""
    _gpu_bench("static" if static else "kernels").run(out)


@bench.command("peers")
def bench_peers(
    bundles: Bundles,
    model: Model = "smollm2-135m",
    out: Results = Path("bench/results"),
    peers: Annotated[str, typer.Option(help="Runtimes, such as 'llama.cpp Q4_1,CTranslate2'; default: all.")] = "",
    peer_python: PeerPython = None,
    prompt_tokens: PromptTokens = 512,
    context: Context = 256,
    long_context: Annotated[int, typer.Option(min=0, help="Positions of the long context; 0: leave it out.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps per measurement.")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences at the same time.")] = 16,
    repeats: Repeats = 5,
    threads: Threads = 0,
) -> None:
    """Speed of Motet and other runtimes on the same prompts, interleaved in one run."""
    from .bench.peers import compare

    compare.run(
        bundles,
        model,
        out,
        names=[name for name in peers.split(",") if name] or None,
        python=peer_python,
        prompt_tokens=prompt_tokens,
        context=context,
        long_context=long_context,
        steps=steps,
        concurrency=concurrency,
        repeats=repeats,
        threads=threads,
    )


@bench.command("quality")
def bench_quality(
    bundles: Annotated[list[Path], typer.Argument(help="Directories of bundles of one model.")],
    model: Model = "smollm2-135m",
    out: Results = Path("bench/results"),
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens, at least.")] = 4096,
    backend: Annotated[str, typer.Option(help="auto, cpu or onnx.")] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="The cpu backend's KV cache: auto, int8 or bf16.")] = "auto",
    peers: Annotated[bool, typer.Option(help="Also measure llama.cpp, with files of the same weights.")] = True,
    peer_python: PeerPython = None,
    threads: Threads = 0,
) -> None:
    """The cost of quantisation: bundles and llama.cpp against fp32 on held-out text."""
    if peer_python is not None and not peers:
        raise ConfigError("--peer-python is for the peers; leave out --no-peers")
    from .bench import quality

    quality.run(
        bundles,
        model,
        out,
        num_tokens=tokens,
        backend=backend,
        kv_dtype=kv_dtype,
        peers=peers,
        python=peer_python,
        threads=threads,
    )


@bench.command("quantisation")
def bench_quantisation(
    model: Annotated[str, typer.Argument(help="A pulled model's name or a model directory.")],
    work: Annotated[Path, typer.Option(help="Directory that keeps bundles and parts that are done.")],
    out: Results = Path("bench/results"),
    lora: Annotated[Path | None, typer.Option(help="An adapter, which is added to the weights.")] = None,
    targets: Annotated[str, typer.Option(help="Average bits a weight.")] = "4.55",
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens, at least.")] = 4096,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the calibration text.")] = 16384,
    peers: Annotated[bool, typer.Option(help="llama.cpp too, which quantises the same weights.")] = False,
    peer_python: PeerPython = None,
) -> None:
    """Methods and targets of `motet export` beside each other: size, quality as served, time."""
    if peer_python is not None and not peers:
        raise ConfigError("--peer-python is for the peers; add --peers, or leave it out")
    from .bench import quantisation

    sizes = tuple(floats(targets))
    quantisation.run(
        model,
        work,
        out,
        lora=lora,
        targets=sizes,
        num_tokens=tokens,
        calibration_tokens=calibration_tokens,
        peers=peers,
        python=peer_python,
    )


@bench.command("summaries")
def bench_summaries(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    documents: Annotated[int, typer.Option(min=2, help="Documents, at most.")] = 40,
    min_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document, at least.")] = 1500,
    threads: Threads = 0,
) -> None:
    """Summaries of long documents against their first sentences and their first chunk, in ROUGE-L."""
    from .bench import summaries

    summaries.run(bundle, out, documents=documents, min_tokens=min_tokens, threads=threads)


@bench.command("context")
def bench_context(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    contexts: Annotated[str, typer.Option(help="Positions of each context.")] = "256,512,1024,2048,4096",
    new_tokens: DecodedTokens = 16,
    repeats: Repeats = 5,
    threads: Threads = 0,
) -> None:
    """How the time per token grows with the context, against the bytes of the KV cache."""
    from .bench import context

    context.run(bundle, out, contexts=integers(contexts), new_tokens=new_tokens, repeats=repeats, threads=threads)


@bench.command("busy")
def bench_busy(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    batch_sizes: BatchSizes = "1,16",
    context: Context = 256,
    new_tokens: DecodedTokens = 128,
    repeats: Repeats = 3,
    threads: Threads = 0,
) -> None:
    """Decode speed while another process keeps one core busy."""
    from .bench import busy

    busy.run(
        bundle,
        out,
        batch_sizes=integers(batch_sizes),
        context=context,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
    )


@bench.command("speculative")
def bench_speculative(
    bundle: BundleArgument,
    out: Results = Path("bench/results"),
    documents: Annotated[int, typer.Option(min=1, help="Requests per set.")] = 12,
    source_tokens: Annotated[int, typer.Option(min=8, help="Tokens per document.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer, at most.")] = 96,
    speculative_tokens: Annotated[int, typer.Option(min=1, help="Tokens per draft, at most.")] = 8,
    temperatures: Annotated[str, typer.Option(help="Temperatures; 0 is greedy.")] = "0",
    repeats: Repeats = 3,
    threads: Threads = 0,
) -> None:
    """Speed with and without drafts: answers that quote their source, and chat."""
    from .bench import speculative

    speculative.run(
        bundle,
        out,
        documents=documents,
        source_tokens=source_tokens,
        max_tokens=max_tokens,
        speculative_tokens=speculative_tokens,
        temperatures=floats(temperatures),
        repeats=repeats,
        threads=threads,
    )


@bench.command("fine-tunes")
def bench_fine_tunes(
    model: Annotated[str, typer.Argument(help="A pulled model's name, or a directory.")] = "smollm2-135m",
    out: Results = Path("bench/results"),
    members: Annotated[int, typer.Option(min=2, help="Fine-tunes.")] = 8,
    layers: Annotated[int, typer.Option(min=1, help="Last layers that they change.")] = 10,
    rank: Annotated[int, typer.Option(min=1, help="Rank of their updates.")] = 16,
    streams: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of so many requests, of each; ratios are medians.")] = 6,
    document_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document.")] = 1000,
    new_tokens: NewTokens = 64,
    threads: Threads = 0,
) -> None:
    """Many fine-tunes of one base, each request its own, against the base alone under the same traffic."""
    from .bench import fine_tunes

    traffic = fine_tunes.Traffic(members, streams, rounds, document_tokens, answer=new_tokens)
    fine_tunes.run(model, out, traffic=traffic, layers=layers, rank=rank, threads=threads)


def _gpu_bench(name: str) -> Any:
    """Import a module of `bench.gpu`. Raises `MissingPackageError` if torch or Triton is not installed."""
    try:
        return import_module(f".bench.gpu.{name}", __package__)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the GPU benches need {error.name}; install it with `pip install 'motet[gpu]'`"
        ) from error


def _refuse(context: typer.Context, names: set[str], use: str) -> None:
    """Raises `ConfigError` if one of these options stands on the command line. `use`: what it is for."""
    for name in sorted(names & given_options(context)):
        raise ConfigError(f"--{name.replace('_', '-')} is for {use}")


def integers(text: str) -> list[int]:
    """Whole numbers of at least 1, one at least."""
    numbers = _values(text, int, "whole numbers of at least 1 such as 1,4,16")
    if min(numbers) < 1:
        raise ConfigError(f"every number in '{text}' must be at least 1")
    return numbers


def floats(text: str) -> list[float]:
    """Finite numbers of at least 0, one at least."""
    numbers = _values(text, float, "numbers such as 0.5,2")
    if not all(0 <= number < math.inf for number in numbers):
        raise ConfigError(f"every number in '{text}' must be finite and at least 0")
    return numbers


def _values(text: str, kind: Callable[[str], Value], what: str) -> list[Value]:
    try:
        values = [kind(item) for item in words(text)]
    except ValueError:
        values = []
    if not values:
        raise ConfigError(f"'{text}' is not a list of {what}")
    return values
