"""The fine-tuning commands: tune, search, fuse, distil, calibrate, repro, and `bench finetune`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .finetune.params import MAX_LENGTH_HELP, PROJECTOR, NearDuplicates, TuneParams
from .finetune.projector_params import ProjectorParams
from .finetune.search.params import DistilParams, FuseParams, SearchParams, SearchSpace
from .options import by_name, with_signature
from .parameter_options import with_parameters, words
from .runtime.api.config import EngineConfig
from .runtime.api.request import Space
from .runtime.errors import ConfigError, NotFoundError

Model = Annotated[str, typer.Argument(help="A pulled model's name or a model directory.")]
NearDuplicatesOption = Annotated[
    NearDuplicates, typer.Option(help="What is done with training examples that nearly repeat a held-out one.")
]
Data = Annotated[str, typer.Option(help="stdlib-code, stdlib-docs, or a JSONL, JSON, Parquet or text file.")]
CacheDir = Annotated[Path | None, typer.Option(help="Trunk cache; default: $MOTET_HOME/trunk-cache.")]
CacheSize = Annotated[
    float, typer.Option(min=0.0, help="Largest size of the trunk cache, and of that of media, GB each.")
]
# What all trials of a search have in common.
SEARCH_BASE = (
    *("method", "targets", "alpha", "examples", "validation_examples", "epochs", "bag", "max_length", "loss"),
    *("precision", "epsilon"),
)
# What a student's training has of `TuneParams`.
STUDENT = (
    *("method", "layers", "rank", "alpha", "targets", "examples", "validation_examples", "epochs", "learning_rate"),
    *("weight_decay", "dropout", "schedule", "batch_tokens", "max_length", "precision", "evaluations", "patience"),
    "seed",
)


def mount(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the commands to `app` and `bench`."""
    for command in (tune, search, fuse, distil, calibrate, repro):
        app.command()(command)
    bench.command("finetune")(bench_finetune)
    bench.command("busy-finetune")(bench_busy_finetune)
    bench.command("ensemble")(bench_ensemble)


def _cache(root: Path | None, gigabytes: float) -> Any:
    from .finetune.training.trunk_cache import TrunkCache

    return TrunkCache(root, int(gigabytes * 1e9))


@with_parameters("params", TuneParams())
@with_parameters("projector", ProjectorParams())
def tune(
    model: Model,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the tail or adapter, or of the model with encoders. The same call resumes a killed run."
        ),
    ],
    params: TuneParams,
    projector: ProjectorParams,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="projector: image=SOURCE or audio=SOURCE, a directory of Whisper, SigLIP or a model with encoders, or a .pth "
            "file of EfficientNet-Lite0; may be repeated. Default: the model's own encoders are trained on."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The member's name; default: the directory's.")] = None,
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
    near_duplicates: NearDuplicatesOption = NearDuplicates.DROP,
    no_cache: Annotated[bool, typer.Option(help="Run the trunk anew for every batch.")] = False,
) -> None:
    """Fine-tune a frozen model: a tail, an adapter, or all layers; or give it an encoder of images or sounds (projector)."""
    from .finetune.training.train import tune as train
    from .finetune.training.tune_projector import tune_projector
    from .runtime.checkpoints.store import resolve_model

    given = [name for name, value in dataclasses.asdict(projector).items() if value is not None]
    rest = {
        "name": name,
        "params": params,
        "cache": _cache(cache, cache_gb),
        "use_cache": not no_cache,
        "near_duplicates": near_duplicates,
    }
    if params.method == PROJECTOR:
        encoders = _encoders(encoder or [])
        manifest = tune_projector(resolve_model(model), data, out, encoders=encoders, projector=projector, **rest)
    elif given or encoder:
        used = ", ".join([*given, *(["encoder"] if encoder else [])])
        raise ConfigError(
            f"{used}: method '{params.method}' trains no encoder; leave it out, or set method to projector"
        )
    else:
        manifest = train(resolve_model(model), data, out, **rest)
    before, after = (manifest["metrics"][f"validation_loss_{when}"] for when in ("before", "after"))
    print(f"{out}: validation loss {before:.3f} → {after:.3f} nats per token")
    if manifest["privacy"]:
        spent = manifest["privacy"]
        print(f"ε = {spent['epsilon']:.3f} at δ = {spent['delta']:.2g} ({spent['accountant']})")


