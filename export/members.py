"""What a bundle's members have of their own: the weights of a tail, an adapter (merged or separate), or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.checkpoints.members.adapter import adapted_modules, check_shapes
from ..runtime.checkpoints.members.files import first_layer
from ..runtime.checkpoints.members.registry import FORMATS
from ..runtime.errors import BundleError, InvalidEnsembleError
from ..runtime.model.layout import Layout
from ..runtime.model.members import MemberKind
from .base_model import BaseModel

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MemberWeights:
    """What a member has of its own, under canonical names; everything else is the base's.

    `split_layer`: the first layer of which it has weights, the number of layers if there is none. `weights`: whole
    tensors. `adapters`: `<module>.lora_a` and `.lora_b` of an adapter that is not merged.
    """

    name: str
    kind: MemberKind
    split_layer: int
    weights: Mapping[str, F32]
    provenance: Mapping[str, Any]
    adapters: Mapping[str, F32] = field(default_factory=dict)


def read_member(name: str, path: Path | None, kind: MemberKind, base: BaseModel, *, merge: bool) -> MemberWeights:
    """Read the member of `kind` from the directory `path`; None is the base itself. With `merge`, an adapter is added
    to the base's weights, and the member is a tail. Raises `InvalidEnsembleError` (the name), `BundleError` (damaged,
    or of another base), `NotFoundError`."""
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise InvalidEnsembleError(f"a member's name has letters, digits, '-', '_' and '.', got '{name}'")
    num_layers = base.config.num_layers
    if path is None:
        return MemberWeights(name, MemberKind.BASE, num_layers, {}, {"kind": MemberKind.BASE})
    form = FORMATS[kind]
    manifest, weights = form.read(path)
    if manifest["base"]["digest"] != base.digest:
        raise BundleError(
            f"the {kind} '{path}' was trained on a base with digest {manifest['base']['digest'][:12]}…, "
            f"this model has {base.digest[:12]}…; export it with the base that it was trained on"
        )
    if kind.own_sequence and not merge:
        check_shapes(weights, base.weights)
        return MemberWeights(name, kind, num_layers, {}, manifest, _arrays(weights))
    own = form.merged(base.weights, weights)
    return MemberWeights(name, MemberKind.TAIL, first_layer(own, num_layers), _arrays(own), manifest)


def _arrays(weights: Mapping[str, torch.Tensor]) -> dict[str, F32]:
    return {n: np.asarray(tensor.numpy(), dtype=np.float32) for n, tensor in weights.items()}


def fuse_adapters(layout: Layout, adapters: Mapping[str, F32]) -> dict[str, F32]:
    """Adapters of fused linear layers from those of their parts: the A are stacked, the B are blocks of a larger B. A
    part without an adapter has rows of zeros in B. Raises `BundleError` if an adapter is for a module that is not
    such a part."""
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
