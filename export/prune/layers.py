"""Which layers to remove: those that change their input least.

The *block influence* of a layer is 1 - the mean cosine between its input and its output, over the positions of calibration
text (Men et al. 2024, ShortGPT).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.checkpoints.decoder import Decoder
from ...runtime.checkpoints.rewrite import layer_of
from ...runtime.errors import ConfigError, NumericalError
from ...runtime.model.config import DecoderConfig
from ...runtime.model.layout import decoder_layout


@torch.no_grad()
def block_influence(
    config: DecoderConfig, weights: Mapping[str, Tensor], chunks: Sequence[Sequence[int]], kept: Sequence[int]
) -> dict[int, float]:
    """Layer → its influence, in the model that runs the layers `kept` alone. `chunks`: token ids. One layer's weights are in
    memory at a time. Raises `NumericalError` if a hidden state is not finite."""
    with torch.device("meta"):
        decoder = Decoder(config)
    tables = ("model.embed_tokens", *(("model.embed_positions",) if config.positions == "learned" else ()))
    with decoder.holding(weights, *tables):
        states = [decoder.embed(torch.tensor([list(chunk)])) for chunk in chunks]
    found = {}
    for index in kept:
        total, count = 0.0, 0
        with decoder.holding(weights, f"model.layers.{index}"):
            for place, before in enumerate(states):
                after = decoder.run_layers(before, index, index + 1)
                total += float((1 - F.cosine_similarity(before.double(), after.double(), dim=-1)).sum())
                count += before.shape[1]
                states[place] = after
        found[index] = total / count
        if not math.isfinite(found[index]):
            raise NumericalError(f"layer {index} makes hidden states that are not finite; the model is damaged")
    return found


def layer_sizes(config: DecoderConfig) -> list[int]:
    """Parameters of each layer."""
    sizes = [0] * config.num_layers
    for name, shape in decoder_layout(config).checkpoint_shapes().items():
        layer = layer_of(name)
        if layer is not None:
            sizes[layer] += math.prod(shape)
    return sizes


def choose_layers(
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    chunks: Sequence[Sequence[int]],
    *,
    count: int | None,
    share: float | None,
    greedy: bool,
    fixed: Collection[int] = (),
) -> tuple[tuple[int, ...], list[dict[int, float]]]:
    """(the layers to keep, the influences by which each choice was made). Removed are `count` layers, or the fewest that have
    `share` of all layers' parameters: the least influential, counted once, or with `greedy` again after each removal. Layers
    of `fixed` stay. Raises `ConfigError` if there are not so many."""
    sizes = layer_sizes(config)
    if count is not None and not 1 <= count < config.num_layers:
        raise ConfigError(
            f"layers must be in 1…{config.num_layers - 1}, as at least one of the model's stays, got {count}"
        )
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"share must be above 0 and below 1, got {share:g}")
    kept, gone = list(range(config.num_layers)), 0
    rounds: list[dict[int, float]] = []

    def is_enough() -> bool:
        if count is not None:
            return config.num_layers - len(kept) == count
        assert share is not None
        return gone >= share * sum(sizes)

    while not is_enough():
        if greedy or not rounds:
            rounds.append(block_influence(config, weights, chunks, kept))
        free = [layer for layer in kept if layer not in fixed]
        if not free or len(kept) == 1:
            wanted = f"{count} layers" if count is not None else f"a share of {share:g} of the layers' parameters"
            held = f", and {len(fixed)} are layers of tails (--from-tails removes those too)" if fixed else ""
            raise ConfigError(f"{wanted} cannot be removed from {config.num_layers} layers: one must stay{held}")
        least = min(free, key=lambda layer: rounds[-1][layer])
        kept.remove(least)
        gone += sizes[least]
    return tuple(kept), rounds
