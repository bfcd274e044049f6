"""The probe: a few tokens whose most probable successors a bundle stores, so that a backend that computes something else is
found before it answers anybody.

What is stored of a position are the model's most probable tokens in fp32, before anything was rounded. A backend is judged by the
KL of these tokens and of all others as one, which is at most the KL of the whole vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BundleError, UnavailableError
from ..model.bundle import Bundle
from ..model.files import read_object
from .base import Backend

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

PROBE = "probe.json"
NUM_TOKENS = 24
_NUM_BEST = 16
_LARGEST = 1 << 24  # bytes of the file: thousands of members
_LEAST = 8  # positions, below which one of them could decide
_TIMES, _MORE = 4.0, 0.02  # what is permitted, by what the exporting machine measured; another model has nats


@dataclass(frozen=True, slots=True)
class MemberProbe:
    """One member's answers to the tokens. `best` [positions, n]: its most probable tokens in fp32; `logprobs`: theirs, nats.
    `max_kl`: what a backend may differ by, mean over the positions, nats."""

    best: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    max_kl: float

    @classmethod
    def measured(cls, reference: F32, served: F32) -> MemberProbe:
        """From the logits [positions, vocab] in fp32, and as they are served where the bundle is made."""
        count = min(_NUM_BEST, reference.shape[1] - 1)
        best = np.argsort(-reference, 1, kind="stable")[:, :count]
        logprobs = np.take_along_axis(_log_softmax(reference), best, 1)
        rounded = [[round(float(value), 5) for value in row] for row in logprobs]
        found = cls(best.tolist(), rounded, 0.0)
        return cls(found.best, found.logprobs, _TIMES * found.kl(served) + _MORE)

    def kl(self, logits: F32) -> float:
        """Mean KL of what is stored from `logits` [first positions, vocab], nats; infinite for logits that are not numbers."""
        expected = np.asarray(self.logprobs[: len(logits)], np.float64)
        found = np.take_along_axis(_log_softmax(logits), np.asarray(self.best[: len(logits)]), 1)
        expected, found = _with_rest(expected), _with_rest(found)
        total = float((np.exp(expected) * (expected - found)).sum(1).mean())
        return total if np.isfinite(total) else float("inf")


@dataclass(frozen=True, slots=True)
class Probe:
    """`token_ids`, and what each member answers."""

    token_ids: Sequence[int]
    members: Mapping[str, MemberProbe]

    def write(self, path: Path) -> None:
        """Write it to a JSON file."""
        path.write_text(json.dumps(asdict(self)) + "\n")


def read_probe(bundle: Bundle) -> Probe | None:
    """The bundle's probe; None if it was exported without measuring it. Raises `BundleError` for one that is damaged."""
    if PROBE not in bundle.manifest["files"]:
        return None
    path = bundle.path / PROBE
    if path.stat().st_size > _LARGEST:
        raise BundleError(
            f"'{path}' has {path.stat().st_size:,} bytes, at most {_LARGEST:,} are read; export the bundle again"
        )
    values = read_object(path, "export the bundle again")
    try:
        return _checked(values, bundle)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"'{path}' is damaged ({error!r}); export the bundle again") from error


def _checked(values: Mapping[str, Any], bundle: Bundle) -> Probe:
    probe = Probe(values["token_ids"], {name: MemberProbe(**member) for name, member in values["members"].items()})
    if any(type(token_id) is not int for token_id in probe.token_ids):
        raise ValueError("token ids are whole numbers")
    count, vocabulary = len(probe.token_ids), bundle.config.vocab_size
    if not 1 <= count <= min(NUM_TOKENS, bundle.config.max_position_embeddings):
        raise ValueError(f"{count} tokens")
    if set(probe.members) != set(bundle.members):
        raise ValueError(f"members {sorted(probe.members)}")
    tables = [np.asarray([probe.token_ids])]
    for name, member in probe.members.items():
        best, logprobs = np.asarray(member.best), np.asarray(member.logprobs, np.float64)
        if best.ndim != 2 or best.shape != logprobs.shape or len(best) != count or not 1 <= best.shape[1] <= _NUM_BEST:
            raise ValueError(f"shapes {best.shape} and {logprobs.shape} of member {name}")
        limit = member.max_kl
        if not (
            np.isfinite(logprobs).all() and logprobs.max() <= 0 and type(limit) is float and 0 < limit < float("inf")
        ):
            raise ValueError(f"values of member {name}")
        tables.append(best)
    if any(table.dtype != np.int64 or table.min() < 0 or table.max() >= vocabulary for table in tables):
        raise ValueError(f"token ids are whole numbers in 0…{vocabulary - 1}")
    return probe


def check_probe(bundle: Bundle, backend: Backend, num_positions: int) -> None:
    """Ask a backend that serves nobody yet for the probe's answers, of the first `num_positions` tokens; of fewer than eight,
    nothing is asked. Raises `UnavailableError` if they are not what the bundle stores, `BundleError` for a damaged probe."""
    probe = read_probe(bundle)
    if probe is None or num_positions < _LEAST:
        return
    for index, name in enumerate(bundle.members):
        member = probe.members[name]
        found = member.kl(backend.score(probe.token_ids[:num_positions], index))
        if found > member.max_kl:
            raise UnavailableError(
                f"the {backend.name} backend does not compute '{bundle.name}' here: member {name} differs from the model by a "
                f"KL of {found:.3g} nats a token, and at most {member.max_kl:.3g} was expected when it was exported; try another "
                "backend, export it again on this machine, or serve it all the same with probe off (--no-probe)"
            )


def _log_softmax(logits: F32) -> F64:
    with np.errstate(invalid="ignore"):  # of what is no number, `kl` is infinite
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _with_rest(logprobs: F64) -> F64:
    """[rows, n + 1]: what is left of the probability at the end."""
    rest = np.log(np.clip(1 - np.exp(logprobs).sum(1, keepdims=True), 1e-9, 1))
    return np.concatenate([logprobs, rest], 1)
