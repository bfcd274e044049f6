"""Rotary position embedding tables, from `DecoderConfig` (Su et al. 2021; llama3 and linear frequency scaling)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedModelError
from .config import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> npt.NDArray[np.float64]:
    """[head_size / 2], in radians per position. Raises `UnsupportedModelError` for an unknown scaling."""
    exponents = np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return np.asarray(frequencies / scaling["factor"])
    if kind != "llama3":
        raise UnsupportedModelError(f"rope scaling '{kind}' is not supported; known are 'linear' and 'llama3'")
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return np.asarray((1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies)


def rotary_tables(config: DecoderConfig) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines, each [max_position_embeddings, head_size / 2]."""
    angles = np.outer(np.arange(config.max_position_embeddings), inverse_frequencies(config))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
