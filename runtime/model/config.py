"""`DecoderConfig`: a model's sizes and arithmetic. Backends and exporter derive everything from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from ..api.config import check_keys
from ..errors import ConfigError, shown

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
    "max_position_embeddings",
)  # fmt: skip
_FLAGS = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied_head", "linear_head")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only transformer. `layout.decoder_layout` makes the table of its weights.

    Sizes are counts of elements. `family` says how checkpoints store the model (`families.FAMILIES`). Whatever
    changes the arithmetic has a field of its own, so a new family is a file in `families/` and not a branch
    elsewhere. Raises `ConfigError` for a value of the wrong type or out of its range.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # kinds "llama3" and "linear"; None: no scaling
    unrotated_every: int = 0  # one of every so many layers does not rotate queries and keys (smollm3); 0: all do
    activation: Literal["swiglu", "gelu"] = "swiglu"  # gelu: the tanh approximation, without a gate
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before rotary (qwen3)
    sliding_window: int | None = None  # positions that a row attends to, itself included; None: all before it
    first_window_layer: int = 0  # the layers before it attend to all positions
    tied_head: bool = True
    linear_head: bool = (
        True  # False: logits are changed after the head, as by a soft cap, so hidden states cannot be mixed before it
    )

    def __post_init__(self) -> None:
        limits = {"first_window_layer": 0, "unrotated_every": 0} | (
            {} if self.sliding_window is None else {"sliding_window": 1}
        )
        for name, low in (dict.fromkeys(_SIZES, 1) | limits).items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value < 2**31:
                note = " (null: none)" if name == "sliding_window" else ""
                raise ConfigError(f"{name} must be an integer in {low}…{2**31 - 1}{note}, got {shown(value)}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        for name in ("norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        for name, value in (self.rope_scaling or {}).items():
            if name not in ("rope_type", "type"):
                _check_positive(f"rope scaling's {name}", value)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.positions == "rotary" and self.head_size % 2:
            raise ConfigError(f"head_size must be even for rotary positions, got {self.head_size}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Raises `ConfigError` for unknown keys."""
        check_keys(cls, values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a finite number above 0, got {shown(value)}")
