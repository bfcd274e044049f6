"""What the members of a bundle say at the answer tokens of examples, and the distribution of their mix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ...runtime.api.request import Ensemble, Space
from ...runtime.backends.base import F32, Backend
from ...runtime.errors import BundleError, DataError
from ...runtime.model.bundle import Bundle
from ..data.dataset import Dataset
from ..data.encode import Encoded

F64 = npt.NDArray[np.float64]
_ROWS = 64  # tokens of all members at once: at most 64 × members × vocabulary numbers in double precision


def check_training_data(bundle: Bundle, dataset: Dataset, what: str) -> None:
    """Raises `BundleError` if a member was trained on another version or split of the data set, so that its training examples
    may be among those on which something is measured or fitted; `what`: which examples those are. Raises `DataError` for a data
    set with images or sounds: a bundle's logits are read for texts alone here."""
    if any(example.media for part in dataset.splits.values() for example in part):
        raise DataError(
            f"'{dataset.spec}' holds images or sounds, and only texts can be among those {what}; give other data"
        )
    for member in bundle.manifest["members"]:
        data = member["provenance"].get("data", {})
        if data.get("name") == dataset.name and data.get("digest") != dataset.digest:
            raise BundleError(
                f"the member '{member['name']}' was trained on another version or split of '{dataset.name}', so its training "
                f"examples may be among those {what}; use the same file and near_duplicates"
            )


def member_order(bundle: Bundle, ensemble: Ensemble) -> list[int]:
    """Index in the bundle of each member of the ensemble."""
    return [bundle.members.index(member.name) for member in ensemble.members]


def answer_logits(
    backend: Backend, members: Sequence[int], item: Encoded
) -> Iterator[tuple[F64, npt.NDArray[np.int64]]]:
    """Pieces of T answer tokens: logits [K, T, vocab] of the members, of these indices, and the tokens' ids [T]."""
    positions = np.array(item.targets) - 1
    found: list[F32] = [backend.score(item.token_ids[:-1], member)[positions] for member in members]
    ids = np.array(item.token_ids, np.int64)[positions + 1]
    for first in range(0, len(ids), _ROWS):
        rows = slice(first, first + _ROWS)
        yield np.stack([logits[rows].astype(np.float64) for logits in found]), ids[rows]


def tempered(ensemble: Ensemble, logits: F64) -> F64:
    """Logits [K, T, vocab] of the members, divided by their temperatures: as they are mixed."""
    return np.asarray(logits / np.array([member.temperature for member in ensemble.members])[:, None, None])


def mixed_log_softmax(ensemble: Ensemble, logits: F64) -> F64:
    """[T, vocab] log-probabilities of the mix of the members' tempered logits [K, T, vocab]."""
    mix = [member.mix for member in ensemble.members]
    if ensemble.space is Space.LOGITS:
        return log_softmax(np.tensordot(mix, logits, 1))
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp.reduce(log_softmax(logits) + np.log(mix)[:, None, None], 0))


def log_softmax(logits: F64) -> F64:
    """Over the last axis."""
    raised = logits - logits.max(-1, keepdims=True)
    return np.asarray(raised - np.log(np.exp(raised).sum(-1, keepdims=True)))
