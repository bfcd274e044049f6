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


def check_packed(settings: Settings) -> None:
    """Raises `UnsupportedModelError` for options of GPTQ's and AWQ's tools that change what is computed or stored."""
    option(settings, "pack_dtype", ("int32", None))
    for name in ("rotation", "activation"):  # of activations, while the model runs
        option({name: settings.get(name) or None}, name, (None,))
    for pattern in settings.get("dynamic") or {}:
        if not pattern.startswith("-"):  # those with a minus are modules that are not quantised
            raise UnsupportedModelError(f"quantization_config has options of its own for '{pattern}'")


def group_size(settings: Settings) -> int | None:
    """Inputs that share a scale; None: all. Raises `UnsupportedModelError` for what is neither a whole number above 0 nor -1."""
    size = settings.get("group_size", 128)
    if size is not None and (type(size) is not int or size == 0 or size < -1):
        raise UnsupportedModelError(f"quantization_config has group_size={shown(size)}")
    return None if size in (None, -1) else size


def check_groups(count: int, groups: int, size: int | None) -> int:
    """Inputs of a group: `groups` of them for `count` inputs. Raises `ValueError` if they are not those of the settings."""
    size = size or count
    check(groups == -(-count // size), f"{groups} groups for {count} inputs in groups of {size}")
    return size


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Whole numbers of `bits` bits, int32, from int32 words along `dim`: the lowest bits first, without gaps, so that 32
    numbers take `bits` words. Numbers of 3, 5, 6 or 7 bits may begin in one word and end in the next."""
    check(words.dtype == torch.int32, f"words of {words.dtype}")
    words, mask = words.movedim(dim, -1), 2**bits - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        own: Tensor = ((words[..., None] >> shifts) & mask).flatten(-2).movedim(-1, dim)
        return own
    wide = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(words.shape[-1] * 32 // bits) * bits
    word, shift = first // 32, first % 32
    following = torch.cat([wide[..., 1:], torch.zeros_like(wide[..., :1])], -1)
    both = wide[..., word] >> shift | (following[..., word] << (32 - shift)) & 0xFFFFFFFF
    numbers: Tensor = (both & mask).to(torch.int32).movedim(-1, dim)
    return numbers


def check(condition: bool, problem: str) -> None:
    """Raises `ValueError` unless the condition holds."""
    if not condition:
        raise ValueError(problem)
