"""How far apart two arrays are, on the scale of what they hold."""

from __future__ import annotations

import numpy as np


def relative_error(found, expected) -> float:
    """The largest difference, in units of the standard deviation of `expected`; tensors or arrays of one shape.

    A limit on it holds on every CPU if `expected` was computed in float64: rounding is about 1e-6 whichever kernels and
    however many threads computed `found` in float32, and a mistake is far larger."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())
