"""What a bundle's members have of their own: a tail's weights, an adapter's (merged, or kept apart), or nothing."""

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
from ..runtime.model.config import DecoderConfig
from ..runtime.model.members import MemberKind
from .base_model import BaseModel

F32 = npt.NDArray[np.float32]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class MemberWeights:
    """What a member has of its own, under canonical names; everything else is the base's.

    `weights`: whole tensors. `adapters`: `<module>.lora_a` and `.lora_b`, for a member kept as an adapter.
    """

    name: str
    kind: MemberKind
    split_layer: int
    weights: Mapping[str, F32]
    provenance: Mapping[str, Any]
    adapters: Mapping[str, F32] = field(default_factory=dict)


def read_member(name: str, path: Path | None, kind: MemberKind, base: BaseModel, *, merge: bool) -> MemberWeights:
    """The member of `kind` in the directory `path`; None is the base itself. A low-rank update is kept apart, or with `merge`
    added to the base's weights: then it is a tail. Raises `InvalidEnsembleError` (the name), `BundleError` (damaged, another
    base), `NotFoundError`."""
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


def fuse_adapters(config: DecoderConfig, adapters: Mapping[str, F32], base: Mapping[str, F32]) -> dict[str, F32]:
    """Adapters of the layers as they are stored: A of q, k, v (gate, up) stacked, B in blocks; a part without an adapter has
    rows of zeros. `base` gives the parts' numbers of rows."""
    fused: dict[str, F32] = {}
    parents: dict[str, list[str]] = {}
    for module in adapted_modules(adapters):
        prefix, _, last = module.rpartition(".")
        names = (name for name, parts in FUSED.items() if last in parts)
        target = next(names, last)
        if target == "gate_up_proj" and config.activation != "swiglu":
            target = last
        parents.setdefault(f"{prefix}.{target}", []).append(module)
    for target, modules in parents.items():
        prefix, _, last = target.rpartition(".")
        parts = [f"{prefix}.{part}" for part in FUSED.get(last, (last,))]
        present = [part for part in parts if part in modules]
        ranks = {part: adapters[f"{part}.lora_a"].shape[0] for part in present}
        b = np.zeros((sum(len(base[f"{part}.weight"]) for part in parts), sum(ranks.values())), np.float32)
        row = column = 0
        for part in parts:
            rows = len(base[f"{part}.weight"])
            if part in ranks:
                b[row : row + rows, column : column + ranks[part]] = adapters[f"{part}.lora_b"]
                column += ranks[part]
            row += rows
        fused[f"{target}.lora_a"] = np.concatenate([adapters[f"{part}.lora_a"] for part in present])
        fused[f"{target}.lora_b"] = b
    return fused
