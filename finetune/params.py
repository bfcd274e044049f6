"""`TuneParams`: everything that a training run depends on besides the model and the data; `NearDuplicates`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args, get_type_hints

from ..runtime.api.config import described
from ..runtime.errors import ConfigError
from ..runtime.model.members import MemberKind

PROJECTOR = "projector"  # it makes no member: an encoder of the base learns
METHODS = (*(method for kind in MemberKind for method in kind.methods), PROJECTOR)

_COUNTS = (
    "rank", "examples", "validation_examples", "epochs", "batch_tokens", "accumulate", "evaluations",
)  # fmt: skip
MAX_LENGTH_HELP = "Tokens per example, at most; default: 320, or the model's context if that is shorter."
_SHARES = ("warmup", "label_smoothing", "dropout")
_NOT_NEGATIVE = ("weight_decay", "l1", "clip", "patience")
_OF_EPOCHS = (
    *(
        "learning_rate",
        "weight_decay",
        "l1",
        "label_smoothing",
        "warmup",
        "schedule",
        "accumulate",
        "clip",
        "evaluations",
    ),
    "patience",
)
_CHOICES = ("schedule", "augmentation", "precision", "loss")


class NearDuplicates(StrEnum):
    """What is done with training examples that nearly repeat a held-out one, and validation examples that nearly repeat
    a test one."""

    DROP = "drop"  # leave them out
    KEEP = "keep"  # keep and count them
    REFUSE = "refuse"  # raise `DataError`


@dataclass(frozen=True, slots=True)
class TuneParams:
    """Hyper-parameters of a run. Raises `ConfigError` at construction if a value or a combination is not possible."""

    method: str = described("tail", f"What is trained: {', '.join(METHODS)}.")
    layers: int | None = described(None, "How many of the last layers to train; default: 2 for tail, else all.")
    head: bool = described(
        False, "Train the head too. The result can only be exported alone: an ensemble shares a head."
    )
    rank: int = described(8, "Rank of an adapter.")
    alpha: float = described(16.0, "An adapter's scale is alpha / rank.")
    targets: tuple[str, ...] = described(("q_proj", "v_proj"), "Projections that an adapter changes.")
    examples: int = described(400, "Training examples, at most.")
    validation_examples: int = described(64, "Validation examples, at most.")
    epochs: int = described(2, "Passes over the training examples.")
    learning_rate: float = described(3e-4, "Learning rate at its highest.", "lr")
    weight_decay: float = described(0.01, "L2, decoupled (AdamW).")
    l1: float = described(0.0, "Factor, in the loss, of the summed absolute change of the trained weights.")
    label_smoothing: float = described(0.0, "Share of the target probability spread over the vocabulary.")
    dropout: float = described(0.0, "Dropout on the branches of trained layers, and on an adapter's input.")
    warmup: float = 0.1  # share of the steps
    schedule: Literal["cosine", "linear", "constant"] = described("cosine", "Learning rate after the warm-up.")
    batch_tokens: int = described(1024, "Tokens per batch, padding included.")
    accumulate: int = described(1, "Batches per optimiser step.")
    clip: float = described(1.0, "Largest norm of the gradient; 0: no limit.")
    max_length: int | None = described(None, MAX_LENGTH_HELP)
    loss: Literal["answer", "all"] = described(
        "answer", "Turns that the loss is taken on: the last, or all the assistant's."
    )
    precision: Literal["fp32", "bf16"] = described("fp32", "bf16 is mixed: the weights stay fp32.")
    evaluations: int = described(2, "Validations per run, evenly spread.")
    patience: int = described(0, "Stop after this many validations without a new best; 0: never.")
    bag: float = described(1.0, "Share of the training examples that a run sees, drawn by its seed.")
    augmentation: Literal["none", "token-dropout", "span-mask", "paraphrase"] = described(
        "none", "How training examples are varied."
    )
    seed: int = described(0, "Seed of the run.")
    epsilon: float | None = described(None, "Train with DP-SGD, with this privacy budget per run.")
    delta: float | None = described(None, "DP-SGD: below 1 / N for N training examples; default: 1 / (10 N).")
    batch_examples: int | None = described(
        None, "DP-SGD: examples per step, on average (Poisson sampling); default: 8."
    )

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for name, choices in {"method": METHODS, **{name: get_args(types[name]) for name in _CHOICES}}.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got '{getattr(self, name)}'")
        for name in _COUNTS:
            least = 0 if name == "epochs" and self.method == PROJECTOR else 1
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("layers", "max_length", "batch_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
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
        self._check_method()
        self._check_private()

    def _check_method(self) -> None:
        if self.method == PROJECTOR:
            for name in ("layers", "head", "dropout"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name} is of the model's layers, and method 'projector' trains none; leave it out"
                    )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if not self.epochs:
            for name in _OF_EPOCHS:
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(f"{name} is of epochs, and there are none (epochs is 0); leave it out")
        adapts = self.kind is MemberKind.ADAPTER
        if adapts and self.head:
            raise ConfigError(f"head cannot be trained with method '{self.method}': an adapter has no head")
        for name in ("rank", "alpha", "targets"):
            if not adapts and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name} is a setting of adapters, and method '{self.method}' makes none; leave it out"
                )

    def _check_private(self) -> None:
        if self.epsilon is None:
            for name in ("delta", "batch_examples"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is set without epsilon; a private run needs epsilon")
            return
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ConfigError(f"epsilon must be a number above 0, got {self.epsilon}")
        if self.method not in ("tail", "lora"):
            raise ConfigError(f"DP-SGD trains tails and adapters (tail, lora), got method '{self.method}'")
        if self.augmentation != "none" or self.label_smoothing or self.l1 or self.patience or self.accumulate > 1:
            raise ConfigError(
                "DP-SGD cannot be used with augmentation, label_smoothing, l1, patience or accumulate (batch_examples is "
                "the size of its step)"
            )

    @property
    def kind(self) -> MemberKind:
        """What the method makes. A projector is a part of the base."""
        return MemberKind.BASE if self.method == PROJECTOR else MemberKind.of_method(self.method)

    def check_makes_member(self) -> None:
        """Raises `ConfigError` for a method that makes no member."""
        if self.method == PROJECTOR:
            raise ConfigError("method 'projector' makes a model with an encoder and no member; use `motet tune` for it")

    def num_layers(self, of: int) -> int:
        """How many layers of a model with `of` layers are trained. Raises `ConfigError` if `layers` is more than that."""
        count = self.layers if self.layers is not None else min(2, of) if self.method == "tail" else of
        if count > of:
            raise ConfigError(f"layers must be at most {of}, the model's, got {count}")
        return count

    def fitted(self, context: int) -> TuneParams:
        """These, with a `max_length` that is set: by default 320, or `context`, the model's positions, if these are
        fewer. Raises `ConfigError` if it is set to more than that."""
        length = min(320, context) if self.max_length is None else self.max_length
        if length > context:
            raise ConfigError(f"max_length must be at most {context}, the model's context, got {length}")
        return dataclasses.replace(self, max_length=length)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TuneParams:
        """The inverse of `to_dict`; missing keys have their defaults. Raises `ConfigError` for unknown keys."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"unknown hyper-parameters {unknown}")
        settings = dict(values)
        if "targets" in settings:
            settings["targets"] = tuple(settings["targets"])
        return cls(**settings)
