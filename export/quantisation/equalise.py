"""Scaling input channels before quantisation. The function of the model is unchanged.

Channel j of a linear layer's input is divided by s_j, and column j of its weight multiplied by it. The division is folded
into the module that makes the input (`Linear.source`: a norm's weight, or the rows of the up projection).

With 8 bits, activations are what loses: they are rounded at run time per row and group, so a channel that is always large
makes its whole group coarse. s_j = sqrt(rms_j), normalised to a geometric mean of 1 within the group, so that only the
spread *inside* a group changes. After SmoothQuant (Xiao et al. 2023), with the same migration strength, 0.5.

With 4 bits, weights are what loses: the columns of large channels are made larger, so that their relative error becomes
smaller. s_j = rms_j^α, normalised over all channels; α is the one of a few with the least error. After AWQ (Lin et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ...runtime.model.layout import Layout

F32 = npt.NDArray[np.float32]


def smoothing(rms: F32, group_size: int) -> F32:
    """The scales [columns] for 8 bits of channels with these root mean squares."""
    groups = rms.astype(np.float64).reshape(-1, group_size)
    logs = 0.5 * np.log(np.maximum(groups, _floor(rms)))
    return np.asarray(np.exp(logs - logs.mean(axis=1, keepdims=True)).reshape(-1), dtype=np.float32)


def sharpening(rms: F32, alpha: float) -> F32:
    """The scales [columns] for 4 bits."""
    logs = alpha * np.log(np.maximum(rms.astype(np.float64), _floor(rms)))
    return np.asarray(np.exp(logs - logs.mean()), dtype=np.float32)


def _floor(rms: F32) -> float:
    """A channel that the text hardly uses is taken to be larger: other text may use it."""
    return max(float(rms.mean()) / 100, 1e-30)


def equalise(layout: Layout, weights: Mapping[str, F32], scales: Mapping[str, F32]) -> dict[str, F32]:
    """Equalised weights, which compute the same function. `scales`: name of a linear layer with a `source` → s [columns]. All
    members of a bundle must use the same.

    `weights` may hold an adapter's `<module>.lora_a` and `.lora_b`: A has the columns of the weight, B its rows.
    """
    result = dict(weights)
    for linear in layout.linears:
        if linear.name not in scales:
            continue
        own = scales[linear.name]
        for name in (f"{linear.source}.{kind}" for kind in ("weight", "bias", "lora_b")):
            if name in result:
                result[name] = result[name] / (own if result[name].ndim == 1 else own[:, None])
        for name in (f"{part.name}.{kind}" for part in linear.parts for kind in ("weight", "lora_a")):
            if name in result:
                result[name] = result[name] * own
    return result
