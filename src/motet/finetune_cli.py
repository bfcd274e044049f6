"""The fine-tuning commands: tune, search, fuse, repro, and `bench finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .runtime.api.request import Space
from .runtime.errors import ConfigError, NotFoundError
from .runtime.model.members import MemberKind

Model = Annotated[str, typer.Argument(help="A pulled model's name or a model directory.")]
Data = Annotated[str, typer.Option(help="stdlib-code, stdlib-docs, or a JSONL, Parquet or text file.")]
CacheDir = Annotated[Path | None, typer.Option(help="Trunk cache; default: $MOTET_HOME/trunk-cache.")]
CacheSize = Annotated[float, typer.Option(min=0.0, help="The trunk cache's bound, GB.")]
Method = Annotated[str, typer.Option(help="tail, lora, qlora or full.")]
Layers = Annotated[int | None, typer.Option(help="How many of the last layers; default: 2 for tail, else all.")]


def mount(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (tune, search, fuse, repro):
        app.command()(command)
    bench.command("finetune")(bench_finetune)


def _cache(root: Path | None, gigabytes: float) -> Any:
    from .finetune.training.trunk_cache import TrunkCache

    return TrunkCache(root, int(gigabytes * 1e9))


def tune(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory of the tail or adapter; a killed run goes on from there.")],
    name: Annotated[str | None, typer.Option(help="The member's name; default: the directory's.")] = None,
    method: Method = "tail",
    layers: Layers = None,
    head: Annotated[bool, typer.Option(help="Train the head too; the result is exported alone only.")] = False,
    rank: Annotated[int, typer.Option(help="Of an adapter.")] = 8,
    alpha: Annotated[float, typer.Option(help="Of an adapter: its scale is alpha / rank.")] = 16.0,
    targets: Annotated[str, typer.Option(help="Projections that an adapter changes.")] = "q_proj,v_proj",
    examples: Annotated[int, typer.Option(help="Training examples at most.")] = 400,
    validation_examples: int = 64,
    epochs: int = 2,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens a batch.")] = 1024,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    clip: Annotated[float, typer.Option(help="Of the gradient's norm; 0: none.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (mixed).")] = "fp32",
    weight_decay: Annotated[float, typer.Option(help="L2, decoupled.")] = 0.01,
    l1: Annotated[float, typer.Option(help="Times the summed absolute change.")] = 0.0,
    label_smoothing: float = 0.0,
    dropout: float = 0.0,
    evaluations: Annotated[int, typer.Option(help="Validations a run.")] = 2,
    patience: Annotated[int, typer.Option(help="Validations without a new best until it stops; 0: never.")] = 0,
    augmentation: Annotated[str, typer.Option(help="none, token-dropout, span-mask or paraphrase.")] = "none",
    bag: Annotated[float, typer.Option(help="Share of the training examples, drawn by the seed.")] = 1.0,
    max_length: Annotated[int, typer.Option(help="Tokens an example at most.")] = 320,
    epsilon: Annotated[float | None, typer.Option(help="DP-SGD with this privacy budget.")] = None,
    delta: Annotated[float | None, typer.Option(help="Below 1 / N; default: 1 / (10 N).")] = None,
    batch_examples: Annotated[int, typer.Option(help="DP-SGD: examples a step, on average.")] = 8,
    seed: int = 0,
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
    no_cache: Annotated[bool, typer.Option(help="Run the trunk anew for every batch.")] = False,
) -> None:
    """Fine-tune: a tail, an adapter, or all layers of a frozen model."""
    from .finetune.params import TuneParams
    from .finetune.training.train import tune as train
    from .runtime.checkpoints.store import resolve_model

    values = {
        "method": method, "layers": layers, "head": head, "rank": rank, "alpha": alpha, "examples": examples,
        "validation_examples": validation_examples, "epochs": epochs, "learning_rate": lr, "schedule": schedule,
        "batch_tokens": batch_tokens, "accumulate": accumulate, "clip": clip, "precision": precision,
        "weight_decay": weight_decay, "l1": l1, "label_smoothing": label_smoothing, "dropout": dropout,
        "evaluations": evaluations, "patience": patience, "augmentation": augmentation, "bag": bag,
        "max_length": max_length, "epsilon": epsilon, "delta": delta, "batch_examples": batch_examples, "seed": seed,
    }  # fmt: skip
    params = TuneParams.from_dict({**values, "targets": _words(targets)})
    found = _cache(cache, cache_gb)
    manifest = train(resolve_model(model), data, out, name=name, params=params, cache=found, use_cache=not no_cache)
    before, after = (manifest["metrics"][f"validation_loss_{when}"] for when in ("before", "after"))
    print(f"{out}: validation loss {before:.3f} → {after:.3f} nats a token")
    if manifest["privacy"]:
        spent = manifest["privacy"]
        print(f"ε = {spent['epsilon']:.3f} at δ = {spent['delta']:.2g} ({spent['accountant']})")


def search(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory of the search; a killed one goes on from there.")],
    trials: int = 16,
    method: Method = "tail",
    layers: Annotated[str, typer.Option(help="Choices of n, for tails.")] = "1,2,4",
    augmentation: Annotated[str, typer.Option(help="Choices; each but none costs a trunk pass.")] = "none",
    examples: Annotated[int, typer.Option(help="Training examples at most.")] = 400,
    validation_examples: int = 64,
    epochs: int = 2,
    bag: Annotated[float, typer.Option(help="Share of the examples a trial sees: members that differ.")] = 0.8,
    max_length: Annotated[int, typer.Option(help="Tokens an example at most.")] = 320,
    epsilon: Annotated[float | None, typer.Option(help="DP-SGD: the budget of each trial.")] = None,
    sampler: Annotated[str, typer.Option(help="gp (Bayesian) or random.")] = "gp",
    prune: Annotated[bool, typer.Option(help="End hopeless trials early.")] = True,
    seed: int = 0,
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
) -> None:
    """Search hyper-parameters by Bayesian optimisation over one cached trunk; every trial is a member to be."""
    from .finetune.params import TuneParams
    from .finetune.search.search import REPORT, SearchParams, private_epsilon
    from .finetune.search.search import search as run
    from .finetune.search.space import SearchSpace
    from .finetune.training.train import Workbench
    from .runtime.checkpoints.store import resolve_model

    base = TuneParams.from_dict(
        {
            "method": method,
            "examples": examples,
            "validation_examples": validation_examples,
            "epochs": epochs,
            "bag": bag,
            "max_length": max_length,
            "epsilon": epsilon,
            "evaluations": 3,
        }
    )
    space = SearchSpace(layers=tuple(_numbers(layers)), augmentation=tuple(_words(augmentation)))
    params = SearchParams(base, space, trials, seed, _sampler(sampler), prune=prune)
    bench = Workbench(resolve_model(model), data, _cache(cache, cache_gb))

    def tell(trial: Any, best: Any) -> None:
        print(
            f"trial {trial.number + 1}/{trials}: {trial.value:.4f} ({trial.state}, {trial.seconds:.0f} s); "
            f"best {best.value:.4f} (trial {best.number + 1})",
            flush=True,
        )

    result = run(bench, out, params, tell=tell)
    print(f"{out}: best validation loss {result.best.value:.4f}; see {out / REPORT}, then `motet fuse`")
    if epsilon is not None:
        spent, delta = private_epsilon(result, examples, params)
        print(f"the whole search: ε = {spent:.3f} at δ = {delta:.2g}, composed over {len(result.trials)} trials")


def fuse(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory of the report and the mix.")],
    search: Annotated[list[Path] | None, typer.Option(help="A search's directory; may be given several times.")] = None,
    member: Annotated[list[str] | None, typer.Option(help="name=DIR of a tail or adapter.")] = None,
    space: Annotated[Space, typer.Option(help="Where members are mixed.")] = Space.LOGITS,
    max_members: int = 4,
    validation_examples: int = 64,
    test_examples: int = 128,
    max_length: int = 320,
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
) -> None:
    """Choose members, fit their mix, and measure it on a test set that decided nothing."""
    from .finetune.search.fuse import FuseParams, fusion_card
    from .finetune.search.fuse import fuse as run
    from .finetune.training.train import Workbench
    from .runtime.checkpoints.store import resolve_model

    members = {name: path for item in member or [] for name, path in [_pair(item)]}
    for directory in search or []:
        members |= _trials(directory)
    params = FuseParams(space, max_members, validation_examples, test_examples, max_length)
    bench = Workbench(resolve_model(model), data, _cache(cache, cache_gb))
    result = run(bench, members, out, params, tell=lambda what: print(f"{what} …", flush=True))
    print(fusion_card(result))
    given = " ".join(_export_option(name, path) for name, path in result["members"].items())
    mix = ",".join(f"{name}={value:.6f}" for name, value in result["mix"].items())
    print(f"motet export {model} BUNDLE {given} --mix {mix} --space {space}")


def _export_option(name: str, path: str) -> str:
    """The option of `motet export` for a member; without a path it is the base."""
    from .runtime.checkpoints.members.registry import format_at

    if not path:
        return f"--{MemberKind.BASE.flag} {name}"
    return f"--{format_at(Path(path)).kind.flag} {name}={path}"


def repro(
    run: Annotated[Path, typer.Argument(help="Directory of a tail or adapter.")],
    model: Annotated[str, typer.Option(help="The base that it was trained on.")] = "smollm2-135m",
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
) -> int:
    """Run a member's training again and compare the figures; ends with 1 if they differ."""
    from .finetune.search.repro import repro as again
    from .runtime.checkpoints.store import resolve_model

    found = again(run, resolve_model(model), _cache(cache, cache_gb))
    for name, old, new in found.rows:
        print(f"{name:24} {old:.6f} → {new:.6f}")
    print(f"weights: {'the same, bit for bit' if found.same_weights else 'different'}")
    for line in found.changed:
        print(f"changed since: {line}")
    return 0 if found.is_same else 1


