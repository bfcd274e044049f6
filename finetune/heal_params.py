"""`HealParams`: how a pruned model is healed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..runtime.api.config import described
from ..runtime.errors import ConfigError
from .params import TuneParams


@dataclass(frozen=True, slots=True)
class HealParams:
    """Raises `ConfigError` at construction if a value is not possible."""

    base: TuneParams = field(default_factory=TuneParams)
    share: float = described(0.9, "Share of the loss that is the divergence from the teacher; the rest is the data's.")
    hidden: float = described(
        0.0,
        "Factor, in the loss, of the squared distance to the teacher's last hidden states, as a part of their length.",
    )
    norms: bool = described(False, "Train the norms of all layers too. It runs all layers, so no trunk is cached.")
    every_token: bool = described(True, "Learn at every token of an example, not only at the answer's.")
    test_examples: int = described(128, "Examples for the final figures, at most; they decide nothing.")

    def __post_init__(self) -> None:
        self.base.check_makes_member()
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be above 0 and at most 1, got {self.share}")
        if not (math.isfinite(self.hidden) and self.hidden >= 0):
            raise ConfigError(f"hidden must be a number of at least 0, got {self.hidden}")
        if self.test_examples < 1:
            raise ConfigError(f"test_examples must be at least 1, got {self.test_examples}")
        base = self.base
        if base.epsilon is not None or base.augmentation != "none" or base.head or base.accumulate != 1:
            raise ConfigError(
                "healing cannot be private (epsilon), use augmented examples or accumulated batches, or train a head; leave "
                "these out"
            )
        if base.method == "qlora":
            raise ConfigError(
                "healing measures the model that it writes, and qlora trains over weights that are not those; use lora"
            )
        if self.norms and base.method == "full":
            raise ConfigError("norms are trained with method tail or lora; full trains them anyway")
