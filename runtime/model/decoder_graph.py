"""`DecoderGraph`: an ONNX decoder that another program exported, as a bundle holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..api.config import check_keys
from ..errors import ConfigError, shown

Padding = Literal["none", "left", "right"]
_MOST_LAYERS = 2**12  # each has names of its own
_SIZES = ("vocab_size", "num_layers", "num_kv_heads", "head_size", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class GraphConfig:
    """The sizes that a decoder graph is fed and read by; the rest of the model is in the graph. Raises `ConfigError` for a
    size that is no positive integer."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int  # prompt and answer together

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            most = _MOST_LAYERS if name == "num_layers" else 2**31 - 1
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{name} must be an integer in 1…{most}, got {shown(value)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GraphConfig:
        """Raises `ConfigError` for unknown keys."""
        check_keys(cls, values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """File names, and how sequences of different lengths share a run of the graph. `padding`: "left" or "right" of the keys and
    values of a shorter one; "none": each sequence is run alone. Raises `ConfigError` for another padding."""

    file: str
    data: tuple[str, ...]  # files that hold the graph's tensors
    padding: Padding = "none"

    def __post_init__(self) -> None:
        if self.padding not in get_args(Padding):
            raise ConfigError(f"padding must be one of {get_args(Padding)}, got {shown(self.padding)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderGraph:
        """From the manifest's `graphs`. Raises `KeyError` or `TypeError` for what is none."""
        return cls(values["whole"], tuple(values["data"]), values["padding"])

    def to_dict(self) -> dict[str, Any]:
        return {"whole": self.file, "data": list(self.data), "padding": self.padding}
