"""Truncation rules: which tokens of a tempered distribution are kept for the draw. `RULES` is the only list of them.

A rule is a name, the value that means "off", and a function in numpy. `truncate` applies the rules in the order of
`RULES`, each to the tokens that the ones before it kept. An executor that has some of the rules itself lists them;
samples that use another rule are truncated here. A new rule is an entry here and a field of the same name in the
sampling parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Kept = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rule:
    """`keep(tempered, value)`: which tokens are kept, [n], of [n] finite logits / temperature, n ≥ 1. Of equal logits
    all or none are kept, and at least one token is kept."""

    off: float  # the value at which all tokens are kept
    keep: Callable[[F64, float], Kept]


def _top_k(tempered: F64, k: float) -> Kept:
    """Tokens that are not below the k-th largest."""
    place = max(len(tempered) - int(k), 0)
    return np.asarray(tempered >= np.partition(tempered, place)[place])


def _top_p(tempered: F64, p: float) -> Kept:
    """The shortest run of the sorted tokens whose probability reaches p (Holtzman et al. 2020)."""
    ordered = np.sort(tempered)[::-1]
    cumulative = np.cumsum(np.exp(ordered - ordered[0]))
    last = int(np.searchsorted(cumulative, p * cumulative[-1]))
    return np.asarray(tempered >= ordered[min(last, len(ordered) - 1)])


def _min_p(tempered: F64, p: float) -> Kept:
    """Tokens with at least the share p of the largest probability (Nguyen et al. 2024)."""
    return np.asarray(tempered >= tempered.max() + np.log(p))


def _typical_p(tempered: F64, p: float) -> Kept:
    """The tokens whose surprisal is nearest to the entropy, as many as are needed to reach probability p (Meister et
    al. 2022)."""
    shifted = tempered - tempered.max()
    surprisal = np.log(np.exp(shifted).sum()) - shifted
    probabilities = np.exp(-surprisal)
    entropy = np.where(probabilities > 0, probabilities * surprisal, 0.0).sum()  # 0 · infinity is 0 here
    distance = np.abs(surprisal - entropy)
    order = np.argsort(distance, kind="stable")
    last = int(np.searchsorted(np.cumsum(probabilities[order]), p))
    return np.asarray(distance <= distance[order[min(last, len(order) - 1)]])


RULES: Mapping[str, Rule] = {  # in the order of application
    "top_k": Rule(0, _top_k),
    "top_p": Rule(1.0, _top_p),
    "min_p": Rule(0.0, _min_p),
    "typical_p": Rule(1.0, _typical_p),
}


def active_rules(values: Mapping[str, float]) -> dict[str, float]:
    """The values (rule → value) without rules that are off, in the order of application. Raises `KeyError` for an
    unknown rule."""
    unknown = set(values) - set(RULES)
    if unknown:
        raise KeyError(f"no truncation rule is called {sorted(unknown)}; there are {list(RULES)}")
    return {name: values[name] for name, rule in RULES.items() if values.get(name, rule.off) != rule.off}


def truncate(tempered: F64, **values: float) -> Kept:
    """Which tokens [vocab] are kept; a rule that is not named is off. Tokens at -inf are never kept."""
    kept = tempered > -np.inf
    for name, value in active_rules(values).items():
        alive = np.flatnonzero(kept)
        kept[alive[~RULES[name].keep(tempered[alive], value)]] = False
    return np.asarray(kept)
