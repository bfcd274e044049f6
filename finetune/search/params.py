"""`SearchParams`, `SearchSpace`, `FuseParams` and `DistilParams`: the settings of a search, a fusion and a student."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ...runtime.api.config import described
from ...runtime.api.request import Space
from ...runtime.errors import ConfigError
from ...runtime.model.members import MemberKind
from ..params import MAX_LENGTH_HELP, TuneParams


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What a search varies: ranges (lowest, highest), and choices from `layers` on. A single choice is fixed."""

    learning_rate: tuple[float, float] = (1e-4, 5e-3)
    weight_decay: tuple[float, float] = (1e-3, 0.3)
    l1: tuple[float, float] = (1e-9, 1e-6)
    dropout: tuple[float, float] = (0.0, 0.3)
    label_smoothing: tuple[float, float] = (0.0, 0.15)
    layers: tuple[int, ...] = described(
        (), "How many of the last layers to train: choices; default: 1,2,4 for tails, 10 for adapters."
    )
    rank: tuple[int, ...] = described((4, 8, 16), "Ranks of adapters: choices.")
    batch_tokens: tuple[int, ...] = (512, 1024, 2048)
    schedule: tuple[str, ...] = ("cosine", "linear", "constant")
    augmentation: tuple[str, ...] = described(("none",), "Choices; each but none costs one more pass of the trunk.")

    def layers_of(self, method: str, num_layers: int) -> tuple[int, ...]:
        """The choices of layers for a model with `num_layers`; those that are more are left out. Raises `ConfigError` if
        none is left."""
        default = (1, 2, 4) if MemberKind.of_method(method).own_layers else (min(10, num_layers),)
        found = tuple(n for n in self.layers or default if n <= num_layers)
        if not found:
            raise ConfigError(f"layers {self.layers} are more than the model's {num_layers}")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) for name, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True, slots=True)
class SearchParams:
    """How to search. `base`: what all trials have in common (method, examples, epochs, bag …)."""

    base: TuneParams = field(default_factory=lambda: TuneParams(bag=0.8, evaluations=3))
    space: SearchSpace = field(default_factory=SearchSpace)
    trials: int = described(16, "How many trials to run.")
    seed: int = described(0, "Seed of the search; each trial has its own, made from it.")
    sampler: Literal["gp", "random"] = described("gp", "gp: Bayesian, with a Gaussian process.")
    startup: int = 5  # random trials before the Gaussian process suggests
    objective: Literal["trial", "ensemble"] = described(
        "trial", "What is minimised: each trial's loss, or that of the ensemble that it would complete."
    )
    members: int = described(4, "Members of that ensemble, at most.")
    cost: float = described(0.0, "Nats per token that each further trained layer must gain.")
    prune: bool | None = described(
        None,
        "Stop trials early that are worse than most others at the same point; default: with the objective trial. A trial that "
        "is stopped is no member.",
    )

    @property
    def prunes(self) -> bool:
        return self.objective == "trial" if self.prune is None else self.prune

    def __post_init__(self) -> None:
        self.base.check_makes_member()
        if self.objective not in ("trial", "ensemble"):
            raise ConfigError(f"objective must be trial or ensemble, got '{self.objective}'")
        if self.members < 1 or (self.members != 4 and self.objective == "trial"):
            raise ConfigError(
                f"members is the size of the objective ensemble's mix, at least 1, got {self.members} with objective "
                f"'{self.objective}'"
            )
        if not 0 <= self.cost < float("inf"):
            raise ConfigError(f"cost must be a number of at least 0, got {self.cost}")
        if self.cost and len(self.space.layers) == 1:
            raise ConfigError(f"cost is a price of layers, and these do not vary: {self.space.layers}; leave it out")
        if self.trials < 1:
            raise ConfigError(f"trials must be at least 1, got {self.trials}")
        if self.sampler not in ("gp", "random"):
            raise ConfigError(f"sampler must be gp or random, got '{self.sampler}'")
        if self.base.layers is not None:
            raise ConfigError(
                f"a search takes its choices of layers from its space, got layers {self.base.layers} in base"
            )
        if self.base.kind.own_layers and self.space.rank != SearchSpace().rank:
            raise ConfigError(
                f"rank is a choice for adapters, and method '{self.base.method}' makes none; leave it out"
            )
        if self.base.epsilon is not None and self.base.augmentation != "none":
            raise ConfigError("a private search cannot use augmentation; set augmentation to none")


@dataclass(frozen=True, slots=True)
class FuseParams:
    """How to choose and measure an ensemble. `max_length`: as in `TuneParams`."""

    space: Space = field(default=Space.LOGITS, metadata={"help": "Where members are mixed."})
    max_members: int = described(4, "Members of the ensemble, at most.")
    validation_examples: int = described(64, "Examples that members and mix are fitted on, at most.")
    test_examples: int = described(128, "Examples for the final figure, at most; they decide nothing.")
    max_length: int | None = described(None, MAX_LENGTH_HELP)
    temperatures: bool = described(
        False, "Fit temperatures with the mix: one per member in space probs, one for all in space logits."
    )
    folds: int = 4  # of the nested cross-validation
    with_base: bool = True  # the untuned base is a candidate too

    def __post_init__(self) -> None:
        if self.max_members < 1 or self.folds < 2:
            raise ConfigError(
                f"max_members must be at least 1 and folds at least 2, got {self.max_members} and {self.folds}"
            )


@dataclass(frozen=True, slots=True)
class DistilParams:
    """How to distil. Raises `ConfigError` at construction if a value is not possible."""

    base: TuneParams = field(default_factory=TuneParams)
    share: float = described(0.9, "Share of the loss that is the divergence from the ensemble; the rest is the data's.")
    test_examples: int = described(128, "Examples for the final figures, at most; they decide nothing.")

    def __post_init__(self) -> None:
        self.base.check_makes_member()
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be above 0 and at most 1, got {self.share}")
        if self.test_examples < 1:
            raise ConfigError(f"test_examples must be at least 1, got {self.test_examples}")
        if self.base.epsilon is not None or self.base.augmentation != "none" or self.base.head:
            raise ConfigError(
                "a student cannot be private (epsilon), learn from augmented examples, or have a head of its own; "
                "leave these out"
            )
        if self.base.loss != "answer":
            raise ConfigError("a student learns from the last answer of an example; set loss to answer")
