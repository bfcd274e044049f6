"""Which weights get how many bits: the least error within a number of bytes.

For a price λ of a byte, each weight takes the choice with the least error + λ · bytes, whatever the others take. The smallest λ
whose choices fit leaves less than one step of the frontier unspent; the room that is left is then given to the changes that
save most error for each byte. (Lagrangian relaxation: Shoham and Gersho 1988.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...runtime.errors import ConfigError
from .groups import Scheme


@dataclass(frozen=True, slots=True)
class Choice:
    """A scheme that a weight may have. `error`: what it costs, in nats of KL a token."""

    scheme: Scheme
    num_bytes: int
    error: float

    def __add__(self, other: Choice) -> Choice:
        """The same scheme for both."""
        return Choice(self.scheme, self.num_bytes + other.num_bytes, self.error + other.error)


def allocate(choices: Mapping[str, Sequence[Choice]], max_bytes: int) -> dict[str, Choice]:
    """One choice for each weight, at most `max_bytes` together. Raises `ConfigError` if the smallest ones are more."""
    least = sum(min(choice.num_bytes for choice in own) for own in choices.values())
    if least > max_bytes:
        raise ConfigError(
            f"the smallest that these weights can be is {least:,} bytes, and the target is {max_bytes:,}; raise the target, or "
            "prune the model first"
        )
    low, high = 0.0, 1.0
    while _size(_priced(choices, high)) > max_bytes:
        low, high = high, high * 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _size(_priced(choices, middle)) > max_bytes else (low, middle)
    return _fill(choices, _priced(choices, high), max_bytes)


def cheapest(choices: Mapping[str, Sequence[Choice]], max_error: float) -> dict[str, Choice]:
    """One choice for each weight, with as few bytes as an error of at most `max_error` permits. Raises `ConfigError` if the best
    ones have more."""
    least = sum(min(choice.error for choice in own) for own in choices.values())
    if least > max_error:
        raise ConfigError(
            f"the least KL that these schemes are expected to have is {least:.4g}, and the target is {max_error:.4g}; raise "
            "the target"
        )
    low = sum(min(choice.num_bytes for choice in own) for own in choices.values())
    high = sum(max(choice.num_bytes for choice in own) for own in choices.values())
    while low < high:
        middle = (low + high) // 2
        if _error(allocate(choices, middle)) <= max_error:
            high = middle
        else:
            low = middle + 1
    return allocate(choices, high)


def _priced(choices: Mapping[str, Sequence[Choice]], price: float) -> dict[str, Choice]:
    return {
        name: min(own, key=lambda choice: (choice.error + price * choice.num_bytes, choice.num_bytes))
        for name, own in choices.items()
    }


def _fill(choices: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], max_bytes: int) -> dict[str, Choice]:
    while True:
        room, best, gain = max_bytes - _size(chosen), None, 0.0
        for name, own in choices.items():
            now = chosen[name]
            for choice in own:
                more, less = choice.num_bytes - now.num_bytes, now.error - choice.error
                if more <= room and less > 0 and less / max(more, 1) > gain:
                    best, gain = (name, choice), less / max(more, 1)
        if best is None:
            return chosen
        chosen = {**chosen, best[0]: best[1]}


def _size(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.num_bytes for choice in chosen.values())


def _error(chosen: Mapping[str, Choice]) -> float:
    return sum(choice.error for choice in chosen.values())
