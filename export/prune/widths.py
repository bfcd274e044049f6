"""Which heads and channels to remove: those that add least to the residual stream.

The importance of a group of heads (a head of keys and values with its query heads) and of a channel of the MLP is the mean
squared length of what it alone adds, over the positions of calibration text: W x of its columns W of the output projection and
its activations x. That is the activation-based importance of Minitron (Muralidharan et al. 2024) with the output weights in it,
as in Wanda (Sun et al. 2024); no gradients are needed, so a layer's weights are in memory at a time. Every layer loses as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.errors import ConfigError, NumericalError
from ...runtime.model.config import DecoderConfig

WIDTH_STEP = 64  # a width stays a multiple of it, so that quantisation groups divide it


def check_widths(config: DecoderConfig, heads: int | None, channels: int | None) -> None:
    """Raises `ConfigError` unless so many heads of keys and values, and channels, can be removed from each layer."""
    if heads is not None and not 1 <= heads < config.num_kv_heads:
        raise ConfigError(
            f"heads must be in 1…{config.num_kv_heads - 1} (a layer has {config.num_kv_heads} heads of keys and values, and one "
            f"stays), got {heads}"
            if config.num_kv_heads > 1
            else "a layer of this model has one head of keys and values, and that stays; leave out heads"
        )
    if channels is not None:
        left = config.intermediate_size - channels
        if channels < 1 or left < WIDTH_STEP or left % WIDTH_STEP:
            low = config.intermediate_size % WIDTH_STEP or WIDTH_STEP
            raise ConfigError(
                f"channels must leave a multiple of {WIDTH_STEP} of the {config.intermediate_size} of each MLP: {low}, "
                f"{low + WIDTH_STEP}, …, got {channels}"
            )


@torch.no_grad()
def importances(
    config: DecoderConfig, weights: Mapping[str, Tensor], chunks: Sequence[Sequence[int]], kept: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer → (importance of each head of keys and values, of each channel), float64, in the model that runs the layers `kept`.
    Without channels where the layer has experts. Raises `NumericalError`."""
    with torch.device("meta"):
        decoder = Decoder(config)
    tables = ("model.embed_tokens", *(("model.embed_positions",) if config.positions == "learned" else ()))
    with decoder.holding(weights, *tables):
        states = [decoder.embed(torch.tensor([list(chunk)])) for chunk in chunks]
    count = sum(state.shape[1] for state in states)
    found = {}
    for index in kept:
        layer: Any = decoder.model.layers[index]
        grams = _Sums(config.num_kv_heads)
        squares = _Squares()
        with decoder.holding(weights, f"model.layers.{index}"):
            hooks = [layer.self_attn.o_proj.register_forward_pre_hook(grams)]
            down = getattr(layer.mlp, "down_proj", None)
            if down is not None:
                hooks.append(down.register_forward_pre_hook(squares))
            states = [decoder.run_layers(state, index, index + 1) for state in states]
            for hook in hooks:
                hook.remove()
            heads = grams.contributions(layer.self_attn.o_proj.weight) / count
            empty = torch.zeros(0, dtype=torch.float64)
            channels = empty if down is None else squares.total * down.weight.double().square().sum(0) / count
        found[index] = heads, channels
        if not (torch.isfinite(heads).all() and torch.isfinite(channels).all()):
            raise NumericalError(f"layer {index} makes activations that are not finite; the model is damaged")
    return found


class _Sums:
    """Hook: Σ x xᵀ over rows, for each group of heads."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._total: Tensor = torch.zeros(())

    def __call__(self, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].double().reshape(-1, self._groups, inputs[0].shape[-1] // self._groups)  # [rows, groups, size]
        self._total = self._total + torch.einsum("rgi,rgj->gij", rows, rows)

    def contributions(self, weight: Tensor) -> Tensor:
        """[groups] Σ |W x|², where W are a group's columns of `weight`."""
        columns = weight.double().reshape(len(weight), self._groups, -1)  # [hidden, groups, size]
        return torch.einsum("hgi,gij,hgj->g", columns, self._total, columns)


class _Squares:
    """Hook: Σ x² over rows, for each channel."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros(())

    def __call__(self, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.total = self.total + inputs[0].flatten(0, -2).double().square().sum(0)


def most_important(importance: Tensor, removed: int) -> tuple[int, ...]:
    """All but the `removed` least important, ascending."""
    order = torch.argsort(importance, descending=True, stable=True)[: len(importance) - removed]
    return tuple(sorted(order.tolist()))
