"""Mixing hidden states on the host before the head, for backends whose head is a separate graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..model.bundle import Bundle
from .terms import Terms, is_single

F32 = npt.NDArray[np.float32]


def head_group(bundle: Bundle) -> int | None:
    """Columns per group in which the bundle's head rounds its input to 8 bits; None if it does not round."""
    return bundle.quantisation["head_group_size"] if bundle.quantisation["head_bits"] < 32 else None


def mixed_rows(rows: Sequence[Terms], hidden: Sequence[F32], group: int | None) -> tuple[F32, list[tuple[int, int]]]:
    """Returns the head's input rows [R, hidden], and pairs (row, extra row whose logits must be added to it).

    The first rows are those of `rows`, each given by its (hidden state, coefficient) terms; the extra rows, which a
    quantised head needs (see `_linear_rows`), follow. A single state with coefficient 1 is unchanged, bit for bit; a
    mix is Σ coefficient · state in the order of the terms. `group`: see `head_group`.
    """
    found: list[F32] = []
    fine: list[tuple[int, F32]] = []
    for terms in rows:
        if is_single(terms):
            found.append(hidden[terms[0][0]])
            continue
        mixed, *rest = _linear_rows([(hidden[state], c) for state, c in terms], group)
        fine += [(len(found), row) for row in rest]
        found.append(mixed)
    added = [(row, len(found) + i) for i, (row, _) in enumerate(fine)]
    found += [row for _, row in fine]
    size = len(found[0]) if found else 0
    return np.array(found, np.float32).reshape(len(found), size), added


def _linear_rows(terms: list[tuple[F32, float]], group: int | None) -> list[F32]:
    """Head rows whose logits add up to Σ coefficient · logits of the member.

    A head with 8-bit activations rounds its input, so it is not linear: rounding the mix instead of the members would
    choose other tokens at near ties. So each member is rounded as the head would round it, then they are mixed. The
    mix goes into the head as two rows, its own rounding and the remainder: exact to the square of the 8-bit step.
    """
    if group is None:
        return [_weighted_sum(terms)]
    mixed = _weighted_sum([(_round_groups(row, group), c) for row, c in terms])
    coarse = _round_groups(mixed, group)
    return [coarse, mixed - coarse]


def _round_groups(row: F32, group_size: int) -> F32:
    """[hidden] rounded to 8 bits with one scale per group, as `MatMulNBits` rounds its activations."""
    groups = row.reshape(-1, group_size)
    steps = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / np.float32(127), np.float32(1e-30))
    return np.asarray((np.rint(groups / steps) * steps).reshape(-1), dtype=np.float32)


def _weighted_sum(terms: list[tuple[F32, float]]) -> F32:
    total = np.zeros_like(terms[0][0])
    for row, coefficient in terms:
        total += np.float32(coefficient) * row
    return total
