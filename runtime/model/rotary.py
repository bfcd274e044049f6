"""Rotary position embedding tables, from `DecoderConfig` (Su et al. 2021).

Scalings: linear, llama3, yarn (Peng et al. 2023) and longrope (Ding et al. 2024; the factors of short texts, so the context is
that of the pre-training).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedModelError
from .config import DecoderConfig
from .layout import ROTARY, WINDOW_ROTARY

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
SCALINGS = ("linear", "llama3", "longrope", "yarn")
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # yarn: rotations in the original context, above which and below which


def inverse_frequencies(config: DecoderConfig) -> F64:
    """[rotary size / 2], in radians per position. Raises `UnsupportedModelError` for an unknown scaling."""
    frequencies = _frequencies(config, config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    match scaling.get("rope_type", scaling.get("type")):
        case "linear":
            return np.asarray(frequencies / scaling["factor"])
        case "llama3":
            return _llama3(frequencies, scaling)
        case "yarn":
            return _yarn(frequencies, scaling, config)
        case "longrope":
            factors = np.array(scaling["short_factor"], np.float64)
            if factors.shape != frequencies.shape:
                raise UnsupportedModelError(
                    f"rope scaling 'longrope' has {len(factors)} short factors; {len(frequencies)} channels rotate"
                )
            return np.asarray(frequencies / factors)
        case kind:
            raise UnsupportedModelError(f"rope scaling '{kind}' is not supported; known are {SCALINGS}")


def attention_factor(config: DecoderConfig) -> float:
    """What cosines and sines are multiplied with, so that scores of long texts keep their size."""
    scaling = config.rope_scaling or {}
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return 1.0
    factor, scale, scale_all = (scaling.get(name) for name in ("factor", "mscale", "mscale_all_dim"))
    assert factor is not None, "families check it"
    if scale and scale_all:
        return _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all)
    return _yarn_scale(factor, 1.0)


def rotary_tables(config: DecoderConfig, positions: int | None = None) -> dict[str, F32]:
    """Cosines and sines by their names in a bundle, each [positions, rotary size / 2]; those of layers with a window only if
    they differ. `positions`: the first ones; None: all, max_position_embeddings."""
    count = config.max_position_embeddings if positions is None else positions
    frequencies, factor = inverse_frequencies(config), attention_factor(config)
    tables = dict(zip(ROTARY, _tables(count, frequencies, factor), strict=True))
    if config.window_rope_theta is not None:
        own = _tables(count, _frequencies(config, config.window_rope_theta), 1.0)
        tables |= dict(zip(WINDOW_ROTARY, own, strict=True))
    return tables


def _tables(count: int, frequencies: F64, factor: float) -> tuple[F32, F32]:
    angles = np.outer(np.arange(count), frequencies)
    return (factor * np.cos(angles)).astype(np.float32), (factor * np.sin(angles)).astype(np.float32)


def _frequencies(config: DecoderConfig, theta: float) -> F64:
    size = config.rotary_size or config.head_size
    return np.asarray(theta ** -(np.arange(0, size, 2, dtype=np.float64) / size))


def _llama3(frequencies: F64, scaling: Mapping[str, Any]) -> F64:
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return np.asarray((1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies)


def _yarn(frequencies: F64, scaling: Mapping[str, Any], config: DecoderConfig) -> F64:
    """Channels that turn often keep their frequency, those that turn seldom are slowed down, between them it is blended."""
    size, original = 2 * len(frequencies), scaling["original_max_position_embeddings"]

    def channel(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = channel(scaling.get("beta_fast") or _BETA_FAST)
    high = channel(scaling.get("beta_slow") or _BETA_SLOW)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    slowed = np.clip((np.arange(len(frequencies)) - low) / (high - low or 0.001), 0, 1)
    return np.asarray(frequencies * ((1 - slowed) + slowed / scaling["factor"]))


def _yarn_scale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
