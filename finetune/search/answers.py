"""`answers_of`: what members compute for the answers of some splits: the states that a mix is fitted on, and a student learns
from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.checkpoints.members.adapter import attach, fit, is_separable
from ...runtime.checkpoints.members.files import check_base, first_layer
from ...runtime.checkpoints.members.registry import format_at
from ...runtime.errors import BundleError
from ...runtime.model.members import MemberKind
from ..data.batches import Item, embed, make_batch, plan
from ..data.encode import encoded_digest
from ..data.example import Split
from ..params import TuneParams
from ..training.progress import Progress
from ..training.train import RunData, Workbench


@dataclass(frozen=True, slots=True)
class Answers:
    """What K members compute for the T answer tokens of one split."""

    states: Tensor  # [K, T, hidden] after the final norm
    targets: Tensor  # [T] token ids
    examples: npt.NDArray[np.int64]  # [T] index of the example
    documents: npt.NDArray[np.int64]  # [T] index of the example's document
    digest: str  # of the examples, as the model sees them


def answers_of(
    bench: Workbench,
    paths: Mapping[str, Path | None],
    max_length: int | None,
    counts: dict[Split, int],
    progress: Progress,
) -> dict[Split, Answers]:
    """Every member's states at the answer tokens of the first `counts` examples of these splits. `paths`: member →
    directory, None for the base. Raises `BundleError` (a member of another base or data set, or with a head of its
    own), `NotFoundError`, `DataError`."""
    splits = {name: _first_layer(bench, path) for name, path in paths.items()}
    deepest = max(1, bench.config.num_layers - min(splits.values()))
    loaded: dict[int, RunData] = {}
    collected: dict[Split, list[Tensor]] = {part: [] for part in counts}
    for name, path in paths.items():
        progress.note(f"member {name}")
        layers = bench.config.num_layers - splits[name] or deepest  # the base has no split: use the deepest
        for count in dict.fromkeys((deepest, layers)):
            if count not in loaded:
                encoding = TuneParams(layers=count, max_length=max_length)
                loaded[count] = bench.load(encoding, counts, progress.advance)
        decoder, start = member_decoder(bench, path), bench.config.num_layers - layers
        for part, states in collected.items():
            states.append(_states(decoder, loaded[layers].parts[part], start))
    first = next(iter(loaded.values()))
    return {part: _pack(states, first.parts[part]) for part, states in collected.items()}


def head_of(bench: Workbench) -> Tensor:
    """[vocab, hidden]: the head that all members share."""
    head, scale = bench.base.get("lm_head.weight", bench.base["model.embed_tokens.weight"]), bench.config.logit_scale
    return head if scale == 1 else head * scale


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
        if cached:
            hidden = torch.nn.utils.rnn.pad_sequence(cached, batch_first=True).float()
        else:  # no cache, or an adapter on the first layer
            hidden = decoder.run_layers(embed(decoder, [item.encoded for item in batch.items]), 0, split)
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
