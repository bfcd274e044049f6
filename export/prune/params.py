"""`PruneParams`: what is removed from a model."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.api.config import described
from ...runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PruneParams:
    """What to remove. Raises `ConfigError` at construction for a combination that is not possible; the model's sizes are looked
    at by `prune`."""

    layers: int | None = described(None, "Whole layers to remove: those that change their input least.")
    share: float | None = described(
        None, "Remove the fewest layers that have this share of all layers' parameters, instead of --layers."
    )
    greedy: bool = described(False, "Measure the layers again after each one that is removed.")
    heads: int | None = described(
        None, "Heads of keys and values to remove from each layer, with their query heads: those that add least."
    )
    channels: int | None = described(
        None, "Channels to remove from each MLP: those that add least. What is left is a multiple of 64."
    )
    from_tails: bool = described(False, "Layers that tails have of their own may be removed too.")

    def __post_init__(self) -> None:
        if self.layers is not None and self.share is not None:
            raise ConfigError("layers and share both say how many layers to remove; give one of them")
        if self.greedy and self.layers is None and self.share is None:
            raise ConfigError("greedy is a way to choose layers; give --layers or --share too")

    @property
    def chooses_layers(self) -> bool:
        return self.layers is not None or self.share is not None

    @property
    def measures(self) -> bool:
        """Whether calibration text is needed."""
        return any(value is not None for value in (self.layers, self.share, self.heads, self.channels))
