"""Masks: weights that are set to zero where they stand. They make a matrix no smaller, so no kernel of ours is faster for them;
`motet bench prune` reports what they would cost."""

from __future__ import annotations

import torch


def masked(weight: torch.Tensor, rms: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """`weight` [rows, columns] with, in each `of` neighbouring columns of a row, only the `kept` largest |w| · rms; the first of
    those that are equal. `rms` [columns]: root mean square of each input (Wanda, Sun et al. 2024); ones: the largest weights."""
    rows, columns = weight.shape
    assert 0 < kept <= of and columns % of == 0
    scores = (weight.abs() * rms).reshape(rows, columns // of, of)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    return torch.where(mask.reshape(rows, columns), weight, 0.0)
