"""`fuse`: choose an ensemble of a few from many fine-tunes of one base, and measure it.

Members are selected, and their mix is fitted, on the validation set. The validation figure that is reported comes from
nested cross-validation. The test set is used once, at the end, and decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.checkpoints.members.adapter import attach, fit, is_separable
from ...runtime.checkpoints.members.files import check_base, first_layer
from ...runtime.checkpoints.members.registry import format_at
from ...runtime.errors import BundleError, ConfigError, DataError, UnsupportedModelError
from ...runtime.model.members import MemberKind
from ..data.batches import Item, make_batch, plan
from ..data.encode import encoded_digest
from ..data.example import Split
from ..params import TuneParams
from ..training.progress import Progress
from ..training.provenance import choice_line, chosen_by, environment
from ..training.train import RunData, Workbench, note_duplicates
from .fusion import FUSION, weights_digest
from .mixfit import F64, Interval, Pool, cross_validated, paired_bootstrap, select_and_fit
from .params import FuseParams

BASE = "base"
REPORT = "README.md"


@dataclass(frozen=True, slots=True)
class Answers:
    """What K members compute for the T answer tokens of one split."""

    states: Tensor  # [K, T, hidden] after the final norm
    targets: Tensor  # [T] token ids
    examples: npt.NDArray[np.int64]  # [T] index of the example
    documents: npt.NDArray[np.int64]  # [T] index of the example's document
    digest: str  # of the examples, as the model sees them


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
            f"the head of '{bench.model_dir.name}' is not linear (linear_head is false); a mix can be fitted only where "
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
    validation, test = _answers(bench, paths, params, counts, progress)
    head = bench.base.get("lm_head.weight", bench.base["model.embed_tokens.weight"])

    progress.note("selecting")
    pool = Pool(params.space, validation.states, head, validation.targets)
    everything = np.ones(len(validation.targets), np.bool_)
    mix = select_and_fit(pool, everything, max_members=params.max_members)
    progress.note("cross-validating")
    nested = cross_validated(pool, validation.documents, folds=params.folds, max_members=params.max_members)
    progress.note("testing")
    report = _report(names, pool, Pool(params.space, test.states, head, test.targets), test, mix, nested)
    result = {
        "space": str(params.space),
        "mix": {names[k]: float(mix[k]) for k in np.flatnonzero(mix)},
        "members": {names[k]: str(paths[names[k]] or "") for k in np.flatnonzero(mix)},
        "weights": {name: weights_digest(path) for name, path in members.items()},
        "chosen_by": chosen_by(bench.dataset, len(set(validation.examples.tolist())), validation.digest),
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


def _answers(
    bench: Workbench,
    paths: Mapping[str, Path | None],
    params: FuseParams,
    counts: dict[Split, int],
    progress: Progress,
) -> tuple[Answers, Answers]:
    """Every member's states at the answer tokens of (validation, test)."""
    splits = {name: _first_layer(bench, path) for name, path in paths.items()}
    deepest = max(1, bench.config.num_layers - min(splits.values()))
    loaded: dict[int, RunData] = {}
    collected: dict[Split, list[Tensor]] = {"validation": [], "test": []}
    for name, path in paths.items():
        progress.note(f"member {name}")
        layers = bench.config.num_layers - splits[name] or deepest  # the base has no split: use the deepest
        for count in dict.fromkeys((deepest, layers)):
            if count not in loaded:
                encoding = TuneParams(layers=count, max_length=params.max_length)
                loaded[count] = bench.load(encoding, counts, progress.advance)
        decoder, start = member_decoder(bench, path), bench.config.num_layers - layers
        for part, states in collected.items():
            states.append(_states(decoder, loaded[layers].parts[part], start))
    first = next(iter(loaded.values()))
    return _pack(collected["validation"], first.parts["validation"]), _pack(collected["test"], first.parts["test"])


def _first_layer(bench: Workbench, path: Path | None) -> int:
    if path is None:
        return bench.config.num_layers
    manifest, weights = format_at(path).read(path, bench.config)
    check_base(path, manifest, bench.digest)
    trained_on = manifest.get("data", {})
    if trained_on.get("name") == bench.dataset.name and trained_on.get("digest") != bench.dataset.digest:
        raise BundleError(
            f"the member '{path}' was trained on another version or split of '{bench.dataset.name}', so its training examples "
            "may be among the test examples; use the same file and the same near_duplicates, or tune it again"
        )
    if any(name.startswith("lm_head.") for name in weights):
        raise BundleError(f"the member '{path}' has a head of its own; an ensemble shares one head")
    return first_layer(weights, bench.config.num_layers)


def member_decoder(bench: Workbench, path: Path | None) -> Decoder:
    """The base model with the member's tail, or with its adapter attached. `path` None: the base itself."""
    if path is None:
        return Decoder.from_weights(bench.config, bench.base).eval()
    form = format_at(path)
    own = form.read(path, bench.config)[1]
    if form.kind is MemberKind.ADAPTER:
        own = fit(bench.base, own)
        if is_separable(own):
            return attach(Decoder.from_weights(bench.config, bench.base).eval(), own)
    return Decoder.from_weights(bench.config, {**bench.base, **form.merged(bench.base, own)}).eval()


@torch.no_grad()
def _states(decoder: Decoder, items: Sequence[Item], split: int) -> Tensor:
    """[T, hidden] states after the final norm at the positions that predict the answers, in the items' order."""
    rows: list[Tensor | None] = [None] * len(items)
    for chosen in plan([len(item.encoded.token_ids) for item in items], 2048, None):
        batch = make_batch([items[i] for i in chosen])
        cached = [item.hidden for item in batch.items if item.hidden is not None]
        tokens = [torch.tensor(item.encoded.token_ids[:-1]) for item in batch.items]
        pad = torch.nn.utils.rnn.pad_sequence
        if cached:
            hidden = pad(cached, batch_first=True).float()
        else:  # no cache, or an adapter on the first layer
            hidden = decoder.run_layers(decoder.embed(pad(tokens, batch_first=True)), 0, split)
        last = decoder.config.num_layers
        states = decoder.norm(decoder.run_layers(hidden, split, last, positions=batch.positions))
        for row, index in enumerate(chosen):
            rows[index] = states[row, : items[index].encoded.num_targets].clone()
    return torch.cat([row for row in rows if row is not None])


def _pack(states: Sequence[Tensor], items: Sequence[Item]) -> Answers:
    counts = [item.encoded.num_targets for item in items]
    targets = [item.encoded.token_ids[index] for item in items for index in item.encoded.targets]
    sources = {source: i for i, source in enumerate(dict.fromkeys(item.encoded.source for item in items))}
    return Answers(
        torch.stack(list(states)),
        torch.tensor(targets),
        np.repeat(np.arange(len(items)), counts),
        np.repeat([sources[item.encoded.source] for item in items], counts),
        encoded_digest([item.encoded for item in items]),
    )


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
    fitted = report["fitted"]
    rows += [("fitted mix", fitted["validation"], fitted["validation_nested"], fitted["test"])]
    lines = ["| member | validation | validation, nested CV | test |", "| --- | --- | --- | --- |"]
    for name, *values in rows:
        lines.append(f"| {name} | {' | '.join(f'{v:.4f}' if isinstance(v, float) else v for v in values)} |")
    mix = ", ".join(f"{name} {value:.3f}" for name, value in result["mix"].items())
    return "\n".join(
        [
            f"# A fused ensemble of {result['base']['name']} on {result['data']['name']}",
            "",
            f"Mix ({result['space']} space): {mix}.",
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
        ]
    )
