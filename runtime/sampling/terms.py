"""`plan_head`: which rows a backend's head computes for the samples of a batch, and which of them make each sample's mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..api.request import Space
from ..schedule.batch import SampleRow

Terms = Sequence[
    tuple[int, float]
]  # (index, coefficient): of a hidden state for a head row, of a head row for a sample


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """Head rows, and the samples that draw from them."""

    rows: list[Terms]  # [head rows] (hidden state, coefficient) of what goes into the head
    mixes: list[Terms]  # [samples] (head row, coefficient)
    greedy: list[bool]  # [head rows] of the row's logits, only the largest is used


def plan_head(hidden: Sequence[Terms], samples: Sequence[SampleRow], linear_head: bool) -> HeadPlan:
    """`hidden[i]` are the (hidden state, coefficient) terms of `samples[i]`, none with coefficient 0.

    Where a head is linear, mixing hidden states is mixing logits: in `logits` space a sample has one row. Otherwise, and
    where its members' log-probabilities are asked for, every term has a row of its own and their logits are mixed.
    """
    plan = HeadPlan([], [], [])
    for terms, sample in zip(hidden, samples, strict=True):
        first = len(plan.rows)
        if is_mixed_before_head(terms, sample, linear_head):
            plan.mixes.append([(first, 1.0)])
            plan.rows.append(terms)
            plan.greedy.append(_needs_largest_only(sample))
        else:
            plan.mixes.append([(first + i, c) for i, (_, c) in enumerate(terms)])
            plan.rows.extend([(state, 1.0)] for state, _ in terms)
            plan.greedy.extend([False] * len(terms))
    return plan


def is_mixed_before_head(terms: Terms, sample: SampleRow, linear_head: bool) -> bool:
    """The sample needs the logits of one head row only."""
    if sample.sampling.member_logprobs:
        return False
    return is_single(terms) or (linear_head and sample.space is Space.LOGITS)


def is_single(terms: Terms) -> bool:
    """One member as it is: in every space, and under every head, the mix is that member bit for bit."""
    return len(terms) == 1 and terms[0][1] == 1


def _needs_largest_only(sample: SampleRow) -> bool:
    return sample.sampling.temperature == 0 and sample.sampling.logprobs is None and sample.edits.is_empty
