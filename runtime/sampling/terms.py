"""`plan_head`: which rows a backend's head computes for the samples of a batch, and how each sample mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..api.request import Space
from ..schedule.batch import SampleRow

Terms = Sequence[
    tuple[int, float]
]  # (index, coefficient). The index of a hidden state in a head row's terms, of a head row in a sample's


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """Head rows, and the samples that draw from them."""

    rows: list[Terms]  # [head rows] (hidden state, coefficient) terms of its input
    mixes: list[Terms]  # [samples] (head row, coefficient) terms of its mixed logits
    greedy: list[bool]  # [head rows] only the largest logit of the row is used


def needed_terms(sample: SampleRow) -> list[tuple[int, int, float]]:
    """The terms of a sample whose logits it needs: those that take part in the mix, and all if each member's own
    log-probability is requested."""
    return [term for term in sample.terms if term[2] != 0 or sample.sampling.member_logprobs]


def plan_head(hidden: Sequence[Terms], samples: Sequence[SampleRow], linear_head: bool) -> HeadPlan:
    """`hidden[i]` are the (hidden state, coefficient) terms of `samples[i]`, those of `needed_terms`.

    With a linear head, mixing hidden states is mixing logits: a sample in `logits` space needs one row. Otherwise,
    and if the members' log-probabilities are requested, every term has a row of its own and their logits are mixed.
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
    """Whether the sample needs the logits of only one head row."""
    if sample.sampling.member_logprobs:
        return False
    return is_single(terms) or (linear_head and sample.space is Space.LOGITS)


def is_single(terms: Terms) -> bool:
    """Whether the mix is one member with coefficient 1: then it equals that member bit for bit, in any space, with
    any head."""
    return len(terms) == 1 and terms[0][1] == 1


def _needs_largest_only(sample: SampleRow) -> bool:
    return sample.sampling.temperature == 0 and sample.sampling.logprobs is None and sample.edits.is_empty
