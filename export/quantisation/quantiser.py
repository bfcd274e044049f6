"""`Quantiser`: which scheme each weight of a model has, and its values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...runtime.model.config import DecoderConfig
from ...runtime.model.layout import EMBEDDING, Layout, Linear, decoder_layout
from ...runtime.model.rotary import rotary_tables
from .allocate import Choice, allocate, cheapest
from .equalise import sharpening, smoothing
from .gptq import gptq
from .groups import (
    HEAD_GROUP,
    Quantised,
    Scheme,
    affine,
    check_group,
    dequantise,
    layer_group,
    nearest,
    quantise,
    rounded,
)
from .method import Method, Target
from .search import search
from .statistics import Statistics

F32 = npt.NDArray[np.float32]
Tensor = torch.Tensor

CHOICES = (Scheme(4, 128), Scheme(4, 64), Scheme(4, 32), Scheme(8, 128), Scheme(8, 64), Scheme(8, 32))
_ALPHAS = (0.0, 0.25, 0.5, 0.75)  # of which AWQ takes the best
_AT_ONCE = 2**23  # weights whose changes are looked at together
_FEW_RANGES = 4  # where only errors are compared


@dataclass(slots=True)
class Quantiser:
    """`plan`: name of a weight → its scheme. `scales`: name of a linear layer → by what its columns were multiplied (see
    `equalise`); `row_scales`: name of a weight → by what its rows were divided for it. `expected`: name → the KL that its
    rounding is expected to cost, where statistics say."""

    plan: Mapping[str, Scheme]
    method: Method
    scales: dict[str, F32] = field(default_factory=dict)
    row_scales: dict[str, F32] = field(default_factory=dict)
    statistics: Statistics | None = None
    group_size: int | None = None  # that the user has set
    expected: dict[str, float] = field(default_factory=dict)

    def bits(self, name: str) -> int:
        """Of the base's weight `name`; 32 if it is not quantised."""
        return self.plan[name].bits if name in self.plan else 32

    def of_member(self, name: str, weight: F32) -> Quantised:
        """A weight that a member has of its own: at least 8 bits, because rounding to fewer would undo what fine-tuning did."""
        scheme = self.plan[name]
        if scheme.bits < 8:  # a layer's experts have groups of one size, whoever's they are
            group = layer_group(8, weight.shape[1], self.group_size) if _unit(name) == name else scheme.group_size
            scheme = Scheme(8, group)
        return quantise(weight, scheme.bits, scheme.group_size, name=name)

    def __call__(self, name: str, weight: F32) -> Quantised:
        """The base's weight `name` [rows, columns], equalised already."""
        scheme = self.plan[name]
        if self.statistics is None or scheme.bits == 8 or name not in self.statistics:
            found = quantise(weight, scheme.bits, scheme.group_size, name=name)
        else:
            found = _calibrated(weight, self._moments(name), scheme, self.method, name)
        if self.statistics is not None:
            self.expected[name] = self.cost(name, weight, found)
        return found

    def cost(self, name: str, weight: F32, found: Quantised) -> float:
        """What rounding `weight` is expected to cost. Some rows at a time, because beside them it needs a multiple of their
        memory."""
        count = max(1, _AT_ONCE // weight.shape[1])
        parts = (slice(first, first + count) for first in range(0, len(weight), count))
        return self._sum(name, ((rows, dequantise(found.part(rows)) - weight[rows]) for rows in parts))

    def _moments(self, name: str) -> Tensor:
        assert self.statistics is not None
        moments = torch.from_numpy(self.statistics.moments(name))
        scale = self.scales.get(name.removesuffix(".weight"))
        if scale is not None:
            moments = moments / torch.from_numpy(scale) / torch.from_numpy(scale)[:, None]
        return moments

    def expected_kl(self, name: str, change: F32) -> float:
        """What changing a weight by so much is expected to cost, nats a token (see `statistics`)."""
        return self._sum(name, [(slice(None), change)])

    def _sum(self, name: str, changes: Iterable[tuple[slice, F32]]) -> float:
        """Of the changes of some rows each."""
        assert self.statistics is not None
        of_inputs = name in self.statistics
        if of_inputs:
            moments, sensitivity = self._moments(name), torch.from_numpy(self.statistics.sensitivity(name))
            if name in self.row_scales:
                sensitivity = sensitivity * torch.from_numpy(self.row_scales[name]).square()
        if name == EMBEDDING:
            shares, channels = map(torch.from_numpy, self.statistics.embedding)
        total = 0.0
        for rows, values in changes:
            change = torch.from_numpy(values)
            if of_inputs:
                total += 0.5 * float(((change @ moments) * change).sum(1) @ sensitivity[rows])
            if name == EMBEDDING:
                total += 0.5 * float(shares[rows] @ (change.square() @ channels))
        return total


def uniform(
    config: DecoderConfig, bits: int, group_size: int | None, method: Method, statistics: Statistics | None
) -> Quantiser:
    """Layers of `bits` in groups of `group_size` (None: see `layer_group`); head and embedding have at least 8 bits."""
    layout = decoder_layout(config)
    if bits == 32:
        return Quantiser({}, method)
    plan = {f"{one.name}.weight": Scheme(bits, layer_group(bits, one.columns, group_size)) for one in layout.linears}
    plan |= dict.fromkeys((EMBEDDING, layout.head), Scheme(8, HEAD_GROUP))
    for name, scheme in plan.items():
        check_group(name, _columns(layout)[name], scheme.group_size)
    return Quantiser(plan, method, statistics=statistics, group_size=group_size)


def can_sharpen(config: DecoderConfig) -> bool:
    """Whether there are layers whose channels AWQ can scale."""
    return any(linear.source is not None for linear in decoder_layout(config).linears)


def check_columns(config: DecoderConfig) -> None:
    """Raises `ConfigError` for a weight that no scheme of a plan fits."""
    for name, columns in _columns(decoder_layout(config)).items():
        if not any(columns % scheme.group_size == 0 for scheme in CHOICES):
            check_group(name, columns, CHOICES[-1].group_size)


def plan_bits(config: DecoderConfig) -> tuple[float, float]:
    """The fewest and the most bits a weight, on average, that a plan can have."""
    shapes = _shapes(decoder_layout(config))
    total = sum(rows * columns for rows, columns in shapes.values())
    least, most = (
        sum(rows * columns * pick(_stored_bits(columns)) for rows, columns in shapes.values()) / total
        for pick in (min, max)
    )
    return least, most


def _stored_bits(columns: int) -> list[float]:
    """Bits a weight of each scheme that fits, with 16 bits for each scale and minimum."""
    return [
        scheme.bits + (16 if scheme.bits == 8 else 32) / scheme.group_size
        for scheme in CHOICES
        if columns % scheme.group_size == 0
    ]


def planned(
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    target: Target,
    method: Method,
    statistics: Statistics,
    on_weight: Callable[[], None] = lambda: None,
) -> Quantiser:
    """The schemes with which the model is within `target` and is expected to lose least. What is not quantised (norms, biases,
    rotary tables) counts for megabytes only, with 4 bytes. `weights`: the base's, in parts. Raises `ConfigError` for a target
    that cannot be reached."""
    layout = decoder_layout(config)
    choices: dict[str, list[Choice]] = {}
    for name, weight in _quantised_weights(layout, weights):
        own, unit = _choices(name, weight, method, statistics), _unit(name)
        choices[unit] = [a + b for a, b in zip(choices[unit], own, strict=True)] if unit in choices else own
        on_weight()
    shapes = layout.checkpoint_shapes()
    quantised = sum(rows * columns for rows, columns in _shapes(layout).values())
    others = 4 * (sum(int(np.prod(shape)) for shape in shapes.values()) - quantised)
    if config.positions == "rotary":
        others += sum(table.nbytes for table in rotary_tables(config).values())
    if target.kl is not None:
        chosen = cheapest(choices, target.kl)
    else:
        most = target.bits * quantised / 8 if target.bits is not None else (target.megabytes or 0) * 1e6 - others
        chosen = allocate(choices, int(most))
    return Quantiser({name: chosen[_unit(name)].scheme for name in _shapes(layout)}, method, statistics=statistics)


def choose_scales(quantiser: Quantiser, layout: Layout, weights: Mapping[str, Tensor], rms: Mapping[str, F32]) -> None:
    """Set the scales of the linear layers' channels: for 8 bits `smoothing`, for 4 bits with AWQ `sharpening`. `rms`: name of
    a linear layer → root mean square of its input channels."""
    found = quantiser.scales
    for linear in layout.linears:
        scheme = quantiser.plan.get(f"{linear.name}.weight", Scheme(32))
        if linear.source is None or linear.name not in rms:
            continue
        if scheme.bits == 8:
            found[linear.name] = smoothing(rms[linear.name], scheme.group_size)
        elif scheme.bits == 4 and quantiser.method is Method.AWQ and quantiser.statistics is not None:
            moments = torch.from_numpy(quantiser.statistics.moments(f"{linear.name}.weight"))
            found[linear.name] = _sharpest(_fused(linear, weights), moments, rms[linear.name], scheme)
    by_source = {linear.source: found[linear.name] for linear in layout.linears if linear.name in found}
    for linear in layout.linears:
        if any(part.name in by_source for part in linear.parts):
            own = [by_source.get(part.name, np.ones(part.rows, np.float32)) for part in linear.parts]
            quantiser.row_scales[f"{linear.name}.weight"] = np.concatenate(own)


def _sharpest(weight: Tensor, moments: Tensor, rms: F32, scheme: Scheme) -> F32:
    best, least = np.ones_like(rms), float("inf")
    for alpha in _ALPHAS:
        scale = torch.from_numpy(sharpening(rms, alpha))
        own = moments / scale / scale[:, None]
        scales, minima = search(weight * scale, own.diagonal(), scheme.group_size, _FEW_RANGES)
        change = affine_error(weight * scale, scales, minima)
        error = float(((change @ own) * change).sum())
        if error < least:
            best, least = scale.numpy(), error
    return best


def affine_error(weight: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """What rounding a weight [N, K] to the nearest values of its groups changes, [N, K]."""
    groups = weight.reshape(*scales.shape, -1)
    values = ((groups - minima[..., None]) / scales[..., None]).round_().clamp_(0, 15)
    change: Tensor = (values * scales[..., None] + minima[..., None] - groups).flatten(1)
    return change


def _calibrated(weight: F32, moments: Tensor, scheme: Scheme, method: Method, name: str) -> Quantised:
    if method is Method.ROUND:
        return quantise(weight, scheme.bits, scheme.group_size, name=name)
    check_group(name, weight.shape[1], scheme.group_size)
    matrix = torch.from_numpy(weight)
    scales, minima = search(matrix, moments.diagonal(), scheme.group_size)
    if method is not Method.GPTQ:
        stored, stored_minima = rounded(scales.numpy(), minima.numpy())
        return nearest(weight, stored, stored_minima)
    values = gptq(matrix, moments, scales, minima).reshape(*scales.shape, -1)
    return affine(values.to(torch.uint8).numpy(), scales.numpy(), minima.numpy())


def _choices(name: str, weight: Tensor, method: Method, statistics: Statistics) -> list[Choice]:
    """What each scheme costs; with fewer ranges than the values will be searched with, and before errors are made up for."""
    columns = weight.shape[1]
    judge = Quantiser({}, Method.SEARCH, statistics=statistics)
    found = []
    for scheme in CHOICES:
        if columns % scheme.group_size:
            continue
        if scheme.bits == 8 or method is Method.ROUND or name not in statistics:
            rounded_weight = quantise(weight.numpy(), scheme.bits, scheme.group_size, name=name)
        else:
            importance = torch.from_numpy(statistics.moments(name)).diagonal()
            scales, minima = search(weight, importance, scheme.group_size, _FEW_RANGES)
            rounded_weight = nearest(weight.numpy(), *rounded(scales.numpy(), minima.numpy()))
        cost = judge.cost(name, weight.numpy(), rounded_weight)
        found.append(Choice(scheme, rounded_weight.num_bytes, cost))
    return found


def _unit(name: str) -> str:
    """The same for weights that have one scheme: a layer's experts, which kernels run together."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


def _quantised_weights(layout: Layout, weights: Mapping[str, Tensor]) -> Any:
    """(name, weight [rows, columns]) of each weight that is quantised, one at a time."""
    for linear in layout.linears:
        yield f"{linear.name}.weight", _fused(linear, weights)
    for name in dict.fromkeys((EMBEDDING, layout.head)):
        yield name, weights[name].float()


def _fused(linear: Linear, weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weights[f"{part.name}.weight"] for part in linear.parts]).float()


def _shapes(layout: Layout) -> dict[str, tuple[int, int]]:
    config = layout.config
    shapes = {f"{one.name}.weight": (one.rows, one.columns) for one in layout.linears}
    return shapes | dict.fromkeys((EMBEDDING, layout.head), (config.vocab_size, config.hidden_size))


def _columns(layout: Layout) -> dict[str, int]:
    return {name: columns for name, (_, columns) in _shapes(layout).items()}
