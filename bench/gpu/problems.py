"""Random operands for every GPU op, for benches and tests. It needs torch, not Triton."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from ...export.quantisation.groups import quantise
from ...kernels.oracle.operands import (
    ADAPTER_TILE,
    AdapterTiles,
    AdapterWeight,
    DecodeRows,
    Draw,
    LayerCache,
    LinearWeight,
    Mixture,
    PrefillChunks,
)
from ...runtime.backends.torch.weights import linear_weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normally distributed values, the same on every device, rounded to `dtype`."""
    return _drawn(*shape, seed=seed, scale=scale).to(dtype).to(DEVICE)


def _drawn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu") * scale


def integers(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


def weight(
    n: int,
    k: int,
    bits: int,
    *,
    group_size: int = 32,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    seed: int = 0,
) -> LinearWeight:
    """A random weight [n, k] as a bundle stores it; with 0 bits it is dense in `dtype`. It is quantised on the host: use small
    sizes."""
    values = _drawn(n, k, seed=seed, scale=k**-0.5)
    offset = normal(n, seed=seed + 1) if bias else None
    if bits == 0:
        return LinearWeight(values.to(dtype).to(DEVICE), bias=offset)
    quantised = quantise(values.numpy(), bits, group_size)
    found = linear_weight(quantised.values, quantised.scales, quantised.minima)
    scales = None if found.scales is None else found.scales.to(DEVICE)
    minima = None if found.minima is None else found.minima.to(DEVICE)
    return LinearWeight(found.values.to(DEVICE), scales, minima, offset)


def big_weight(n: int, k: int, bits: int, group_size: int = 32) -> LinearWeight:
    """A weight [n, k] of random bits, made on the device. It is for timing, which does not depend on values."""
    if bits == 0:
        return LinearWeight(torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * k**-0.5)
    values = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=DEVICE)
    step = 2.0 / k**0.5 / (127 if bits == 8 else 7.5)
    scales = torch.full((k // group_size, n), step, dtype=torch.float16, device=DEVICE)
    return LinearWeight(values, scales, None if bits == 8 else -7.5 * scales)


def cache(
    num_blocks: int,
    kv_heads: int,
    block_size: int,
    head_size: int,
    dtype: torch.dtype,
    *,
    fill: bool = True,
    seed: int = 0,
) -> LayerCache:
    """A cache [num_blocks, …] with random content. With `fill` false it is NaN (int8: 0), so that a read before a write shows."""
    shape = (num_blocks, kv_heads, block_size, head_size)
    scaled = dtype in (torch.int8, torch.float8_e4m3fn)
    tensors = []
    for index in range(2):
        if fill and dtype == torch.int8:
            tensors.append((normal(*shape, seed=seed + index) * 40).clamp(-127, 127).to(dtype))
        elif fill:
            tensors.append((normal(*shape, seed=seed + index) * (50 if scaled else 1)).to(dtype))
        else:
            tensors.append(torch.full(shape, 0 if dtype == torch.int8 else float("nan"), device=DEVICE).to(dtype))
    scales = [normal(*shape[:3], seed=seed + 2 + i).abs() * 0.02 + 0.01 for i in range(2)] if scaled else [None, None]
    return LayerCache(tensors[0], tensors[1], scales[0], scales[1])


def tables(count: int, max_blocks: int, num_blocks: int, seed: int = 0) -> torch.Tensor:
    """Block tables [count, max_blocks] of blocks in random order. Blocks repeat only if there are too few."""
    order = np.random.default_rng(seed).permutation(num_blocks)
    return torch.from_numpy(np.resize(order, (count, max_blocks)).astype(np.int32)).to(DEVICE)


def decode_rows(lengths: Sequence[int], block_tables: torch.Tensor, max_length: int) -> DecodeRows:
    """One row per block table, in order."""
    index = integers(range(len(lengths)))
    return DecodeRows(index, index.clone(), integers(lengths), block_tables, max_length)


def chunks(sizes: Sequence[int], lengths: Sequence[int], block_tables: torch.Tensor) -> PrefillChunks:
    """Chunks one after the other, one per block table."""
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    seqs = integers(range(len(sizes)))
    return PrefillChunks(
        integers(starts), integers(sizes), integers(lengths), seqs, block_tables, max(sizes, default=0)
    )


def adapter_tiles(adapters: Sequence[int]) -> AdapterTiles:
    """Tiles for rows 0, 1, …, whose adapters these are; -1: no adapter."""
    order: list[int] = []
    tiles: list[int] = []
    for adapter in sorted(set(adapters) - {-1}):
        rows = [row for row, found in enumerate(adapters) if found == adapter]
        for start in range(0, len(rows), ADAPTER_TILE):
            part = rows[start : start + ADAPTER_TILE]
            order += part + [-1] * (ADAPTER_TILE - len(part))
            tiles.append(adapter)
    return AdapterTiles(integers(order), integers(tiles))


def adapter_weight(
    count: int, rank: int, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> AdapterWeight:
    a = normal(count, rank, k, seed=seed, scale=k**-0.5).to(dtype)
    return AdapterWeight(a, normal(count, n, rank, seed=seed + 1, scale=rank**-0.5).to(dtype))


def mixture(members: Sequence[int], *, probs: bool = False, seed: int = 0) -> Mixture:
    """A mix in which request b has `members[b]` rows, with random coefficients that sum to 1."""
    rng = np.random.default_rng(seed)
    coefficients = np.concatenate([rng.dirichlet(np.ones(count)) for count in members]).astype(np.float32)
    starts = integers(np.cumsum([0, *members]).tolist())
    flags = integers([int(probs)] * len(members))
    rows = integers(range(sum(members)))
    return Mixture(starts, rows, torch.from_numpy(coefficients).to(DEVICE), flags, any_probs=probs)


def draw(
    count: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> Draw:
    """`count` requests with the same parameters, and random seeds and positions."""
    rng = np.random.default_rng(seed)

    def full(value: float) -> torch.Tensor:
        return torch.full((count,), value, device=DEVICE)

    return Draw(
        temperature=full(temperature),
        top_k=integers([top_k] * count),
        top_p=full(top_p),
        min_p=full(min_p),
        seeds=torch.from_numpy(rng.integers(0, 2**63, count, dtype=np.int64) * 2 + 1).to(DEVICE),
        positions=integers(rng.integers(0, 4000, count).tolist()),
        any_cut=bool(top_k) or top_p < 1 or min_p > 0,
    )
