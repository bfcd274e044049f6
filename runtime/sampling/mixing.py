"""Which rows a backend's head computes for the samples of a batch, and how their logits make each sample's mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..api.request import Space
from ..model.bundle import Bundle
from ..schedule.batch import SampleRow

F32 = npt.NDArray[np.float32]

Terms = list[list[tuple[int, float]]]


def head_group(bundle: Bundle) -> int | None:
    """Columns of a group by which the bundle's head rounds its input to 8 bits; None if it does not."""
    return bundle.quantisation["head_group_size"] if bundle.quantisation["head_bits"] < 32 else None


def head_rows(
    samples: Sequence[SampleRow], hidden: Mapping[tuple[int, int], F32], group: int | None
) -> tuple[F32, Terms, list[tuple[int, int]]]:
    """(rows [R, hidden] for the head, (row, coefficient) terms of each sample, (row, row whose logits are added to it)).

    `hidden` holds the final hidden state of each (batch row, member) that is mixed. In `logits` space a sample is one row:
    a single member with coefficient 1 is its own hidden state, bit for bit; a mix is Σ coefficient · hidden state in the
    order of the terms (see `_linear_rows` for what a quantised head needs). In `probs` space every member has its own row.
    """
    rows: list[F32] = []
    row_terms: Terms = []
    fine_rows: list[tuple[int, int]] = []
    for sample in samples:
        terms = [(hidden[row, member], c) for row, member, c in sample.terms if c != 0]
        if sample.space is Space.LOGITS and not sample.return_member_logprobs and len(terms) > 1:
            row_terms.append([(len(rows), 1.0)])
            mixed = _linear_rows(terms, group)
            fine_rows += [(len(rows), len(rows) + i) for i in range(1, len(mixed))]
            rows += mixed
        else:
            row_terms.append([(len(rows) + i, c) for i, (_, c) in enumerate(terms)])
            rows += [row for row, _ in terms]
    size = len(rows[0]) if rows else 0
    return np.array(rows, np.float32).reshape(len(rows), size), row_terms, fine_rows


def _linear_rows(terms: list[tuple[F32, float]], group: int | None) -> list[F32]:
    """Head rows whose logits add up to Σ coefficient · logits of the member.

    A head with 8-bit activations rounds its input, so it is not linear: rounding the mix instead of the members
    would choose other tokens at near ties. So the members are rounded as the head would round them, then mixed, and
    the mix goes in as its own rounding and the rest: exact to the square of the 8-bit step.
    """
    if group is None:
        return [_weighted_sum(terms)]
    mixed = _weighted_sum([(_round_groups(row, group), c) for row, c in terms])
    coarse = _round_groups(mixed, group)
    return [coarse, mixed - coarse]


def _round_groups(row: F32, group_size: int) -> F32:
    """[hidden] rounded to 8 bits with a scale a group, as `MatMulNBits` rounds its activations."""
    groups = row.reshape(-1, group_size)
    steps = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / np.float32(127), np.float32(1e-30))
    return np.asarray((np.rint(groups / steps) * steps).reshape(-1), dtype=np.float32)


def _weighted_sum(terms: list[tuple[F32, float]]) -> F32:
    total = np.zeros_like(terms[0][0])
    for row, coefficient in terms:
        total += np.float32(coefficient) * row
    return total