@with_parameters("params", SearchParams())
@with_parameters("space", SearchSpace())
@with_parameters("base", SearchParams().base, only=SEARCH_BASE)
def search(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory of the search. The same call resumes a killed search.")],
    base: TuneParams,
    space: SearchSpace,
    params: SearchParams,
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
    near_duplicates: NearDuplicatesOption = NearDuplicates.DROP,
) -> None:
    """Search hyper-parameters by Bayesian optimisation over one cached trunk. Each trial can become a member."""
    from .finetune.search.search import REPORT, private_budget
    from .finetune.search.search import search as run
    from .finetune.training.progress import Progress
    from .finetune.training.train import Workbench
    from .runtime.checkpoints.store import resolve_model

    params = dataclasses.replace(params, base=base, space=space)
    bench = Workbench(resolve_model(model), data, _cache(cache, cache_gb), near_duplicates)

    def on_trial(trial: Any, best: Any) -> None:
        print(
            f"trial {trial.number + 1}/{params.trials}: {trial.value:.4f} ({trial.state}, {trial.seconds:.0f} s); "
            f"best {best.value:.4f} (trial {best.number + 1})",
            flush=True,
        )

    with Progress() as progress:
        result = run(bench, out, params, on_trial=on_trial, progress=progress)
    print(
        f"{out}: best validation loss {result.best.value:.4f}, ensemble of at most {params.members} {result.ensemble:.4f}; "
        f"see {out / REPORT}, then `motet fuse`"
    )
    if base.epsilon is not None:
        spent = private_budget(result.trials)
        print(
            f"the whole search: ε = {spent['epsilon']:.3f} at δ = {spent['delta']:.2g}, the trials' smallest, composed over "
            f"{spent['runs']} trials; the validation set is not covered"
        )


@with_parameters("params", FuseParams())
def fuse(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory of the report and the mix.")],
    params: FuseParams,
    search: Annotated[list[Path] | None, typer.Option(help="A search's directory; may be repeated.")] = None,
    member: Annotated[list[str] | None, typer.Option(help="name=DIR of a tail or adapter; may be repeated.")] = None,
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
    near_duplicates: NearDuplicatesOption = NearDuplicates.DROP,
) -> None:
    """Choose members, fit their mix, and measure it on a test set that took no part in either."""
    from .finetune.search.fuse import fuse as run
    from .finetune.search.fuse import fusion_card
    from .finetune.training.progress import Progress
    from .finetune.training.train import Workbench
    from .runtime.checkpoints.store import resolve_model

    trials = (trial for directory in search or [] for trial in _trials(directory).items())
    members = by_name([*map(_pair, member or []), *trials])
    bench = Workbench(resolve_model(model), data, _cache(cache, cache_gb), near_duplicates)
    with Progress() as progress:
        result = run(bench, members, out, params, progress=progress)
    print(fusion_card(result))
    print(f"motet export {model} BUNDLE --fusion {out}")


@with_parameters("params", DistilParams())
@with_parameters("base", TuneParams(), only=STUDENT)
def distil(
    model: Model,
    data: Data,
    fusion: Annotated[Path, typer.Option(help="Directory that `motet fuse` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory of the student. The same call resumes a killed run.")],
    base: TuneParams,
    params: DistilParams,
    name: Annotated[str | None, typer.Option(help="The student's name; default: the directory's.")] = None,
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
    near_duplicates: NearDuplicatesOption = NearDuplicates.DROP,
) -> None:
    """Distil a fused ensemble into one student, a tail or an adapter."""
    from .finetune.search.distil import distil as run
    from .finetune.search.fuse import change
    from .finetune.training.progress import Progress
    from .finetune.training.train import Workbench
    from .runtime.checkpoints.store import resolve_model

    bench = Workbench(resolve_model(model), data, _cache(cache, cache_gb), near_duplicates)
    with Progress() as progress:
        params = dataclasses.replace(params, base=base)
        found = run(bench, fusion, out, params, name=name, progress=progress)["distilled"]
    for who, loss in found["test"].items():
        print(f"{who:12} {loss:.4f} nats per token on {found['tokens']} test tokens")
    print(f"student against the best single member: {change(found['student_against_best_single'])}, over documents")
    kept = found["share_kept"]
    said = "the ensemble gained nothing on the test set" if kept is None else f"{kept:.0%} of the ensemble's gain kept"
    print(f"{out}: {said}; it costs what one member costs")


@with_signature
def calibrate(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle; its manifest is changed.")],
    data: Data,
    trust: EngineConfig,
    examples: Annotated[int, typer.Option(help="Validation examples, at most.")] = 96,
    test_examples: Annotated[int, typer.Option(help="Test examples, at most; they decide nothing.")] = 128,
    max_length: Annotated[int | None, typer.Option(help=MAX_LENGTH_HELP)] = None,
    near_duplicates: NearDuplicatesOption = NearDuplicates.DROP,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: one per CPU that this process may use.")] = 0,
) -> None:
    """Fit a bundle's confidences on data that no member was trained on, and measure them. A signature holds no longer then."""
    from .finetune.search.calibrate import calibrate as run
    from .finetune.training.progress import Progress
    from .runtime.engine.open import check_signature

    check_signature(bundle, trust)

    with Progress() as progress:
        found = run(
            bundle,
            data,
            examples=examples,
            test_examples=test_examples,
            max_length=max_length,
            near_duplicates=near_duplicates,
            threads=threads,
            progress=progress,
        )
    report = found["report"]
    print(f"{bundle}: calibrated on {report['validation_tokens']} tokens; on {report['test_tokens']} others:")
    for name, error in report["ece"].items():
        print(f"{name:22} expected calibration error {error:.4f}")
    print(f"{report['accuracy']:.1%} of the most probable tokens are right")


