"""`TuneParams`: everything that a run depends on besides the model and the data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from ..runtime.errors import ConfigError
from ..runtime.model.members import MemberKind

METHODS = tuple(method for kind in MemberKind for method in kind.methods)
SCHEDULES = ("cosine", "linear", "constant")
AUGMENTATIONS = ("none", "token-dropout", "span-mask", "paraphrase")
PRECISIONS = ("fp32", "bf16")

_COUNTS = (
    "rank", "examples", "validation_examples", "epochs", "batch_tokens", "accumulate", "max_length", "evaluations",
)  # fmt: skip
_SHARES = ("warmup", "label_smoothing", "dropout")
_NOT_NEGATIVE = ("weight_decay", "l1", "clip", "patience")
_CHOICES = {"method": METHODS, "schedule": SCHEDULES, "augmentation": AUGMENTATIONS, "precision": PRECISIONS}


@dataclass(frozen=True, slots=True)
class TuneParams:
    """Hyper-parameters. Lengths and batches are in tokens; `Raises ConfigError` at construction for what cannot be.

    `layers`: how many of the last ones are trained (tail: 2 by default) or adapted (others: all by default).
    """

    method: str = "tail"  # one of METHODS
    layers: int | None = None
    head: bool = False  # train the head too: the result can be exported alone only, an ensemble shares one head
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    examples: int = 400
    validation_examples: int = 64
    epochs: int = 2
    learning_rate: float = 3e-4
    weight_decay: float = 0.01  # decoupled (AdamW): L2
    l1: float = 0.0  # times the summed absolute change of the trained weights
    label_smoothing: float = 0.0
    dropout: float = 0.0  # of the branches of the trained layers; of an adapter's input
    warmup: float = 0.1  # share of the steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    batch_tokens: int = 1024
    accumulate: int = 1  # batches an optimiser step
    clip: float = 1.0  # of the gradient's norm; 0: none
    max_length: int = 320
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: mixed, the weights stay fp32
    evaluations: int = 2  # validations a run, evenly spread
    patience: int = 0  # validations without a new best until the run stops; 0: never
    bag: float = 1.0  # share of the training examples that this run sees, drawn by its seed
    augmentation: Literal["none", "token-dropout", "span-mask", "paraphrase"] = "none"
    seed: int = 0
    epsilon: float | None = None  # DP-SGD with this privacy budget; None: not private
    delta: float | None = None  # default: 1 / (10 N); must be below 1 / N
    batch_examples: int = 8  # DP-SGD: examples a step, on average (Poisson sampling)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"layers must be at least 1, got {self.layers}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "alpha", "bag"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if self.bag > 1:
            raise ConfigError(f"bag must be at most 1 (all examples), got {self.bag}")
        self._check_private()

    def _check_private(self) -> None:
        if self.epsilon is None:
            if self.delta is not None:
                raise ConfigError("delta is given without epsilon; a private run needs epsilon")
            return
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ConfigError(f"epsilon must be a number above 0, got {self.epsilon}")
        if self.method not in ("tail", "lora"):
            raise ConfigError(f"DP-SGD trains tails and adapters (tail, lora), got method '{self.method}'")
        if self.augmentation != "none" or self.label_smoothing or self.l1 or self.patience:
            raise ConfigError("DP-SGD goes without augmentation, label_smoothing, l1 and patience")

    @property
    def kind(self) -> MemberKind:
        """What the method makes."""
        return MemberKind.of_method(self.method)

    def num_layers(self, of: int) -> int:
        """How many of the model's `of` layers are trained. Raises `ConfigError` if it has fewer."""
        count = self.layers if self.layers is not None else min(2, of) if self.method == "tail" else of
        if count > of:
            raise ConfigError(f"layers must be at most {of}, the model's, got {count}")
        return count

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TuneParams:
        """Raises `ConfigError` for unknown keys."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"unknown hyper-parameters {unknown}")
        return cls(**{**values, "targets": tuple(values.get("targets", ("q_proj", "v_proj")))})
