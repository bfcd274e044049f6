"""`Candidate`: a bundle that a search has made and measured, and which of them are worth keeping."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...runtime.errors import ConfigError
from ..quantisation.method import Method, Target

GOOD_KL = 0.01  # nats a token; what is aimed at if the user sets no limit
NAME = re.compile(r"\d{3,}-[a-z]+-\d+\.\d\d")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was measured of a bundle, as it is served. Of several members, KL, NLL and top-1 are means. `num_bytes`: of weights.
    `layer_kl`: the KL that each layer's rounding is expected to cost, head and embedding at the end. `recall`, `rouge_l`: see
    `Answers`. Speeds are tokens per second of one sequence, `seconds` the time that export and measuring took."""

    name: str
    method: Method
    target_bits: float
    bits: float
    num_bytes: int
    kl: float
    reverse_kl: float
    nll_change: float
    top1: float
    recall: float | None
    rouge_l: float | None
    decode: float
    prefill: float
    layer_kl: Sequence[float]
    seconds: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Candidate:
        """Raises `ValueError`, `TypeError` or `KeyError` for what no search has written."""
        found = cls(**{**values, "method": Method(values["method"])})
        numbers = [getattr(found, one.name) for one in fields(cls) if one.name not in ("name", "method", "layer_kl")]
        if not all(one is None or math.isfinite(one) for one in [*numbers, *found.layer_kl]):
            raise ValueError("a figure is no number")
        if None in (found.target_bits, found.bits, found.num_bytes, found.kl, found.seconds):
            raise ValueError("a figure is missing")
        if not NAME.fullmatch(found.name):
            raise ValueError(f"the name {found.name!r}")
        return found


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats in bytes and KL both, the smallest first."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda c: (c.num_bytes, c.kl, c.name)):
        if not kept or one.kl < kept[-1].kl:
            kept.append(one)
    return kept


def choose(candidates: Sequence[Candidate], target: Target | None) -> tuple[Candidate, str]:
    """The one to use, and why. Of those within the target, by what was measured: the smallest for a target of KL, else the one
    with the least KL. Without a target, the smallest with a KL of at most `GOOD_KL`, or that with the least. Raises `ConfigError`
    if none is within the target."""
    limit = target or Target(kl=GOOD_KL)
    if limit.kl is not None:
        most, what, why = limit.kl, f"a KL of at most {limit.kl:g} nats a token", "the smallest with"
        ranked = [(one.kl, float(one.num_bytes), one) for one in candidates]
    else:
        why = "the least KL of those with"
        if limit.megabytes is not None:
            most, what = limit.megabytes, f"at most {limit.megabytes:g} MB of weights"
            ranked = [(one.num_bytes / 1e6, one.kl, one) for one in candidates]
        else:
            assert limit.bits is not None
            most, what = limit.bits, f"at most {limit.bits:g} bits a weight"
            ranked = [(one.bits, one.kl, one) for one in candidates]
    within = [(rank, one.name, one) for value, rank, one in ranked if value <= most]
    if within:
        return min(within)[2], f"{why} {what}"
    value, _, _, nearest = min((value, rank, one.name, one) for value, rank, one in ranked)
    if target is None:
        return nearest, f"none of {len(candidates)} has {what}; this one is nearest"
    raise ConfigError(
        f"none of the {len(candidates)} bundles worth keeping has {what}; '{nearest.name}' is nearest, with {value:.4g}: search "
        "longer, or raise the limit"
    )
