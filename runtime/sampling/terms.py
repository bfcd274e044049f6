"""`plan_head`: which rows a backend's head computes for the samples of a batch, and how each sample mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..api.request import Space
from ..schedule.batch import SampleRow

F32 = npt.NDArray[np.float32]
Terms = Sequence[
    tuple[int, float]
]  # (index, coefficient). The index of a hidden state in a head row's terms, of a head row in a sample's


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """Head rows, and the samples that draw from them."""

    rows: list[Terms]  # [head rows] (hidden state, coefficient) terms of its input
    temperatures: list[float]  # [head rows] by which the row's logits are divided
    mixes: list[Terms]  # [samples] (head row, coefficient) terms of its mixed logits
    greedy: list[bool]  # [head rows] only the largest logit of the row is used


def needed_terms(sample: SampleRow) -> list[tuple[int, int, float]]:
    """The terms of a sample whose logits it needs: those that take part in the mix, and all if each member's own
    log-probability is requested."""
    return [term for term in sample.terms if _is_needed(term, sample)]


def needed_temperatures(terms: Terms, sample: SampleRow) -> list[float]:
    """The temperatures of the sample's terms, those of `needed_terms`."""
    if not sample.temperatures:
        return [1.0] * len(terms)
    return [t for term, t in zip(sample.terms, sample.temperatures, strict=True) if _is_needed(term, sample)]


def _is_needed(term: tuple[int, int, float], sample: SampleRow) -> bool:
    return term[2] != 0 or sample.sampling.member_logprobs


def plan_head(hidden: Sequence[Terms], samples: Sequence[SampleRow], linear_head: bool) -> HeadPlan:
    """`hidden[i]` are the (hidden state, coefficient) terms of `samples[i]`, those of `needed_terms`.

    With a linear head, mixing hidden states is mixing logits: a sample in `logits` space needs one row, in which each term's
    coefficient is divided by its temperature. Otherwise, and if the members' log-probabilities are requested, every term has a
    row of its own, whose logits are divided by its temperature, and these are mixed.
    """
    plan = HeadPlan([], [], [], [])
    for terms, sample in zip(hidden, samples, strict=True):
        first, temperatures = len(plan.rows), needed_temperatures(terms, sample)
        if is_mixed_before_head(terms, sample, linear_head):
            row, temperature = mixed_before_head(terms, temperatures)
            plan.mixes.append([(first, 1.0)])
            plan.rows.append(row)
            plan.temperatures.append(temperature)
            plan.greedy.append(_needs_largest_only(sample))
        else:
            plan.mixes.append([(first + i, c) for i, (_, c) in enumerate(terms)])
            plan.rows.extend([(state, 1.0)] for state, _ in terms)
            plan.temperatures.extend(temperatures)
            plan.greedy.extend([False] * len(terms))
    return plan


def mixed_before_head(terms: Terms, temperatures: Sequence[float]) -> tuple[Terms, float]:
    """The terms of the one head row of a sample that is mixed before the head, and the temperature of its logits: a member
    alone keeps its hidden state, so that it has its own logits, divided."""
    if len(terms) == 1:
        return terms, temperatures[0]
    return [(state, c / t) for (state, c), t in zip(terms, temperatures, strict=True)], 1.0


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


def divide_rows(logits: F32, temperatures: Sequence[float]) -> None:
    """Divide each row of logits [rows, vocab] by its temperature, in place; there may be more rows than temperatures."""
    for row, temperature in zip(logits, temperatures):
        if temperature != 1:
            row /= np.float32(temperature)


def is_tempered(terms: Terms, sample: SampleRow) -> bool:
    """Whether one of the sample's terms has a temperature other than 1."""
    return any(temperature != 1 for temperature in needed_temperatures(terms, sample))
