"""`calibrate`: fits a bundle's confidences on examples that no member was trained on, and measures them on others.

At each answer token the served ensemble is asked for its most probable token, which is right or wrong. The confidence
is fitted by logistic regression on the token's probability and on the members' disagreement (`api.confidence`). It is
measured by the expected calibration error: examples in bins of equal size by confidence, the mean distance of a bin's
confidence from its share of right tokens. Beside it: the best single member, as it is and with a temperature fitted on the
same examples, because an ensemble's probabilities must be compared with tempered ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from ...runtime.api.confidence import Calibration, disagreement, logit
from ...runtime.api.config import EngineConfig
from ...runtime.api.request import Ensemble
from ...runtime.backends.base import Backend
from ...runtime.backends.open import open_backend
from ...runtime.errors import ConfigError, DataError
from ...runtime.model.bundle import MANIFEST, Bundle
from ...runtime.text.tokenizer import Tokenizer
from ..data.dataset import load_dataset
from ..data.encode import Encoded, encode_parts
from ..data.example import Split
from ..params import NearDuplicates, TuneParams
from ..training.progress import Progress
from .scoring import answer_logits, check_training_data, log_softmax, member_order, mixed_log_softmax, tempered

F64 = npt.NDArray[np.float64]
TEMPERATURES = tuple((2 ** np.linspace(-1, 2, 19)).tolist())  # the seventh is 1
BINS = 15


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a bundle says at T answer tokens: of the most probable token of the mix, and of each member alone."""

    logprobs: F64  # [T] under the mix
    apart: F64  # [T] disagreement on it
    right: F64  # [T] 1 if it is the reference's
    nll: F64  # [K, temperatures, T] of the reference, under each member
    member_logprobs: F64  # [K, temperatures, T] of the member's own most probable token
    member_right: F64  # [K, T] 1 if that is the reference's


