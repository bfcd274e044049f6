"""`Cut`: what is kept of a model, and the model's configuration and weights after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...runtime.checkpoints.rewrite import Places, layer_of, renumbered
from ...runtime.model.config import DecoderConfig
from ...runtime.model.layout import EMBEDDING, HEAD

_LAYER_LISTS = ("window_layers", "unrotated_layers", "dense_layers")


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept, in ascending order. `kv_heads`, `channels`: layer of the original model → its heads of keys and values
    (their query heads stay with them), and the channels of its MLP; every layer has equally many. Empty, or None: all."""

    layers: tuple[int, ...]
    kv_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    channels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    tokens: tuple[int, ...] | None = None

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """The configuration of what is kept of a model with `config`."""
        new = {old: index for index, old in enumerate(self.layers)}
        changes: dict[str, object] = {"num_layers": len(self.layers)}
        for name in _LAYER_LISTS:
            value = getattr(config, name)
            if value is not None:
                changes[name] = tuple(new[layer] for layer in value if layer in new)
        if self.kv_heads:
            kept = len(next(iter(self.kv_heads.values())))
            changes |= {"num_kv_heads": kept, "num_heads": kept * (config.num_heads // config.num_kv_heads)}
        if self.channels:
            changes["intermediate_size"] = len(next(iter(self.channels.values())))
        if self.tokens is not None:
            changes["vocab_size"] = len(self.tokens)
        return dataclasses.replace(config, **changes)  # type: ignore[arg-type]

    def renamed(self, name: str) -> str | None:
        """The new name of a weight or module with this canonical name; None if its layer is removed."""
        layer = layer_of(name)
        if layer is None:
            return name
        return renumbered(name, self.layers.index(layer)) if layer in self.layers else None

    def rows(self, name: str, config: DecoderConfig) -> Tensor | None:
        """The rows that are kept of the weight or bias of a module (canonical name, of the original); None: all."""
        layer, part = layer_of(name), name.rpartition(".")[2]
        if name in (EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")):
            return None if self.tokens is None else torch.tensor(self.tokens)
        if layer is None:
            return None
        if layer in self.kv_heads and part in ("q_proj", "k_proj", "v_proj"):
            return self._head_rows(layer, config, config.num_heads // config.num_kv_heads if part == "q_proj" else 1)
        if layer in self.channels and part in ("gate_proj", "up_proj"):
            return torch.tensor(self.channels[layer])
        return None

    def columns(self, name: str, config: DecoderConfig) -> Tensor | None:
        """As `rows`, of a weight's columns."""
        layer, part = layer_of(name), name.rpartition(".")[2]
        if layer is None:
            return None
        if layer in self.kv_heads and part == "o_proj":
            return self._head_rows(layer, config, config.num_heads // config.num_kv_heads)
        if layer in self.channels and part == "down_proj":
            return torch.tensor(self.channels[layer])
        return None

    def _head_rows(self, layer: int, config: DecoderConfig, group: int) -> Tensor:
        """The rows of the kept heads, if each head of keys has `group` heads of this projection."""
        size = group * config.head_size
        return (torch.tensor(self.kv_heads[layer])[:, None] * size + torch.arange(size)).flatten()

    def sliced(self, name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
        """What is kept of a weight or bias with this canonical name."""
        module, _, kind = name.rpartition(".")
        rows, columns = self.rows(module, config), self.columns(module, config)
        if rows is not None:
            tensor = tensor[rows]
        return tensor[:, columns] if columns is not None and kind == "weight" else tensor


class PrunedWeights(Mapping[str, Tensor]):
    """The kept weights under their new canonical names, each read and cut when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], config: DecoderConfig, cut: Cut) -> None:
        self._weights, self._config, self._cut = weights, config, cut
        names = ((cut.renamed(name), name) for name in weights)
        self._old = {new: old for new, old in names if new is not None}

    def __getitem__(self, name: str) -> Tensor:
        old = self._old[name]
        return self._cut.sliced(old, self._weights[old], self._config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._old)

    def __len__(self) -> int:
        return len(self._old)

    def places(self, places: Places) -> dict[str, tuple[str, str]]:
        """`places` of the original, for the new names."""
        found = {}
        for new, old in self._old.items():
            stored, dtype = places[old]
            layer = layer_of(new)
            found[new] = (stored if layer is None else renumbered(stored, layer), dtype)
        return found
