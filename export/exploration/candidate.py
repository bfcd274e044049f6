"""`Candidate`: a bundle that a search has made and measured, and which of them are worth keeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..quantisation.method import Method, Target

GOOD_KL = 0.01  # nats a token; what is permitted if the user sets no limit


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was measured of a bundle, as it is served. Of several members, KL, NLL and top-1 are means. `num_bytes`: of weights
    and graphs. `layer_kl`: the KL that each layer's rounding is expected to cost, head and embedding at the end. `recall`,
    `rouge_l`: see `Answers`. Speeds are tokens per second of one sequence, `seconds` the time that export and measuring took."""

    name: str
    method: Method
    target_bits: float
    bits: float
    num_bytes: int
    kl: float
    reverse_kl: float
    nll_change: float
    top1: float
    recall: float
    rouge_l: float | None
    decode: float
    prefill: float
    layer_kl: Sequence[float]
    seconds: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Candidate:
        return cls(**{**values, "method": Method(values["method"])})


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats in bytes and KL both, the smallest first."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda c: (c.num_bytes, c.kl, c.name)):
        if not kept or one.kl < kept[-1].kl:
            kept.append(one)
    return kept


def choose(candidates: Sequence[Candidate], target: Target | None) -> tuple[Candidate, str]:
    """The one to use, and why. Of those within the target, by what was measured: the smallest for a target of KL, else the one
    with the least KL. If none is within it, the nearest."""
    limit = target or Target(kl=GOOD_KL)
    if limit.kl is not None:
        most, what, why = limit.kl, f"a KL of at most {limit.kl:g} nats a token", "the smallest with"
        ranked = [(one.kl, float(one.num_bytes), one) for one in candidates]
    else:
        why = "the least KL of those with"
        if limit.megabytes is not None:
            most, what = limit.megabytes, f"at most {limit.megabytes:g} MB"
            ranked = [(one.num_bytes / 1e6, one.kl, one) for one in candidates]
        else:
            assert limit.bits is not None
            most, what = limit.bits, f"at most {limit.bits:g} bits a weight"
            ranked = [(one.bits, one.kl, one) for one in candidates]
    within = [(rank, one.name, one) for value, rank, one in ranked if value <= most]
    if within:
        return min(within)[2], f"{why} {what}"
    nearest = min((value, rank, one.name, one) for value, rank, one in ranked)[3]
    return nearest, f"none of {len(candidates)} has {what}; this one is nearest"