def calibrate(
    path: Path,
    data: str,
    *,
    examples: int = 96,
    test_examples: int = 128,
    max_length: int | None = None,
    near_duplicates: NearDuplicates = NearDuplicates.DROP,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit the confidences of the bundle at `path` on the validation split of `data`, write them to its manifest, and
    return what is written: the coefficients and the report.

    Raises `DataError` (no examples), `BundleError` (a member was trained on another split), `ConfigError`, and what
    `Bundle.load` and `open_backend` raise.
    """
    if examples < 1 or test_examples < 1:
        raise ConfigError(f"examples and test_examples must be at least 1, got {examples} and {test_examples}")
    bundle, progress = Bundle.load(path), progress or Progress(False)
    tokenizer = Tokenizer.from_dir(path)
    dataset = load_dataset(data, near_duplicates)
    check_training_data(bundle, dataset, "that confidences would be fitted on")
    params = TuneParams(max_length=max_length).fitted(bundle.sizes.max_position_embeddings)
    counts: dict[Split, int] = {"validation": examples, "test": test_examples}
    parts, _ = encode_parts(tokenizer, dataset, counts, params, bundle.eos_token_ids[:1])
    longest = max(len(item.token_ids) for items in parts.values() for item in items)
    backend = open_backend(bundle, EngineConfig(max_num_seqs=1, max_model_len=longest, threads=threads))
    try:
        found = {part: _score(bundle, backend, items, part, progress) for part, items in parts.items()}
    finally:
        backend.close()
    fitted = fit(found["validation"])
    best = int(found["validation"].nll[:, _plain()].mean(-1).argmin())
    tempered = int(found["validation"].nll[best].mean(-1).argmin())
    written = {
        **asdict(fitted),
        "report": {
            "data": dataset.name,
            "data_digest": dataset.digest,
            "validation_tokens": len(found["validation"].right),
            "test_tokens": len(found["test"].right),
            "accuracy": float(found["test"].right.mean()),
            "best_single": bundle.default_ensemble.members[best].name,
            "temperature": TEMPERATURES[tempered],
            "ece": _errors(found["test"], fitted, best, tempered),
        },
    }
    _write(path, written)
    return written


def fit(tokens: Tokens) -> Calibration:
    """The coefficients that make the right and wrong tokens most probable, with a weak prior towards p itself. Raises
    `DataError` if all are right or all wrong."""
    if tokens.right.min() == tokens.right.max():
        raise DataError("all tokens are right, or all wrong; a confidence cannot be fitted: give more examples")
    inputs = np.stack([np.ones_like(tokens.apart), np.array([logit(x) for x in tokens.logprobs]), tokens.apart])
    prior = np.array([0.0, 1.0, 0.0])
    signs = 2 * tokens.right - 1

    def loss(x: F64) -> tuple[float, F64]:
        margin = signs * (x @ inputs)
        slope = -signs / (1 + np.exp(np.clip(margin, -700, 700)))
        step = x - prior
        return float(np.logaddexp(0, -margin).sum() + step @ step), inputs @ slope + 2 * step

    return Calibration(*map(float, minimize(loss, prior, jac=True, method="BFGS").x))


def calibration_error(confidence: F64, right: F64, bins: int = BINS) -> float:
    """The expected calibration error, in bins of equal size."""
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return float(sum(len(p) * abs(confidence[p].mean() - right[p].mean()) for p in parts) / len(order))


def _errors(test: Tokens, fitted: Calibration, best: int, tempered: int) -> Mapping[str, float]:
    sure = np.array([fitted.confidence(p, d) for p, d in zip(test.logprobs, test.apart)])
    single = np.exp(test.member_logprobs[best])
    return {
        "ensemble": calibration_error(np.exp(test.logprobs), test.right),
        "ensemble_calibrated": calibration_error(sure, test.right),
        "best_single": calibration_error(single[_plain()], test.member_right[best]),
        "best_single_tempered": calibration_error(single[tempered], test.member_right[best]),
    }


def _plain() -> int:
    """Index of the temperature 1."""
    return TEMPERATURES.index(1.0)


def _score(bundle: Bundle, backend: Backend, items: Sequence[Encoded], part: str, progress: Progress) -> Tokens:
    ensemble, rows = bundle.default_ensemble, []
    for item in items:
        pieces = answer_logits(backend, member_order(bundle, ensemble), item)
        rows += [_tokens(ensemble, logits, reference) for logits, reference in pieces]
        progress.advance(f"scoring, {part}", 1, len(items))
    return Tokens(*(np.concatenate([getattr(row, name) for row in rows], axis=-1) for name in Tokens.__slots__))


def _tokens(ensemble: Ensemble, logits: F64, reference: npt.NDArray[np.int64]) -> Tokens:
    """`logits` [K, T, vocab] of the members at the answer tokens, `reference` [T]."""
    mix, at = [member.mix for member in ensemble.members], np.arange(len(reference))
    own = tempered(ensemble, logits)
    plain, mixed = log_softmax(own), mixed_log_softmax(ensemble, own)
    chosen = mixed.argmax(-1)
    nll, best = [], []
    for temperature in TEMPERATURES:
        rows = log_softmax(logits / temperature)
        nll.append(-rows[:, at, reference])
        best.append(rows.max(-1))
    return Tokens(
        logprobs=mixed[at, chosen],
        apart=np.array([disagreement(plain[:, t, c].tolist(), mix) for t, c in enumerate(chosen)]),
        right=(chosen == reference).astype(np.float64),
        nll=np.stack(nll, 1),
        member_logprobs=np.stack(best, 1),
        member_right=(plain.argmax(-1) == reference).astype(np.float64),
    )


def _write(path: Path, calibration: Mapping[str, Any]) -> None:
    manifest = json.loads((path / MANIFEST).read_bytes())
    new = path / f"{MANIFEST}.new"
    new.write_text(json.dumps({**manifest, "calibration": calibration}, indent=1) + "\n")
    os.replace(new, path / MANIFEST)
