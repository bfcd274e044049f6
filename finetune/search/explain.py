"""`explain`: where the mix of a bundle's members is better than they are, token by token, and which member helped there.

A member's *help* at a token is what the mix loses without it, in nats: the negative log-likelihood of the token under the other
members, their coefficients divided by their sum, less that under the whole mix. It is negative where the member hurts. The
*gain* of a document is the mean negative log-likelihood of its answer tokens under the best single member, less that under
the mix. Members are mixed at their temperatures; one alone is scored at temperature 1, as it would be served alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...runtime.api.config import EngineConfig
from ...runtime.api.request import Ensemble, Space
from ...runtime.backends.base import Backend
from ...runtime.backends.open import open_backend
from ...runtime.engine.open import load_bundle
from ...runtime.errors import ConfigError, InvalidEnsembleError
from ...runtime.model.bundle import Bundle
from ...runtime.text.tokenizer import Tokenizer
from ..data.dataset import load_dataset
from ..data.encode import Encoded, encode_parts
from ..data.example import Split
from ..params import NearDuplicates, TuneParams
from ..training.progress import Progress
from .scoring import F64, answer_logits, check_training_data, log_softmax, member_order, tempered

_PROMPT = 600  # characters of a prompt's end that are kept


@dataclass(frozen=True, slots=True)
class Explained:
    """One document with T answer tokens under K members; figures are nats."""

    source: str
    prompt: str  # the end of what is before the answer
    tokens: tuple[bytes, ...]  # [T] what each token stands for
    nll: F64  # [T] under the mix
    member_nll: F64  # [K, T] under each member alone, as it would be served: at temperature 1
    help: F64  # [K, T]


@dataclass(frozen=True, slots=True)
class Explanation:
    """`best`: index in `members` of the member that is best alone, over the tokens of all documents. `documents`: by gain,
    the largest first."""

    bundle: str
    data: str
    split: Split
    space: Space
    members: tuple[str, ...]  # [K]
    mix: tuple[float, ...]  # [K]
    temperatures: tuple[float, ...]  # [K]
    best: int
    documents: tuple[Explained, ...]

    def gain(self, document: Explained) -> float:
        return float((document.member_nll[self.best] - document.nll).mean())

    def nll(self) -> float:
        """Of the mix, a token of all documents."""
        return float(np.concatenate([document.nll for document in self.documents]).mean())

    def member_nll(self) -> F64:
        """[K] of each member alone."""
        return np.asarray(np.concatenate([document.member_nll for document in self.documents], axis=1).mean(1))


def explain(
    path: Path,
    data: str,
    *,
    ensemble: Ensemble | None = None,
    split: Split = "test",
    documents: int = 24,
    max_length: int | None = None,
    near_duplicates: NearDuplicates = NearDuplicates.DROP,
    config: EngineConfig | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Score the first `documents` examples of a split of `data` with the bundle at `path`, under `ensemble` (None: the bundle's
    own), as it is served.

    Members with the coefficient 0 are left out. Raises `InvalidEnsembleError` (a member that is not in the bundle, a negative
    coefficient, fewer than two members), `DataError` (no examples), `BundleError` (a member was trained on another split),
    `ConfigError`, and what `load_bundle` and `open_backend` raise.
    """
    if documents < 1:
        raise ConfigError(f"documents must be at least 1, got {documents}")
    config, progress = config or EngineConfig(), progress or Progress(False)
    bundle = load_bundle(path, config)
    used = _used(bundle, ensemble or bundle.default_ensemble)
    tokenizer = Tokenizer.from_dir(path)
    dataset = load_dataset(data, near_duplicates)
    check_training_data(bundle, dataset, "that are explained")
    params = TuneParams(max_length=max_length).fitted(bundle.sizes.max_position_embeddings)
    parts, _ = encode_parts(tokenizer, dataset, {split: documents}, params, bundle.eos_token_ids[:1])
    items = parts[split]
    longest = max(len(item.token_ids) for item in items)
    backend = open_backend(bundle, dataclasses.replace(config, max_num_seqs=1, max_model_len=longest))
    found = []
    try:
        for item in items:
            found.append(_explained(bundle, backend, used, item, tokenizer))
            progress.advance("explaining", 1, len(items))
    finally:
        backend.close()
    best = int(np.concatenate([one.member_nll for one in found], axis=1).mean(1).argmin())
    in_mix = ((member.name, member.mix, member.temperature) for member in used.members)
    names, mix, temperatures = zip(*in_mix, strict=True)
    return Explanation(
        bundle=bundle.name,
        data=dataset.name,
        split=split,
        space=used.space,
        members=names,
        mix=mix,
        temperatures=temperatures,
        best=best,
        documents=tuple(sorted(found, key=lambda one: -float((one.member_nll[best] - one.nll).mean()))),
    )


