"""What a bundle's members have of their own: a tail's weights, an adapter's (merged, or kept apart), or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.checkpoints.members.adapter import adapted_modules, check_shapes, merge, read_adapter
from ..runtime.checkpoints.members.tail import read_tail
from ..runtime.errors import BundleError, InvalidEnsembleError
from ..runtime.model.config import DecoderConfig
from ..runtime.model.layout import Layout

F32 = npt.NDArray[np.float32]
Kind = Literal["base", "tail", "adapter"]
BASE = "base"


@dataclass(frozen=True, slots=True)
class MemberWeights:
    """What a member has of its own, under canonical names; everything else is the base's.

    `weights`: whole tensors. `adapters`: `<module>.lora_a` and `.lora_b`, for a member kept as an adapter.
    """

    name: str
    kind: Kind
    split_layer: int
    weights: Mapping[str, F32]
    provenance: Mapping[str, Any]
    adapters: Mapping[str, F32] = field(default_factory=dict)


def read_member(
    name: str,
    path: Path | None,
    base_digest: str,
    config: DecoderConfig,
    base: Mapping[str, torch.Tensor],
    *,
    adapter: Literal["merge", "keep"] | None = None,
) -> MemberWeights:
    """`path`: a tail, or with `adapter` an adapter to be merged into the base's weights or kept beside them; None is the
    base itself. Raises `InvalidEnsembleError` (the name), `BundleError` (damaged, another base), `NotFoundError`."""
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise InvalidEnsembleError(f"a member's name has letters, digits, '-', '_' and '.', got '{name}'")
    if path is None:
        return MemberWeights(name, "base", config.num_layers, {}, {"kind": BASE})
    manifest, weights = read_adapter(path) if adapter else read_tail(path)
    if manifest["base"]["digest"] != base_digest:
        raise BundleError(
            f"the tail or adapter '{path}' was trained on a base with digest {manifest['base']['digest'][:12]}…, "
            f"this model has {base_digest[:12]}…; export it with the base that it was trained on"
        )
    if adapter == "keep":
        check_shapes(weights, base)
        return MemberWeights(name, "adapter", config.num_layers, {}, manifest, _arrays(weights))
    if adapter == "merge":
        weights = merge(base, weights)
        first = min((int(n.split(".")[2]) for n in weights), default=config.num_layers)
        return MemberWeights(name, "tail", first, _arrays(weights), manifest)
    return MemberWeights(name, "tail", int(manifest["split_layer"]), _arrays(weights), manifest)


def _arrays(weights: Mapping[str, torch.Tensor]) -> dict[str, F32]:
    return {n: np.asarray(tensor.numpy(), dtype=np.float32) for n, tensor in weights.items()}


def fuse_adapters(layout: Layout, adapters: Mapping[str, F32]) -> dict[str, F32]:
    """Adapters of the linear layers as they are stored: A of their parts stacked, B in blocks; a part without an adapter
    has rows of zeros. Raises `BundleError` for an adapter of what is no linear layer's part."""
    left = set(adapted_modules(adapters))
    fused: dict[str, F32] = {}
    for linear in layout.linears:
        present = [part.name for part in linear.parts if part.name in left]
        if not present:
            continue
        left -= set(present)
        ranks = {name: len(adapters[f"{name}.lora_a"]) for name in present}
        b = np.zeros((linear.rows, sum(ranks.values())), np.float32)
        row = column = 0
        for part in linear.parts:
            if part.name in ranks:
                rank = ranks[part.name]
                b[row : row + part.rows, column : column + rank] = adapters[f"{part.name}.lora_b"]
                column += rank
            row += part.rows
        fused[f"{linear.name}.lora_a"] = np.concatenate([adapters[f"{name}.lora_a"] for name in present])
        fused[f"{linear.name}.lora_b"] = b
    if left:
        raise BundleError(f"an adapter may change {layout.targets} of a layer, this one changes {sorted(left)[:4]}")
    return fused
