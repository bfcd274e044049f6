"""`explore`: Bayesian optimisation of bits and methods within a time, and the bundles that are worth keeping.

    search.json       what is searched; a call for something else is refused
    candidates.jsonl  what was measured, a line each
    <candidate>/      the bundles that no other one beats in bytes and KL both
    report.html       all of it as a page
    report.json       the same as JSON, with the candidate that was chosen and why

Reports are written after each candidate. The same call goes on with a search that was stopped, and a call with more time makes a
finished one longer. One process at a time works on a search.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.api.config import EngineConfig
from ...runtime.errors import BundleError, ConfigError, MissingPackageError, UnavailableError
from ...runtime.model.bundle import FORMAT, MANIFEST, WEIGHTS, Bundle
from ...runtime.model.config import DecoderConfig
from ...runtime.model.files import append_line, read_lines, remove_directory, replace_file
from ...runtime.model.layout import decoder_layout
from ..parity import read_parity
from ..quantisation.method import Method, Target
from ..quantisation.quantiser import can_sharpen, plan_bits
from .answers import Question
from .candidate import NAME, Candidate, choose, front
from .measure import measure
from .report import write_report

Export = Callable[[Path, Method, Target], Path]

SETTINGS, CANDIDATES, REPORT, PAGE, LOCK = "search.json", "candidates.jsonl", "report.json", "report.html", ".lock"
_ORDER = (Method.GPTQ, Method.SEARCH, Method.AWQ, Method.ROUND)
_MARGIN = 0.01  # of the range of bits: at its end some weights' scales may need more than 16 bits
_PLACES = (0.1, 0.5, 1.0)  # of the range of bits, where the first method begins; the others begin at the first of them


@dataclass(frozen=True, slots=True)
class Exploration:
    """What is searched. `export(path, method, target)` makes a bundle with a parity report. `method`: the only one that is
    tried; None: all that the model can have. `target`: what decides which one is chosen (see `choose`). `questions` have answers
    to compare with. `settings`: what the result depends on, for a later call to go on. `seconds`: of the whole search, earlier
    calls included; `max_candidates` ends it too."""

    config: DecoderConfig
    export: Export
    settings: Mapping[str, Any]
    seconds: float
    method: Method | None = None
    target: Target | None = None
    questions: Sequence[Question] = ()
    serving: EngineConfig = EngineConfig()
    max_candidates: int | None = None
    seed: int = 0

    @property
    def methods(self) -> tuple[Method, ...]:
        """Those that are tried."""
        if self.method is not None:
            return (self.method,)
        return tuple(method for method in _ORDER if method is not Method.AWQ or can_sharpen(self.config))

    def check(self) -> None:
        """Raises `ConfigError` for what cannot be searched, before anything is made."""
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"a search has a time of more than 0 seconds, got {self.seconds:g}")
        least, _ = plan_bits(self.config)
        if self.target is not None and self.target.bits is not None and self.target.bits < least:
            raise ConfigError(
                f"the fewest bits a weight that this model can have are {least:.3f}, on average, and the target is "
                f"{self.target.bits:g}; raise the target, or prune the model first"
            )
        most = self.serving.positions(self.config.max_position_embeddings)
        for index, one in enumerate(self.questions):
            if len(one.prompt) + len(one.answer) > most:
                raise ConfigError(
                    f"question {index} has {len(one.prompt)} tokens and an answer of {len(one.answer)}, and {most} are served; "
                    "leave it out, or raise max_model_len"
                )


@dataclass(frozen=True, slots=True)
class Result:
    """`chosen`: its bundle is at `path`, and `why` says what for. `kept`: those that no other one beats, smallest first."""

    chosen: Candidate
    path: Path
    why: str
    kept: Sequence[Candidate]
    candidates: Sequence[Candidate]


def explore(
    wanted: Exploration, out: Path, on_candidate: Callable[[Candidate], None] = lambda _candidate: None
) -> Result:
    """Search until the time is over; a candidate that would take longer than what is left is not begun, but one is always made.
    Raises `ConfigError` (what cannot be searched; another search is at `out`; no candidate is within the target, and what was
    found is kept), `BundleError` (its files are damaged), `MissingPackageError`, `UnavailableError` (another process works on
    it), and what `export` and `measure` raise."""
    wanted.check()
    _sampler(wanted, 0)  # fail early: a package may be missing
    with _opened(wanted, out):
        done = _read(out)
        _tidy(out, done)
        while not done or _has_time(wanted, done):
            if wanted.max_candidates is not None and len(done) >= wanted.max_candidates:
                break
            candidate = _make(wanted, out, *_suggest(wanted, done), len(done))
            append_line(out / CANDIDATES, json.dumps(asdict(candidate)))
            done.append(candidate)
            _report(wanted, out, done)
            _tidy(out, done)
            on_candidate(candidate)
        _report(wanted, out, done)
        kept = front(done)
        chosen, why = choose(kept, wanted.target)
    return Result(chosen, out / chosen.name, why, kept, done)


def _has_time(wanted: Exploration, done: Sequence[Candidate]) -> bool:
    return sum(one.seconds for one in done) + max(one.seconds for one in done[-3:]) <= wanted.seconds


def _report(wanted: Exploration, out: Path, done: Sequence[Candidate]) -> None:
    kept = front(done)
    try:
        chosen, why = choose(kept, wanted.target)
    except ConfigError as error:
        chosen, why = min(kept, key=lambda one: one.kl), f"although {error}"
    write_report(out / PAGE, out.name, done, kept, chosen, why)
    content = {
        "chosen": chosen.name,
        "why": why,
        "front": [one.name for one in kept],
        "candidates": [asdict(one) for one in done],
        "settings": _settings(wanted),
    }
    replace_file(out / REPORT, json.dumps(content, indent=1) + "\n")


def _settings(wanted: Exploration) -> dict[str, Any]:
    method = None if wanted.method is None else str(wanted.method)
    own = {"method": method, "questions": len(wanted.questions), "seed": wanted.seed, "bundle_format": FORMAT}
    return {**wanted.settings, **own}


@contextmanager
def _opened(wanted: Exploration, out: Path) -> Iterator[None]:
    """`out` is this search's, and no other process's, meanwhile."""
    path, text = out / SETTINGS, json.dumps(_settings(wanted), indent=1, sort_keys=True) + "\n"
    if out.exists() and not (out / LOCK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"'{out}' exists and is not a search of bundles; choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(
                f"another process searches in '{out}'; wait for it, or choose another directory"
            ) from None
        has_begun = path.is_file() and (out / CANDIDATES).is_file()
        if has_begun and path.read_bytes() != text.encode():
            raise ConfigError(
                f"'{out}' holds a search of another model or with other settings ({SETTINGS}); choose another directory"
            )
        if not has_begun:
            replace_file(path, text)
        yield


def _read(out: Path) -> list[Candidate]:
    """The candidates of earlier calls."""
    path = out / CANDIDATES
    try:
        done = [Candidate.from_dict(json.loads(line)) for line in read_lines(path)]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise BundleError(f"'{path}' is damaged ({error!r}); remove the search and run it again") from error
    for one in front(done):
        if not (out / one.name / MANIFEST).is_file():
            raise BundleError(
                f"the search at '{out}' lacks its bundle '{one.name}'; remove the search and run it again"
            )
    return done


def _tidy(out: Path, done: Sequence[Candidate]) -> None:
    """Remove the bundles that others beat, and what a kill has left."""
    kept = {one.name for one in front(done)}
    for path in out.iterdir():
        if path.is_dir() and path.name not in kept and NAME.match(path.name.removeprefix(".")):
            remove_directory(path)


def _suggest(wanted: Exploration, done: Sequence[Candidate]) -> tuple[Method, float]:
    """The next point: the best method at a few sizes, the others at one, and then what Gaussian processes of both aims say."""
    methods = wanted.methods
    least, high = plan_bits(wanted.config)
    low = least + _MARGIN * (high - least)
    begin = [(methods[0], place) for place in _PLACES] + [(method, _PLACES[0]) for method in methods[1:]]
    if len(done) < len(begin):
        method, place = begin[len(done)]
        return method, low + place * (high - low)
    import optuna

    space = {
        "bits": optuna.distributions.FloatDistribution(low, high),
        "method": optuna.distributions.CategoricalDistribution([str(method) for method in methods]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(directions=["minimize"] * 2, sampler=_sampler(wanted, len(done)))
        for one in done:
            values = [one.num_bytes / 1e6, math.log(max(one.kl, 1e-9))]
            params = {"bits": min(max(one.target_bits, low), high), "method": str(one.method)}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=values))
        found = study.ask(space).params
    return Method(found["method"]), float(found["bits"])


def _sampler(wanted: Exploration, number: int) -> Any:
    try:
        import optuna
        import scipy  # noqa: F401, which the sampler needs

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.GPSampler(seed=wanted.seed * 10_007 + number, n_startup_trials=1)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"a search needs {error.name}; install it with `pip install 'motet[finetune]'`"
        ) from error


def _make(wanted: Exploration, out: Path, method: Method, bits: float, number: int) -> Candidate:
    start = time.monotonic()
    name = f"{number:03d}-{method}-{bits:.2f}"
    path = wanted.export(out / name, method, Target(bits=bits))
    bundle, parity = Bundle.load(path, verify=False), read_parity(path)
    speeds, answers = measure(path, wanted.questions, wanted.serving)

    def mean(figure: str) -> float:
        return float(np.mean([getattr(member, figure) for member in parity.members]))

    return Candidate(
        name,
        method,
        bits,
        bundle.quantisation["average_bits"],
        (path / WEIGHTS).stat().st_size,
        mean("kl"),
        mean("reverse_kl"),
        mean("nll_change"),
        mean("top1"),
        answers.recall,
        answers.rouge_l,
        speeds.decode,
        speeds.prefill,
        _layer_kl(bundle),
        time.monotonic() - start,
    )


def _layer_kl(bundle: Bundle) -> list[float]:
    expected: Mapping[str, float] = bundle.quantisation["expected_kl"] or {}
    layers = [
        sum(expected.get(f"{linear.name}.weight", 0.0) for linear in layer.linears)
        for layer in decoder_layout(bundle.config).layers
    ]
    return [*layers, sum(expected.values()) - sum(layers)]