def leave_one_out(ensemble: Ensemble, logits: F64, reference: npt.NDArray[np.int64]) -> tuple[F64, F64, F64]:
    """From logits [K, T, vocab], before temperatures, of K ≥ 2 members with positive coefficients: the negative
    log-likelihoods of the tokens `reference` [T] under the mix [T], under each member alone and without its temperature
    [K, T], and under the mix without it [K, T]."""
    mix, at = np.array([member.mix for member in ensemble.members]), np.arange(len(reference))
    single = -log_softmax(logits)[:, at, reference]
    logits = tempered(ensemble, logits)
    rests = mix.sum() - mix
    if ensemble.space is Space.PROBS:
        terms = np.log(mix)[:, None] + log_softmax(logits)[:, at, reference]
        without = [-np.logaddexp.reduce(np.delete(terms, k, 0), 0) + np.log(rest) for k, rest in enumerate(rests)]
        return -np.logaddexp.reduce(terms, 0), single, np.stack(without)
    total = np.tensordot(mix, logits, 1)
    others = [(total - m * one) / rest for m, one, rest in zip(mix, logits, rests, strict=True)]
    nll, *rest_nll = (-log_softmax(rows)[at, reference] for rows in (total, *others))
    return nll, single, np.stack(rest_nll)


def _used(bundle: Bundle, ensemble: Ensemble) -> Ensemble:
    """The ensemble without members that have no part in it."""
    for member in ensemble.members:
        if member.name not in bundle.members:
            raise InvalidEnsembleError(
                f"'{member.name}' is not a member of '{bundle.name}', which has {list(bundle.members)}",
                field="ensemble.members.name",
            )
        if member.mix < 0:
            raise InvalidEnsembleError(
                f"the mix of member '{member.name}' is {member.mix}; each member is left out in turn, and what is left is a mix "
                "only if no coefficient is negative",
                field="ensemble.members.mix",
            )
    used = tuple(member for member in ensemble.members if member.mix)
    if len(used) < 2:
        raise InvalidEnsembleError(
            f"the mix is of '{used[0].name}' alone, and there is nothing to explain; give --mix with two members or more",
            field="ensemble.members",
        )
    return Ensemble(used, ensemble.space)


def _explained(bundle: Bundle, backend: Backend, used: Ensemble, item: Encoded, tokenizer: Tokenizer) -> Explained:
    parts = [leave_one_out(used, *piece) for piece in answer_logits(backend, member_order(bundle, used), item)]
    nll, single, without = (np.concatenate(figures, axis=-1) for figures in zip(*parts, strict=True))
    ids: Sequence[int] = item.token_ids
    return Explained(
        source=item.source,
        prompt=tokenizer.decode(ids[: item.targets[0]], skip_special_tokens=False)[-_PROMPT:],
        tokens=tuple(tokenizer.token_bytes(ids[place]) for place in item.targets),
        nll=nll,
        member_nll=single,
        help=without - nll,
    )
