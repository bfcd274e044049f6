"""`fuse`: choose an ensemble of a few from many fine-tunes of one base, and measure it.

Members are selected, and their mix is fitted, on the validation set. The validation figure that is reported comes from
nested cross-validation. The test set is used once, at the end, and decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import ConfigError, DataError, UnsupportedModelError
from ..data.example import Split
from ..training.progress import Progress
from ..training.provenance import choice_line, chosen_by, environment
from ..training.train import Workbench, note_duplicates
from .answers import Answers, answers_of, head_of
from .fusion import FUSION, weights_digest
from .mixfit import F64, Interval, Pool, cross_validated, paired_bootstrap, select_and_fit
from .params import FuseParams
from .temperatures import fit_temperatures

BASE = "base"
REPORT = "README.md"


def fuse(
    bench: Workbench,
    members: Mapping[str, Path],
    out: Path,
    params: FuseParams | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Choose members, fit their mix, and write fusion.json and a report to `out`.

    Returns the content of fusion.json: the mix, the members' paths, the figures.

    `members`: name → directory of a tail or adapter, from a search or elsewhere. Raises `ConfigError`, `DataError` (fewer
    than two members), `BundleError` (a member has another base, its own head, or was trained on another version of the
    data set, whose training examples may be test examples of this one), `NotFoundError`, `UnsupportedModelError` (the
    head is not linear: `Pool` multiplies states by the head).
    """
    params, progress = params or FuseParams(), progress or Progress(False)
    if not bench.config.linear_head:
        raise UnsupportedModelError(
            f"the head of '{bench.model_dir.name}' is not linear (it has a soft cap); a mix can be fitted only where "
            "logits are products of hidden states and the head; choose the mix by hand"
        )
    if BASE in members:
        raise ConfigError(f"'{BASE}' is the untuned model's name; call the member something else")
    paths: dict[str, Path | None] = {**({BASE: None} if params.with_base else {}), **members}
    if len(paths) < 2:
        raise DataError("there is nothing to fuse: give at least two members")
    note_duplicates(bench, progress)
    names = list(paths)
    counts: dict[Split, int] = {"validation": params.validation_examples, "test": params.test_examples}
    answers = answers_of(bench, paths, params.max_length, counts, progress)
    validation, test = answers["validation"], answers["test"]
    head = head_of(bench)

    progress.note("selecting")
    pool = Pool(params.space, validation.states, head, validation.targets)
    everything = np.ones(len(validation.targets), np.bool_)
    mix, shrinkage = select_and_fit(pool, everything, validation.documents, max_members=params.max_members)
    plain, temperatures = mix, np.ones(len(names))
    if params.temperatures:
        progress.note("fitting temperatures")
        mix, temperatures = fit_temperatures(pool, mix, shrinkage, everything)
    progress.note("cross-validating")
    nested = cross_validated(pool, validation.documents, folds=params.folds, max_members=params.max_members)
    test_pool = Pool(params.space, test.states, head, test.targets)
    progress.note("testing")
    report = _report(names, pool, test_pool, test, plain, nested)
    if params.temperatures:
        nested = cross_validated(
            pool, validation.documents, folds=params.folds, max_members=params.max_members, refine=fit_temperatures
        )
        report |= _tempered(pool, test_pool, test, (plain, mix), temperatures, nested, report)
    result = {
        "space": str(params.space),
        "mix": {names[k]: float(mix[k]) for k in np.flatnonzero(mix)},
        "temperatures": {names[k]: float(temperatures[k]) for k in np.flatnonzero(mix) if temperatures[k] != 1},
        "shrinkage": shrinkage,
        "members": {names[k]: str(paths[names[k]] or "") for k in np.flatnonzero(mix)},
        "candidates": {name: str(path) for name, path in members.items()},
        "weights": {name: weights_digest(path) for name, path in members.items()},
        "chosen_by": chosen_by(bench.dataset, len(np.unique(validation.examples)), validation.digest),
        "report": report,
        "base": {"name": bench.model_dir.name, "digest": bench.digest},
        "data": {"name": bench.dataset.name, "digest": bench.dataset.digest},
        "params": {**asdict(params), "space": str(params.space)},
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / FUSION).write_text(json.dumps(result, indent=1) + "\n")
    (out / REPORT).write_text(fusion_card(result))
    return result


