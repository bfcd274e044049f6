"""Scales and minima of 4-bit groups that cost least: a search over ranges, with a fit by least squares for each.

Rounding to nearest takes a group's whole range. A smaller step with a few clipped weights often costs less, and some columns
matter more than others. For each of some ranges the weights are rounded, then scale and minimum are fitted to the rounded
values by weighted least squares; the best pair is kept. After llama.cpp's K-quants, whose weights are an importance matrix;
here they are the mean squares of the input channels.
"""

from __future__ import annotations

import torch

from .groups import nonzero, rounded

Tensor = torch.Tensor

_RANGES = 10  # that are tried
_AT_ONCE = 2**22  # weights that are searched together


def search(weight: Tensor, importance: Tensor, group_size: int, ranges: int = _RANGES) -> tuple[Tensor, Tensor]:
    """Scales and minima [N, groups] of the weight [N, K], in float32 but rounded as they are stored. `importance` [K]: what
    the square of an error costs in each column."""
    rows = max(1, _AT_ONCE // weight.shape[1])
    found = [_search(part, importance, group_size, ranges) for part in torch.split(weight, rows)]
    scales, minima = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    stored, stored_minima = rounded(nonzero(scales), minima)
    assert stored_minima is not None
    return torch.from_numpy(stored).float(), torch.from_numpy(stored_minima).float()


def _search(weight: Tensor, importance: Tensor, group_size: int, ranges: int) -> tuple[Tensor, Tensor]:
    groups = weight.reshape(len(weight), -1, group_size)  # [N, groups, group_size]
    cost = importance.reshape(-1, group_size).double()
    mean = cost.mean(-1, keepdim=True)
    cost = torch.where(mean > 0, cost / mean, 1.0).float() + 1e-3  # a column that the text does not use counts a little
    total = cost.sum(-1)
    mean = (groups * cost).sum(-1) / total
    centred = (groups - mean[..., None]) * cost
    low, high = groups.amin(-1), groups.amax(-1)
    width = torch.where(
        high > low, high - low, torch.ones_like(low)
    )  # of a group without any spread each scale is right
    best_scale, best_minimum, most = width / 15, low, torch.full_like(low, float("-inf"))
    for step in range(ranges):
        inverse = (15 + (step - ranges // 4) * 4 / ranges) / width  # ranges of 0.9 to 1.3 times 15 steps
        values = ((groups - low[..., None]) * inverse[..., None]).round_().clamp_(0, 15)
        centre = (values * cost).sum(-1) / total
        values -= centre[..., None]
        variance, covariance = (values.square() * cost).sum(-1), (values * centred).sum(-1)
        explained = covariance.square() / variance.clamp(min=1e-30)  # of the weights' spread, by the fit
        better = (explained > most) & (covariance > 0)
        most = torch.where(better, explained, most)
        scale = covariance / variance.clamp(min=1e-30)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, mean - scale * centre, best_minimum)
    return torch.where(high > low, best_scale, torch.zeros_like(low)), best_minimum
