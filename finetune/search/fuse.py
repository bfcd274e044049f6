"""`fuse`: from many fine-tunes of one base to an ensemble of a few, and what it is worth.

Members are selected and their mix is fitted on the validation set; the figure that is reported for that is the nested
cross-validation's. The test set is looked at once, at the end, and decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...runtime.api.request import Space
from ...runtime.checkpoints.decoder import Decoder
from ...runtime.checkpoints.members.adapter import attach
from ...runtime.checkpoints.members.files import first_layer
from ...runtime.checkpoints.members.registry import format_at
from ...runtime.errors import BundleError, ConfigError, DataError, UnsupportedModelError
from ...runtime.model.members import MemberKind
from ..data.batches import Item, make_batch, plan
from ..data.example import Split
from ..params import TuneParams
from ..training.provenance import environment
from ..training.train import RunData, Workbench
from .mixfit import F64, Interval, Pool, cross_validated, paired_bootstrap, select_and_fit

BASE = "base"
FUSION, REPORT = "fusion.json", "README.md"


@dataclass(frozen=True, slots=True)
class FuseParams:
    """`base`: how the members' examples are encoded (max_length) and batched."""

    space: Space = Space.LOGITS
    max_members: int = 4
    validation_examples: int = 64
    test_examples: int = 128
    max_length: int = 320
    folds: int = 4
    with_base: bool = True  # the untuned base is a candidate too

    def __post_init__(self) -> None:
        if self.max_members < 1 or self.folds < 2:
            raise ConfigError(f"max_members is at least 1 and folds 2, got {self.max_members} and {self.folds}")


@dataclass(frozen=True, slots=True)
class Answers:
    """The members on one split: T answer tokens."""

    states: Tensor  # [K, T, hidden]
    targets: Tensor  # [T]
    examples: npt.NDArray[np.int64]  # [T]
    documents: npt.NDArray[np.int64]  # [T]


def fuse(
    bench: Workbench,
    members: Mapping[str, Path],
    out: Path,
    params: FuseParams | None = None,
    *,
    tell: Callable[[str], None] = lambda _what: None,
) -> dict[str, Any]:
    """Choose and fit; write fusion.json (mix, members' paths, figures) and its report to `out`, and return it.

    `members`: name → tail or adapter directory, trials of a search or any others. Raises `ConfigError`, `DataError`,
    `BundleError` (a member of another base or with a head of its own), `NotFoundError`, `UnsupportedModelError` (a head
    that is not linear: `Pool` takes logits for products of states and head).
    """
    params = params or FuseParams()
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
    names = list(paths)
    counts: dict[Split, int] = {"validation": params.validation_examples, "test": params.test_examples}
    validation, test = _answers(bench, paths, params, counts, tell)
    head = bench.base.get("lm_head.weight", bench.base["model.embed_tokens.weight"])

    tell("selecting")
    pool = Pool(params.space, validation.states, head, validation.targets)
    everything = np.ones(len(validation.targets), np.bool_)
    mix = select_and_fit(pool, everything, max_members=params.max_members)
    tell("cross-validating")
    nested = cross_validated(pool, validation.documents, folds=params.folds, max_members=params.max_members)
    tell("testing")
    report = _report(names, pool, Pool(params.space, test.states, head, test.targets), test, mix, nested)
    result = {
        "space": str(params.space),
        "mix": {names[k]: float(mix[k]) for k in np.flatnonzero(mix)},
        "members": {names[k]: str(paths[names[k]] or "") for k in np.flatnonzero(mix)},
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
    tell: Callable[[str], None],
) -> tuple[Answers, Answers]:
    """Every member's states at the answers of (validation, test)."""
    splits = {name: _first_layer(bench, path) for name, path in paths.items()}
    deepest = max(1, bench.config.num_layers - min(splits.values()))
    loaded: dict[int, RunData] = {}
    collected: dict[Split, list[Tensor]] = {"validation": [], "test": []}
    for name, path in paths.items():
        tell(f"member {name}")
        layers = bench.config.num_layers - splits[name] or deepest  # the base runs from the deepest split
        for count in dict.fromkeys((deepest, layers)):
            if count not in loaded:
                encoding = TuneParams(layers=count, max_length=params.max_length)
                loaded[count] = bench.load(encoding, counts)
        decoder, start = member_decoder(bench, path), bench.config.num_layers - layers
        for part, states in collected.items():
            states.append(_states(bench, decoder, loaded[layers].parts[part], start))
    first = next(iter(loaded.values()))
    return _pack(collected["validation"], first.parts["validation"]), _pack(collected["test"], first.parts["test"])


