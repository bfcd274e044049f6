"""Checkpoints that store the projections of one linear layer as one matrix: its rows, part by part. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.config import DecoderConfig
from ..model.families import FAMILIES


def split_rows(config: DecoderConfig, parts: Mapping[str, int], rows: Tensor) -> dict[str, Tensor]:
    """Part's name → its rows of `rows` [Σ parts, …]. `parts`: name → number of rows; q, k and v may stand head by head."""
    if _is_grouped(config, parts):
        heads = rows.reshape(*_shape(config), *rows.shape[1:])
        pieces = tuple(piece.flatten(0, 2) for piece in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:]))
    else:
        pieces = torch.split(rows, list(parts.values()))
    return dict(zip(parts, pieces, strict=True))


def join_rows(config: DecoderConfig, parts: Mapping[str, int], rows: Tensor) -> Tensor:
    """The rows [Σ parts, …], one part after the other, as the checkpoint stores them: the inverse of `split_rows`."""
    if not _is_grouped(config, parts):
        return rows
    heads, _, size = _shape(config)
    pieces = torch.split(rows, list(parts.values()))
    shaped = [piece.reshape(heads, -1, size, *piece.shape[1:]) for piece in pieces]
    return torch.cat(shaped, dim=1).flatten(0, 2)


def _is_grouped(config: DecoderConfig, parts: Mapping[str, int]) -> bool:
    return len(parts) == 3 and FAMILIES[config.family].grouped_qkv


def _shape(config: DecoderConfig) -> tuple[int, int, int]:
    """Heads of keys and values; queries of each, its key and its value; head size."""
    return config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_size