def repro(
    run: Annotated[Path, typer.Argument(help="Directory of a tail or adapter.")],
    model: Annotated[str, typer.Option(help="The base model that it was trained on.")] = "smollm2-135m",
    cache: CacheDir = None,
    cache_gb: CacheSize = 8.0,
) -> int:
    """Run a member's training again and compare the figures; exits with 1 if they differ."""
    from .finetune.search.repro import repro as rerun
    from .runtime.checkpoints.store import resolve_model

    result = rerun(run, resolve_model(model), _cache(cache, cache_gb))
    for name, old, new in result.rows:
        print(f"{name:24} {old:.6f} → {new:.6f}")
    print(f"weights: {'the same, bit for bit' if result.same_weights else 'different'}")
    for line in result.changed:
        print(f"changed since: {line}")
    return 0 if result.is_same else 1


def bench_finetune(
    model: Annotated[str, typer.Argument(help="A pulled model's name.")] = "smollm2-135m",
    data: str = "stdlib-code",
    work: Annotated[Path, typer.Option(help="Working directory; finished parts are kept there.")] = Path(
        ".motet/bench-finetune"
    ),
    out: Annotated[Path, typer.Option(help="Directory for the JSON and HTML.")] = Path("bench/results"),
    parts: Annotated[
        str, typer.Option(help="Some of cache,search,served,random,regularisation,private.")
    ] = "cache,search,served,private",
    examples: int = 200,
    trials: int = 16,
    seeds: int = 3,
    spaces: Annotated[str, typer.Option(help="Where members are mixed: probs, logits or both.")] = "probs",
) -> None:
    """Measure what the trunk cache saves, and what search and fusion gain."""
    from .bench.finetune import PARTS, Budget, run_bench

    chosen = words(parts)
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise ConfigError(f"parts are {', '.join(PARTS)}, got {unknown}")
    budget = Budget(examples=examples, trials=trials, seeds=seeds, spaces=tuple(Space(word) for word in words(spaces)))
    run_bench(model, data, work, out, chosen, budget)


def bench_ensemble(
    tasks: Annotated[list[str] | None, typer.Argument(help="Data sets; default: stdlib-code and stdlib-docs.")] = None,
    model: Annotated[str, typer.Option(help="A pulled model's name.")] = "smollm2-135m",
    work: Annotated[Path, typer.Option(help="Working directory; finished parts are kept there.")] = Path(
        ".motet/bench-ensemble"
    ),
    out: Annotated[Path, typer.Option(help="Directory for the JSON and HTML.")] = Path("bench/results"),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per task.")] = 3,
    minutes: Annotated[float, typer.Option(min=0.0, help="Training time of each way.")] = 15.0,
    examples: int = 300,
    test_examples: int = 400,
    max_length: int = 160,
) -> None:
    """Ensembles against one low-rank update of all layers, at equal training time."""
    from .bench.ensemble import Budget, run_bench

    budget = Budget(seconds=60 * minutes, examples=examples, test=test_examples, max_length=max_length)
    run_bench(model, tasks or ["stdlib-code", "stdlib-docs"], seeds, work, out, budget)


def bench_busy_finetune(
    model: Annotated[str, typer.Argument(help="A pulled model's name.")] = "smollm2-135m",
    data: str = "stdlib-code",
    out: Annotated[Path, typer.Option(help="Directory for the JSON and HTML.")] = Path("bench/results"),
    examples: int = 64,
    repeats: int = 3,
) -> None:
    """Measure training while another process burns a core, against training alone."""
    from .bench.busy_finetune import run_bench

    run_bench(model, data, out, examples=examples, repeats=repeats)


def _pair(text: str) -> tuple[str, Path]:
    name, found, path = text.partition("=")
    if not found:
        raise ConfigError(f"--member takes name=DIR, got '{text}'")
    return name, Path(path)


def _encoders(given: list[str]) -> dict[str, Path]:
    encoders: dict[str, Path] = {}
    for text in given:
        medium, found, path = text.partition("=")
        if not found or medium in encoders:
            raise ConfigError(f"--encoder takes image=SOURCE or audio=SOURCE, each once, got {given}")
        encoders[medium] = Path(path)
    return encoders


def _trials(directory: Path) -> dict[str, Path]:
    """Name → directory of the complete trials of a search."""
    from .finetune.search.search import read_trials, trial_dir

    trials = [trial for trial in read_trials(directory) if trial.state == "complete"]
    if not trials:
        raise NotFoundError(f"there is no finished trial of a search at '{directory}'")
    return {f"{directory.name}-{t.number:03d}": trial_dir(directory, t.number) for t in trials}
