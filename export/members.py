"""What a bundle's members have of their own: the weights of a tail, an adapter (merged or separate), or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.checkpoints.members.adapter import adapted_modules, fit, is_separable
from ..runtime.checkpoints.members.files import check_base, first_layer
from ..runtime.checkpoints.members.peft_format import stack
from ..runtime.checkpoints.members.registry import format_of
from ..runtime.errors import BundleError, ConfigError, InvalidEnsembleError
from ..runtime.model.layout import Layout
from ..runtime.model.members import MemberKind
from .base_model import BaseModel

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MemberWeights:
    """What a member has of its own, under canonical names; everything else is the base's.

    `split_layer`: the first layer of which it has weights or updates, the number of layers if there is none. `weights`:
    whole tensors. `adapters`: `<module>.lora_a` and `.lora_b` of an adapter that is not merged.
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
    or of another base), `ConfigError` (of another kind, or it has to be merged), `NotFoundError`,
    `UnsupportedModelError`."""
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise InvalidEnsembleError(f"a member's name has letters, digits, '-', '_' and '.', got '{name}'")
    num_layers = base.config.num_layers
    if path is None:
        return MemberWeights(name, MemberKind.BASE, num_layers, {}, {"kind": MemberKind.BASE})
    form = format_of(path, kind)
    manifest, weights = form.read(path, base.config)
    check_base(path, manifest, base.digest)
    if not kind.own_layers and not merge:
        weights = fit(base.weights, weights)
        if not is_separable(weights):
            others = sorted(n for n in weights if not n.endswith((".lora_a", ".lora_b")) or n.startswith("lm_head."))
            raise ConfigError(
                f"the adapter '{path}' changes more than low-rank updates of the layers' projections can: {others[:3]}; "
                "export it with --merge"
            )
        return MemberWeights(name, kind, first_layer(weights, num_layers), {}, manifest, _arrays(weights))
    own = form.merged(base.weights, weights)
    return MemberWeights(name, MemberKind.TAIL, first_layer(own, num_layers), _arrays(own), manifest)


def _arrays(weights: Mapping[str, torch.Tensor]) -> dict[str, F32]:
    return {n: np.asarray(tensor.numpy(), dtype=np.float32) for n, tensor in weights.items()}


def fuse_adapters(layout: Layout, adapters: Mapping[str, F32]) -> dict[str, F32]:
    """Adapters of fused linear layers from those of their parts (see `stack`). Raises `BundleError` if an adapter is for
    a module that is not such a part."""
    left = set(adapted_modules(adapters))
    fused: dict[str, F32] = {}
    for linear in layout.adaptable:
        present = {part.name for part in linear.parts} & left
        if present:
            left -= present
            fused[f"{linear.name}.lora_a"], fused[f"{linear.name}.lora_b"] = stack(linear.parts, adapters)
    if left:
        raise BundleError(f"an adapter may change {layout.targets} of a layer, this one changes {sorted(left)[:4]}")
    return fused
