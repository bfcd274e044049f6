"""What a user says of quantisation. It needs no torch, so the command line can import it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ...runtime.errors import ConfigError


class Method(StrEnum):
    """How 4-bit values are chosen: to the nearest of the group's range; with the scales that cost least (`search`); the same
    after scaling the channels (`equalise.sharpening`); or with errors that later columns make up for (`gptq`)."""

    ROUND = "round"
    SEARCH = "search"
    AWQ = "awq"
    GPTQ = "gptq"


@dataclass(frozen=True, slots=True)
class Target:
    """What a bundle may take at most: one of average bits a weight (head and embedding count), megabytes (10⁶ bytes) of
    weights, and KL (nats a token, as expected from the calibration text)."""

    bits: float | None = None
    megabytes: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("bits", "megabytes", "kl") if getattr(self, name) is not None}
        if len(given) != 1:
            raise ConfigError(f"a target is one of bits, megabytes and kl, got {given or 'none'}")
        (value,) = given.values()
        if not 0 < value < float("inf"):
            raise ConfigError(f"a target is a positive number, got {given}")