def _report(
    names: list[str], validation: Pool, test: Pool, answers: Answers, mix: F64, nested: float
) -> dict[str, Any]:
    def figures(coefficients: F64) -> dict[str, float]:
        return {"validation": float(validation.nll(coefficients).mean()), "test": float(test.nll(coefficients).mean())}

    one = np.eye(len(names))
    tuned = [k for k, name in enumerate(names) if name != BASE]
    best = min(tuned, key=lambda k: float(validation.single[k].mean()))  # chosen on validation, as the mix is
    chosen = np.flatnonzero(mix)
    uniform = one[chosen].mean(axis=0)
    against = {
        unit: asdict(paired_bootstrap(test.nll(one[best]), test.nll(mix), groups))
        for unit, groups in (("examples", answers.examples), ("documents", answers.documents))
    }
    return {
        "members": {name: figures(one[k]) for k, name in enumerate(names)},
        "best_single": names[best],
        "uniform": figures(uniform),
        "uniform_of_all": figures(one[tuned].mean(axis=0)),
        "fitted": {**figures(mix), "validation_nested": nested},
        "against_best_single": against,
        "tokens": {"validation": len(validation.targets), "test": len(test.targets)},
    }


def _tempered(
    validation: Pool,
    test: Pool,
    answers: Answers,
    mixes: tuple[F64, F64],
    temperatures: F64,
    nested: float,
    report: dict[str, Any],
) -> dict[str, Any]:
    """What temperatures change in the report; `mixes`: without and with them. The figures without them are kept beside."""
    (plain, mix), best = mixes, report["best_single"]
    alone = np.eye(len(mix))[list(report["members"]).index(best)]
    after = test.nll(mix, temperatures)
    figures = {"validation": float(validation.nll(mix, temperatures).mean()), "test": float(after.mean())}
    units = {"examples": answers.examples, "documents": answers.documents}
    return {
        "fitted": {**figures, "validation_nested": nested},
        "without_temperatures": report["fitted"],
        "against_best_single": {u: asdict(paired_bootstrap(test.nll(alone), after, g)) for u, g in units.items()},
        "against_no_temperatures": {u: asdict(paired_bootstrap(test.nll(plain), after, g)) for u, g in units.items()},
    }


def change(interval: Mapping[str, float]) -> str:
    """A relative change with its confidence interval, as text: -1.20% [-1.90%, -0.60%]."""
    parts = Interval(**interval)
    return f"{parts.change:+.2%} [{parts.low:+.2%}, {parts.high:+.2%}]"


def fusion_card(result: Mapping[str, Any]) -> str:
    """The report of a fusion, in Markdown."""
    report = result["report"]
    rows = [(name, f["validation"], "", f["test"]) for name, f in report["members"].items()]
    rows += [("uniform mix of the chosen", report["uniform"]["validation"], "", report["uniform"]["test"])]
    rows += [("uniform mix of all", report["uniform_of_all"]["validation"], "", report["uniform_of_all"]["test"])]
    fits = {"fitted mix, without temperatures": report.get("without_temperatures"), "fitted mix": report["fitted"]}
    rows += [(n, f["validation"], f["validation_nested"], f["test"]) for n, f in fits.items() if f is not None]
    lines = ["| member | validation | validation, nested CV | test |", "| --- | --- | --- | --- |"]
    for name, *values in rows:
        lines.append(f"| {name} | {' | '.join(f'{v:.4f}' if isinstance(v, float) else v for v in values)} |")
    mix = ", ".join(f"{name} {value:.3f}" for name, value in result["mix"].items())
    tempered = []
    if "against_no_temperatures" in report:
        found = ", ".join(f"{name} {result['temperatures'].get(name, 1.0):.3f}" for name in result["mix"])
        changed = report["against_no_temperatures"]
        tempered = [
            f"Temperatures: {found}. Against the mix without them on the test set: {change(changed['examples'])} over examples, "
            f"{change(changed['documents'])} over documents.",
            "",
        ]
    return "\n".join(
        [
            f"# A fused ensemble of {result['base']['name']} on {result['data']['name']}",
            "",
            f"Mix ({result['space']} space): {mix}; shrunk to uniform by {result['shrinkage']:.0%}.",
            "",
            choice_line("Members and mix were chosen", result["chosen_by"]),
            "",
            "Negative log-likelihood of the answers, nats per token:",
            "",
            *lines,
            "",
            f"Fitted mix against the best single member ({report['best_single']}, by validation) on the test set, 95 % paired "
            f"bootstrap: {change(report['against_best_single']['examples'])} over examples, "
            f"{change(report['against_best_single']['documents'])} over documents.",
            "",
            *tempered,
        ]
    )
