"""`DecoderConfig`: a model's sizes and arithmetic. Backends and exporter derive everything from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..api.config import check_keys
from ..errors import ConfigError, shown

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
    "max_position_embeddings",
)  # fmt: skip
_FLAGS = (
    *("qkv_bias", "out_bias", "mlp_bias", "tied_head", "normalises_experts"),
    *("parallel_residual", "shared_norm"),
)
_SCALES = ("norm_eps", "rope_theta", "embedding_scale", "residual_scale", "logit_scale")
_OPTIONAL_SCALES = ("attention_scale", "attention_softcap", "logit_softcap", "window_rope_theta")
_CHOICES = {
    "norm": ("rms", "layer"),
    "norm_places": ("before", "around", "after"),
    "positions": ("rotary", "learned"),
    "activation": ("swiglu", "geglu", "gelu", "gelu_erf"),
    "qk_norm": (None, "head", "projection"),
}
_LAYER_LISTS = ("window_layers", "unrotated_layers", "dense_layers")


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
    # before attention and MLP, of what they add to the residual stream (olmo2), or both (gemma2)
    norm_places: Literal["before", "around", "after"] = "before"
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # a kind of `rotary.SCALINGS`; None: no scaling
    rotary_size: int | None = None  # channels of a head that rotate, the first ones (phi4); None: all
    window_rope_theta: float | None = None  # of the layers with a window, unscaled (gemma3); None: as the others
    unrotated_layers: tuple[int, ...] = ()  # whose queries and keys do not rotate (smollm3)
    # gelu: the tanh approximation; geglu: it is of a gate; gelu_erf: exact
    activation: Literal["swiglu", "geglu", "gelu", "gelu_erf"] = "swiglu"
    parallel_residual: bool = False  # the MLP reads the layer's input, without what attention adds (gpt_neox)
    shared_norm: bool = False  # and one norm is for both (falcon)
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention's output projection
    mlp_bias: bool = False
    # RMS norm of q and of k before rotary: over each head (qwen3), or over all heads together (olmo2)
    qk_norm: Literal["head", "projection"] | None = None
    sliding_window: int | None = None  # positions that a row attends to, itself included; None: all before it
    window_layers: tuple[int, ...] | None = None  # those with the window; None: all
    attention_scale: float | None = None  # of the scores; None: 1 / √head_size
    attention_softcap: float | None = None  # c: scores become c · tanh(score / c)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add to the residual stream (granite)
    logit_scale: float = 1.0  # before the soft cap
    logit_softcap: float | None = None
    tied_head: bool = True
    # A mixture of experts: MLPs of which a row runs the `experts_per_token` that a router finds most probable, weighted by
    # their probabilities (qwen3_moe, olmoe). 0: there are none.
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0  # as intermediate_size, of one
    normalises_experts: bool = False  # the weights of a row's experts sum to 1
    dense_layers: tuple[int, ...] = ()  # whose MLP is one of intermediate_size all the same

    def __post_init__(self) -> None:
        optional = [name for name in ("sliding_window", "rotary_size") if getattr(self, name) is not None]
        for name in (*_SIZES, *optional):
            low = 2 if name == "rotary_size" else 1
            value = getattr(self, name)
            if type(value) is not int or not low <= value < 2**31:
                note = " (null: none)" if name in optional else ""
                raise ConfigError(f"{name} must be an integer in {low}…{2**31 - 1}{note}, got {shown(value)}")
        for name, low, high in self._expert_counts():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{name} must be an integer in {low}…{high}, got {shown(value)}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {shown(getattr(self, name))}")
        if self.parallel_residual and (self.norm_places != "before" or self.num_experts):
            raise ConfigError("parallel_residual is for norms before attention and MLP, without experts")
        if self.shared_norm and not self.parallel_residual:
            raise ConfigError("shared_norm is for layers with parallel_residual")
        for name in (*_SCALES, *_OPTIONAL_SCALES):
            if name in _SCALES or getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name in _LAYER_LISTS:
            self._check_layers(name)
        for name, value in (self.rope_scaling or {}).items():
            if name not in ("rope_type", "type", "truncate"):
                for number in value if isinstance(value, list) else (value,):
                    _check_positive(f"rope scaling's {name}", number)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.positions == "rotary" and self.head_size % 2:
            raise ConfigError(f"head_size must be even for rotary positions, got {self.head_size}")
        if self.rotary_size is not None and (self.rotary_size % 2 or self.rotary_size > self.head_size):
            raise ConfigError(
                f"rotary_size must be even and at most head_size ({self.head_size}), got {self.rotary_size}"
            )

    def _expert_counts(self) -> Iterator[tuple[str, int, int]]:
        """(name, least, most) of the counts of a mixture of experts."""
        yield "num_experts", 0, 2**16
        yield "experts_per_token", min(1, self.num_experts), self.num_experts
        yield "expert_size", min(1, self.num_experts), (2**31 - 1) * min(1, self.num_experts)

    def _check_layers(self, name: str) -> None:
        """A list becomes a tuple."""
        value = getattr(self, name)
        if value is None and name == "window_layers":
            return
        if not isinstance(value, list | tuple) or not all(
            type(index) is int and 0 <= index < self.num_layers for index in value
        ):
            raise ConfigError(f"{name} must be a list of layers in 0…{self.num_layers - 1}, got {shown(value)}")
        object.__setattr__(self, name, tuple(value))

    @property
    def linear_head(self) -> bool:
        """Whether mixing hidden states before the head is mixing logits."""
        return self.logit_softcap is None

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
