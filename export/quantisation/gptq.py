"""GPTQ: columns are rounded one after the other, and each error is made up for by the columns that follow.

After Frantar et al. 2022, with scales and minima that are fixed before (`search`) and columns in the order of their
importance, the largest first. A group's columns stay where they are.
"""

from __future__ import annotations

import torch

from ...runtime.errors import ConfigError

Tensor = torch.Tensor

_BLOCK = 64  # columns whose errors are passed on to the others together
_AT_ONCE = 2**24  # weights that are worked on together
_DAMPING = (0.01, 0.1, 1.0)  # of the mean of H's diagonal, added to it; the first with which H can be inverted


def gptq(weight: Tensor, moments: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Values [N, K] in 0…15 for weight [N, K] with groups of scales and minima [N, groups], which make Σₙ (D H Dᵀ)ₙₙ small: D is
    the change of the weight, H `moments` [K, K]."""
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(moments[order][:, order])
    rows = max(1, _AT_ONCE // weight.shape[1])
    parts = zip(*(torch.split(tensor, rows) for tensor in (weight, scales, minima)), strict=True)
    return torch.cat([_rows(part, factor, order, s.t().contiguous(), m.t().contiguous()) for part, s, m in parts])


def _rows(weight: Tensor, factor: Tensor, order: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """`gptq` of some rows; scales and minima are [groups, rows] here, and so is what is worked on: [columns, rows]."""
    rest = weight.t()[order]
    values, groups = torch.empty_like(rest), (order // (len(order) // len(scales))).tolist()
    for first in range(0, len(rest), _BLOCK):
        last = min(first + _BLOCK, len(rest))
        errors = torch.empty(last - first, len(weight))
        for column in range(first, last):
            scale, minimum = scales[groups[column]], minima[groups[column]]
            value = ((rest[column] - minimum) / scale).round_().clamp_(0, 15)
            error = (rest[column] - (value * scale + minimum)) / factor[column, column]
            rest[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
            values[column], errors[column - first] = value, error
        rest[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    return values[order.argsort()].t()


def _inverse_factor(moments: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = H⁻¹ of the damped H. Its row j holds what column j's error does to those after it."""
    mean = float(moments.diagonal().mean())
    if not mean > 0:
        return torch.eye(len(moments))  # no input is ever seen: nothing to make up for
    for damping in _DAMPING:
        damped = moments.double() + torch.eye(len(moments), dtype=torch.float64) * damping * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                factor: Tensor = upper.float()
                return factor
    raise ConfigError("the moments of the calibration text cannot be inverted; give other text")