def _first_layer(bench: Workbench, path: Path | None) -> int:
    if path is None:
        return bench.config.num_layers
    manifest, weights = format_at(path).read(path)
    if manifest["base"]["digest"] != bench.digest:
        raise BundleError(f"the member '{path}' was trained on another base than '{bench.model_dir.name}'")
    if "lm_head.weight" in weights:
        raise BundleError(f"the member '{path}' has a head of its own; an ensemble shares one head")
    return first_layer(weights, bench.config.num_layers)


def member_decoder(bench: Workbench, path: Path | None) -> Decoder:
    """The base with the member's weights, or its adapter beside them."""
    if path is None:
        return Decoder.from_weights(bench.config, bench.base).eval()
    form = format_at(path)
    own = form.read(path)[1]
    if form.kind is MemberKind.ADAPTER:
        return attach(Decoder.from_weights(bench.config, bench.base).eval(), own)
    return Decoder.from_weights(bench.config, {**bench.base, **own}).eval()


@torch.no_grad()
def _states(bench: Workbench, decoder: Decoder, items: Sequence[Item], split: int) -> Tensor:
    """[T, hidden] normed states at the answers' positions, in the items' order."""
    rows: list[Tensor | None] = [None] * len(items)
    for chosen in plan([len(item.encoded.token_ids) for item in items], 2048, None):
        batch = make_batch([items[i] for i in chosen])
        known = [item.hidden for item in batch.items if item.hidden is not None]
        tokens = [torch.tensor(item.encoded.token_ids[:-1]) for item in batch.items]
        pad = torch.nn.utils.rnn.pad_sequence
        if known:
            hidden = pad(known, batch_first=True).float()
        else:  # without a cache, or adapted from the first layer on
            hidden = decoder.run_layers(decoder.embed(pad(tokens, batch_first=True)), 0, split)
        last = decoder.config.num_layers
        states = decoder.norm(decoder.run_layers(hidden, split, last, positions=batch.positions))
        for row, index in enumerate(chosen):
            rows[index] = states[row, : items[index].encoded.num_targets].clone()
    return torch.cat([row for row in rows if row is not None])


def _pack(states: Sequence[Tensor], items: Sequence[Item]) -> Answers:
    counts = [item.encoded.num_targets for item in items]
    targets = [token for item in items for token in item.encoded.token_ids[item.encoded.answer :]]
    sources = {source: i for i, source in enumerate(dict.fromkeys(item.encoded.source for item in items))}
    return Answers(
        torch.stack(list(states)),
        torch.tensor(targets),
        np.repeat(np.arange(len(items)), counts),
        np.repeat([sources[item.encoded.source] for item in items], counts),
    )


def _report(
    names: list[str], validation: Pool, test: Pool, answers: Answers, mix: F64, nested: float
) -> dict[str, Any]:
    def figures(coefficients: F64) -> dict[str, float]:
        return {"validation": float(validation.nll(coefficients).mean()), "test": float(test.nll(coefficients).mean())}

    one = np.eye(len(names))
    tuned = [k for k, name in enumerate(names) if name != BASE]
    best = min(tuned, key=lambda k: float(validation.single[k].mean()))  # chosen on validation, like the mix
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
    """An interval in words: −1.2 % [−1.9, −0.6]."""
    found = Interval(**interval)
    return f"{found.change:+.2%} [{found.low:+.2%}, {found.high:+.2%}]"


def fusion_card(result: Mapping[str, Any]) -> str:
    """The report in Markdown."""
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
            "Negative log-likelihood of the answers, nats a token:",
            "",
            *lines,
            "",
            f"Fitted mix against the best single member ({report['best_single']}, by validation) on the test set, 95 % paired "
            f"bootstrap: {change(report['against_best_single']['examples'])} over examples, "
            f"{change(report['against_best_single']['documents'])} over documents.",
            "",
        ]
    )
