"""What the readers of quantised checkpoints have in common, and numbers packed into words. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import UnsupportedModelError, shown

Settings = Mapping[str, Any]  # quantization_config of a config.json
Shapes = Mapping[str, tuple[int, ...]]


class Method(Protocol):
    """A way in which quantised weights are stored: as several tensors each."""

    def owner(self, name: str) -> str | None:
        """The weight (`….weight`) whose quantisation a stored tensor is a part of; None if it is a tensor like any."""

    def shape(self, weight: str, shapes: Shapes, read: Callable[[str], Tensor]) -> tuple[int, ...]:
        """[out, in] of a weight with these parts. `read` reads one of them. Raises `KeyError`, `ValueError`."""

    def widen(self, weight: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight in float32 [out, in]. Raises `KeyError`, `ValueError`, `RuntimeError` if its parts do not fit."""


def option(settings: Settings, name: str, allowed: tuple[Any, ...]) -> Any:
    """An option's value, of which the first allowed one is the default. Raises `UnsupportedModelError` for another."""
    value = settings.get(name, allowed[0])
    if value not in allowed:
        raise UnsupportedModelError(
            f"quantization_config has {name}={shown(value)}; {list(allowed)} are supported, or pull the model in float"
        )
    return value


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Whole numbers of `bits` bits, int32, from int32 words along `dim`: the lowest bits first, without gaps, so that 32
    numbers take `bits` words. Numbers of 3, 5, 6 or 7 bits may begin in one word and end in the next."""
    words = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    count = words.shape[-1] * 32 // bits
    first = torch.arange(count) * bits
    word, shift = first // 32, first % 32
    following = torch.cat([words[..., 1:], torch.zeros_like(words[..., :1])], -1)
    both: Tensor = words[..., word] >> shift | (following[..., word] << (32 - shift)) & 0xFFFFFFFF
    numbers: Tensor = (both & (2**bits - 1)).to(torch.int32).movedim(-1, dim)
    return numbers


def check(condition: bool, problem: str) -> None:
    """Raises `ValueError` unless the condition holds."""
    if not condition:
        raise ValueError(problem)
