"""`Calibration`: how sure an answer is, from the probabilities of its tokens and from how far the members disagree.

disagreement   of a token: log Σ aᵢ pᵢ − Σ aᵢ log pᵢ ≥ 0, in nats, where pᵢ is the token's probability under member i alone and
               aᵢ = |wᵢ| / Σ |w|; 0 if all members agree, and for one member (Jensen's inequality)
confidence     of a token: the probability that it is the right one, σ(a + b · logit p + c · disagreement), where p is its
               probability under the mix; of an answer: the mean over its tokens

The three coefficients are fitted on examples that no member was trained on (`motet calibrate`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LEAST = 1e-9  # probabilities are kept away from 0 and 1 by this


@dataclass(frozen=True, slots=True)
class Calibration:
    """σ(intercept + probability · logit p + disagreement · d)."""

    intercept: float
    probability: float
    disagreement: float

    def confidence(self, logprob: float, disagreement: float) -> float:
        """The confidence of a token with this log-probability under the mix."""
        score = self.intercept + self.probability * logit(logprob) + self.disagreement * disagreement
        return 1 / (1 + math.exp(-min(max(score, -700.0), 700.0)))


def logit(logprob: float) -> float:
    """log(p / (1 − p)) of a log-probability."""
    p = min(max(math.exp(min(logprob, 0.0)), _LEAST), 1 - _LEAST)
    return math.log(p / (1 - p))


def disagreement(logprobs: Sequence[float], mix: Sequence[float]) -> float:
    """Of one token: its log-probability under each member, and the members' coefficients."""
    total = math.fsum(map(abs, mix))
    shares = [abs(m) / total for m in mix]
    top = max(logprobs)
    if top == -math.inf:
        return 0.0
    mean = math.fsum(a * math.exp(x - top) for a, x in zip(shares, logprobs, strict=True))
    floor = math.log(_LEAST)  # a member that gives the token no probability disagrees by a finite amount
    return max(0.0, top + math.log(mean) - math.fsum(a * max(x, floor) for a, x in zip(shares, logprobs, strict=True)))
