"""Small or random towers of encoders, as their files are."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_efficientnet(path: Path, seed: int = 0) -> dict[str, object]:
    """A random EfficientNet-Lite0 as torch pickles it, under the names of its first port; what it holds. Activations neither
    vanish nor saturate."""
    import torch
    from motet.runtime.model.encoders.efficientnet import blocks

    random = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for one in (one for block in blocks() for one in block.convolutions):
        stem = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
        block, _, part = one.name.rpartition(".")
        norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
        convolution, norm = stem.get(one.name) or (f"_{block}._{part}_conv", f"_{block}.{norms[part]}")
        inputs = one.channels // one.groups * one.kernel**2
        shape = (one.out, one.channels // one.groups, one.kernel, one.kernel)
        state[f"{convolution}.weight"] = torch.randn(shape, generator=random) * (2 / inputs) ** 0.5
        state[f"{norm}.weight"] = 1 + 0.1 * torch.randn(one.out, generator=random)
        state[f"{norm}.bias"] = 0.3 * torch.randn(one.out, generator=random)
        state[f"{norm}.running_mean"] = 0.1 * torch.randn(one.out, generator=random)
        state[f"{norm}.running_var"] = 1 + torch.rand(one.out, generator=random)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    state["_fc.weight"], state["_fc.bias"] = torch.zeros(10, 1280), torch.zeros(10)
    torch.save(state, path)
    return state


_TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def ctranslate2_bytes(
    variables: Mapping[str, np.ndarray],
    aliases: Mapping[str, str],
    *,
    specification: str = "WhisperSpec",
    version: int = 6,
) -> bytes:
    """A model.bin of CTranslate2, as `model_spec.py` of that project writes it."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    content = struct.pack("<I", version) + text(specification) + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        shape = b"".join(struct.pack("<I", size) for size in value.shape)
        content += text(name) + struct.pack("<B", value.ndim) + shape
        content += struct.pack("<BI", _TYPES[str(value.dtype)], value.nbytes) + value.tobytes()
    content += struct.pack("<I", len(aliases))
    return content + b"".join(text(alias) + text(name) for alias, name in aliases.items())
