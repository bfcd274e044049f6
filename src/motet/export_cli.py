"""`motet export`: a model and its members as one bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .export.quantisation.method import Method, Target
from .options import MixOption, by_name, read_mix
from .runtime.api.request import Space
from .runtime.errors import BundleError, ConfigError
from .runtime.model.members import MemberKind
from .tables import table

if TYPE_CHECKING:
    from .export.base_model import BaseModel
    from .export.quantisation.calibration import Calibration


def mount(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(export)


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A pulled model's name, a model directory, or an ONNX decoder graph: its file or directory."
        ),
    ],
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
    bits: Annotated[
        int | None, typer.Option(help="8, 4 (head and embedding in 8), or 32; default: 8, or what a target permits.")
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Columns per quantisation group of the layers; default: 64 for 8 bits, 32 for 4. The head has 32."
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="How 4-bit values are chosen: round, search, awq or gptq; default: gptq with a target, else round."
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Average bits a weight, head and embedding included: chooses bits and groups.")
    ] = None,
    max_mb: Annotated[float | None, typer.Option(help="The same by the size of the weights, in megabytes.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="The same by the expected KL from the original, in nats a token.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on: a text or JSONL file; default: built-in conversations.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="How much of it; default: 16384, and 1024 for 8 bits.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers per tail; default: as many as the tails need.")] = None,
    graphs: Annotated[
        bool | None,
        typer.Option("--graphs/--no-graphs", help="Write ONNX graphs, which the onnx backend needs. [default: graphs]"),
    ] = None,
    parity: Annotated[
        bool | None,
        typer.Option(
            "--parity/--no-parity", help="Measure every member, as it is served, against fp32. [default: parity]"
        ),
    ] = None,
    search: Annotated[
        float | None,
        typer.Option(
            help="Minutes in which many bundles are made and measured; OUT gets those worth keeping and a report. A target "
            "says which one is chosen; default: the smallest with a KL of at most 0.01."
        ),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Data of a search's questions, as `motet tune` takes it; default: stdlib-docs."),
    ] = None,
) -> None:
    """Quantise a model and its members into one bundle, and measure it against fp32. An ONNX decoder graph that another program
    exported (with optimum-onnx, or ONNX Runtime's model builder) becomes a bundle as it is, for the onnx backend; no other option
    goes with it."""
    from rich.console import Console
    from rich.progress import TaskID

    from .export.base_model import BaseModel
    from .export.bundle_writer import export_bundle
    from .export.decoder_graph import export_decoder_graph, find_graph
    from .export.parity import HeldOut
    from .export.quantisation.calibration import Calibration
    from .export_search import search_bundles
    from .finetune.data.dataset import heldout_token_ids, text_token_ids  # only here: export itself needs no finetune
    from .runtime.checkpoints.progress import LineProgress
    from .runtime.checkpoints.store import home, resolve_model

    graph = find_graph(Path(model))
    if graph is not None:
        given: dict[str, object] = {"--tail": tail, "--lora": lora, "--fusion": fusion, "--merge": merge or None}
        given |= {"--mix": mix, "--space": space, "--bits": bits, "--group": group, "--layers": layers}
        given |= {"--method": method, "--target-bits": target_bits, "--max-mb": max_mb, "--max-kl": max_kl}
        given |= {"--calibration": calibration, "--calibration-tokens": calibration_tokens}
        given |= {"--graphs": graphs, "--parity": parity, "--search": search, "--questions": questions}
        _refuse_with_graph(graph, given)
        print(export_decoder_graph(graph, out))
        return
    _check_search(search, {"--bits": bits, "--group": group, "--parity/--no-parity": parity, "--questions": questions})
    graphs, parity = graphs is not False, parity is not False
    base = BaseModel(resolve_model(model))
    if fusion is None:
        chosen = _members(tail or [], lora or [], mix, space or Space.LOGITS)
    elif tail or lora or mix is not None or space is not None:
        raise ConfigError("--fusion has its own members, mix and space; leave out --tail, --lora, --mix and --space")
    else:
        chosen = _fused_members(fusion, base.digest)
    num_members = len(chosen["tails"]) + len(chosen["loras"])
    tokenizer, context = base.tokenizer, base.config.max_position_embeddings
    targets = {"bits": target_bits, "megabytes": max_mb, "kl": max_kl}
    target = Target(**targets) if any(value is not None for value in targets.values()) else None
    only = method  # that a search tries
    method = method or (Method.ROUND if target is None and search is None else Method.GPTQ)
    light = method is Method.ROUND and target is None and search is None  # only 8 bits use the text then
    if light and bits in (4, 32) and (calibration or calibration_tokens):
        raise ConfigError(
            f"{bits} bits with method round use no calibration text; leave it out, or give another --method"
        )
    with LineProgress(transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if search is not None and what != "calibrating":
                return  # of each candidate
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        text = None
        if not light or bits not in (4, 32):
            count = calibration_tokens or (1024 if light else 16384)
            chunks = (
                heldout_token_ids(tokenizer, count, context=context, split="train")
                if calibration is None
                else text_token_ids(calibration, tokenizer, count, context=context)
            )
            text = Calibration(chunks, None if light else home() / "calibration", show)
        held_out = None
        if parity:
            chunks = heldout_token_ids(tokenizer, 4096, context=context)
            total = len(chunks) * max(1, num_members)
            task = progress.add_task("parity", total=total, visible=search is None)
            held_out = HeldOut(chunks, on_chunk=lambda: None if search else progress.advance(task))
        common: dict[str, Any] = {
            "merge": merge,
            "num_tail_layers": layers,
            "graphs": graphs,
            "calibration": text,
            "held_out": held_out,
        }

        def make(path: Path, **how: Any) -> Path:
            return export_bundle(base, path, **chosen, **common, **how)

        if search is None:
            make(out, bits=bits, group_size=group, method=method, target=target)
        else:
            assert text is not None
            settings = {"layers": layers, "graphs": graphs, "merge": merge, **_settings(base, text, chunks, chosen)}
            found = search_bundles(
                base, make, out, search, only, target, questions or "stdlib-docs", settings, progress.console
            )
    if search is not None:
        print(found)
        return
    print(out)
    if parity:
        Console().print(_parity_table(out))


def _check_search(search: float | None, given: Mapping[str, object]) -> None:
    """Raises `ConfigError` for options that do not go together."""
    if search is None:
        if given["--questions"] is not None:
            raise ConfigError("--questions are those of a search; add --search MINUTES, or leave them out")
        return
    used = [name for name, value in given.items() if value is not None and name != "--questions"]
    if used:
        raise ConfigError(f"a search chooses bits and groups, and measures each bundle; leave out {', '.join(used)}")
    if not 0 < search < float("inf"):
        raise ConfigError(f"--search has a number of minutes above 0, got {search:g}")


def _settings(
    base: BaseModel, text: Calibration, held_out: Sequence[Sequence[int]], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """What the bundles of a search depend on, beside the model."""
    from .export.quantisation.statistics import text_digest
    from .runtime.model.files import directory_digest

    paths = {**chosen["tails"], **chosen["loras"]}
    members = {name: None if path is None else directory_digest(path) for name, path in paths.items()}
    return {
        "members": members,
        "mix": chosen["mix"],
        "temperatures": chosen["temperatures"],
        "space": str(chosen["space"]),
        "calibration": text_digest(base.digest, text.chunks),
        "held_out": text_digest(base.digest, held_out),
    }


def _refuse_with_graph(graph: Path, given: Mapping[str, object]) -> None:
    """Raises `ConfigError` for an option that a decoder graph cannot follow."""
    used = [name for name, value in given.items() if value not in (None, [])]
    if used:
        raise ConfigError(
            f"'{graph}' is a decoder graph, whose weights are its own: it is one member, not quantised again or compared with "
            f"fp32; leave out {', '.join(used)}, or export the model's directory of safetensors"
        )


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
    """Members, mix, temperatures and space, as `export_bundle` takes them, from what the user wrote."""
    parts = None if mix is None else read_mix(mix)
    return {
        "tails": by_name(map(_tail, tail)),
        "loras": by_name(map(_adapter, lora)),
        "mix": None if parts is None else {name: c for name, (c, _) in parts.items()},
        "temperatures": {name: t for name, (_, t) in (parts or {}).items() if t != 1},
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
        "temperatures": fusion.temperatures,
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
