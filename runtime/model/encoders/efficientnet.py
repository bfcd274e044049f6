"""A tower of EfficientNet-Lite0's layout (Tan and Le 2019): convolutions without squeeze-and-excitation, with ReLU6 and
TensorFlow's padding, whose norms are folded into them. It is described here once, for the page in torch and for the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError, shown

TOWER = "efficientnet-lite0"
WIDTH = 1280  # channels of the last convolution
CELL = 32  # pixels in each direction of a place of its output
# What "all" levels are of: a block, its channels, its places in each direction of a cell, and how many of these are averaged. The
# early ones know colours, which a classifier of objects forgets.
LEVELS = (("blocks.4", 40, 4, 2), ("blocks.10", 112, 2, 1), ("blocks.15", 320, 1, 1))
_STEM = 32
# (blocks, kernel, stride of the first, expansion, channels)
_STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)


@dataclass(frozen=True, slots=True)
class EfficientNetConfig:
    """`levels`: "last", the last convolution; or "all", the outputs of `LEVELS` beside each other. `pool`: the mean of so many
    places in each direction becomes one row. `output_size`: hidden size of the text model. Raises `ConfigError`."""

    tower: str
    pool: int
    output_size: int
    levels: Literal["last", "all"] = "last"

    def __post_init__(self) -> None:
        if self.tower != TOWER:
            raise ConfigError(f"tower must be {TOWER}, got {shown(self.tower)}")
        if self.levels not in ("last", "all"):
            raise ConfigError(f"levels of the tower must be last or all, got {shown(self.levels)}")
        for name in ("pool", "output_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**20:
                raise ConfigError(f"{name} of the tower must be an integer in 1…{2**20 - 1}, got {shown(value)}")

    @property
    def unit(self) -> int:
        """Pixels in each direction that become one row."""
        return CELL * self.pool

    @property
    def width(self) -> int:
        """Of what the projector gets."""
        return WIDTH if self.levels == "last" else sum(size * (side // mean) ** 2 for _, size, side, mean in LEVELS)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A square kernel. `groups`: 1, or as many as channels. Padded so that the output has 1/`stride` of the edge, which is a
    multiple of it; where an odd number of pixels is added, the last side has one more (TensorFlow's SAME)."""

    name: str
    channels: int
    out: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    is_activated: bool = True  # by ReLU6

    @property
    def padding(self) -> tuple[int, int]:
        """Before and after, in each direction."""
        before = (self.kernel - self.stride) // 2
        return before, self.kernel - self.stride - before


@dataclass(frozen=True, slots=True)
class Block:
    """Convolutions one after the other. `is_residual`: what goes in is added to what comes out."""

    convolutions: tuple[Convolution, ...]
    is_residual: bool

    @property
    def name(self) -> str:
        return self.convolutions[0].name.rpartition(".")[0]


def blocks(levels: str = "last") -> Iterator[Block]:
    """The tower in order, stem and head among it; the head is of "last" levels alone."""
    yield Block((Convolution("stem", 3, _STEM, 3, 2),), False)
    channels, number = _STEM, 0
    for count, kernel, first_stride, expansion, out in _STAGES:
        for index in range(count):
            stride = first_stride if index == 0 else 1
            inner, name = channels * expansion, f"blocks.{number}"
            found = [Convolution(f"{name}.expand", channels, inner)] if expansion > 1 else []
            found += [
                Convolution(f"{name}.depthwise", inner, inner, kernel, stride, inner),
                Convolution(f"{name}.project", inner, out, is_activated=False),
            ]
            yield Block(tuple(found), stride == 1 and channels == out)
            channels, number = out, number + 1
    if levels == "last":
        yield Block((Convolution("head", channels, WIDTH),), False)