def bench_finetune(
    model: Annotated[str, typer.Argument(help="A pulled model's name.")] = "smollm2-135m",
    data: str = "stdlib-code",
    work: Annotated[Path, typer.Option(help="Working directory; finished parts are kept there.")] = Path(
        ".motet/bench-finetune"
    ),
    out: Annotated[Path, typer.Option(help="Directory for the JSON and HTML.")] = Path("bench/results"),
    parts: Annotated[
        str, typer.Option(help="Which, of cache,search,served,random,regularisation,private.")
    ] = "cache,search,served,private",
    examples: int = 200,
    trials: int = 16,
    seeds: int = 3,
    spaces: Annotated[str, typer.Option(help="In which the members are fused: probs, logits or both.")] = "probs",
) -> None:
    """What the trunk cache saves, and what search and fusion gain."""
    from .bench.finetune import PARTS, Budget, run_bench

    chosen = _words(parts)
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise ConfigError(f"parts are {', '.join(PARTS)}, got {unknown}")
    budget = Budget(examples=examples, trials=trials, seeds=seeds, spaces=tuple(Space(word) for word in _words(spaces)))
    run_bench(model, data, work, out, chosen, budget)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise ConfigError(f"'{text}' is not a list of whole numbers such as 1,2,4") from None


def _sampler(text: str) -> Any:
    if text not in ("gp", "random"):
        raise ConfigError(f"sampler must be gp or random, got '{text}'")
    return text


def _pair(text: str) -> tuple[str, Path]:
    name, found, path = text.partition("=")
    if not found:
        raise ConfigError(f"--member takes name=DIR, got '{text}'")
    return name, Path(path)


def _trials(directory: Path) -> dict[str, Path]:
    """The members that a search left, by name."""
    from .finetune.search.search import read_trials, trial_dir

    trials = [trial for trial in read_trials(directory) if trial.state == "complete"]
    if not trials:
        raise NotFoundError(f"there is no finished trial of a search at '{directory}'")
    return {f"{directory.name}-{t.number:03d}": trial_dir(directory, t.number) for t in trials}
