"""`run_experts`: the MLPs of a mixture of experts, each over the rows that chose it.

Only the few-rows path of the matmul is used, at most 64 rows at once, so that a row has the same result whatever else is in the
batch: how many other rows chose its experts changes nothing. The host reads which expert has how many rows, once a layer, so
these layers cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from types import ModuleType

import torch

from ...model.config import DecoderConfig
from .weights import LayerWeights

Tensor = torch.Tensor

ROWS = 64  # of one matmul: as many as its few-rows path takes


def run_experts(ops: ModuleType, layer: LayerWeights, x: Tensor, config: DecoderConfig, dtype: torch.dtype) -> Tensor:
    """x [rows, H] in `dtype` → Σ share · expert(x) over each row's experts, [1, rows, H] float32, added in ascending order of
    the experts. The shares are the router's probabilities, of the chosen ones made to sum to 1 if the model says so."""
    assert layer.router is not None
    logits = torch.cat([ops.matmul(piece, layer.router).float().sum(0) for piece in torch.split(x, ROWS)])
    shares, chosen = logits.softmax(-1).topk(config.experts_per_token, dim=-1)
    if config.normalises_experts:
        shares = shares / shares.sum(-1, keepdim=True)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, places in _pieces(chosen, len(layer.mlps)):
        rows, mlp = places // config.experts_per_token, layer.mlps[expert]
        parts = ops.matmul(x.index_select(0, rows), mlp.up.weight)
        inner = ops.activate(parts, mlp.activation, dtype)
        result = ops.matmul(inner, mlp.down.weight).float().sum(0)
        total.index_add_(0, rows, result * shares.flatten().index_select(0, places)[:, None])
    return total[None]


def _pieces(chosen: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """chosen [rows, k] → (expert, places in chosen.flatten() of at most 64 rows that chose it), experts ascending."""
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        for first in range(end - count, end, ROWS):
            yield expert, order[first : min(first + ROWS, end)]
