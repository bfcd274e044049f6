"""The tensors of a bundle: a model's weights and its members', fused, equalised and quantised, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.model.layout import EMBEDDING, ROTARY, WINDOW_ROTARY, Layout
from ..runtime.model.rotary import rotary_tables
from ..runtime.model.stored import own_name
from .members import MemberWeights, fuse_adapters
from .quantisation.equalise import equalise
from .quantisation.groups import Quantised
from .quantisation.quantiser import Quantiser
from .tensor_file import TensorFile

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Part:
    """A layer, or what is in no layer: the names of its weights, and what members have of it. `layout` has that layer alone."""

    layout: Layout
    names: list[str]
    members: list[MemberWeights]


def parts_of(layout: Layout, names: Iterable[str], members: list[MemberWeights]) -> list[Part]:
    """What is in no layer first, each weight alone: there is least beside the embedding and the head then."""
    prefixes = [f"model.layers.{index}." for index in range(len(layout.layers))]

    def chosen(tensors: Iterable[str], prefix: str) -> list[str]:
        return [name for name in tensors if name.startswith(prefix)]

    parts = []
    others = dict.fromkeys(name for name in names if not name.startswith("model.layers."))
    for prefix, layer in zip((*others, *prefixes), (*[None] * len(others), *layout.layers), strict=True):
        own = [
            replace(
                member,
                weights={name: member.weights[name] for name in chosen(member.weights, prefix)},
                adapters={name: member.adapters[name] for name in chosen(member.adapters, prefix)},
            )
            for member in members
        ]
        layers = () if layer is None else (layer,)
        parts.append(Part(replace(layout, layers=layers), chosen(names, prefix), own))
    return parts


_KINDS = {4: (".values", ".scales", ".minima"), 8: (".values", ".scales"), 32: ("",)}


def _stored_names(part: Part, quantiser: Quantiser) -> Iterator[str]:
    """Names of at least the tensors of the part that are stored. A header has no room for many that are not."""
    changed = {name.rpartition(".")[0] for member in part.members for name in (*member.weights, *member.adapters)}
    fused = {name for linear in part.layout.linears for name in (linear.name, *(p.name for p in linear.parts))}
    others = [name for name in part.names if name.rpartition(".")[0] not in fused]
    for linear in part.layout.linears:
        is_changed = any(p.name in changed for p in linear.parts)
        kinds = _KINDS[quantiser.bits(f"{linear.name}.weight")]
        yield from [f"{linear.name}.weight{kind}" for kind in kinds] + [f"{linear.name}.bias"] * linear.bias
        for member in part.members if is_changed else ():
            own = _KINDS[max(quantiser.bits(f"{linear.name}.weight"), 8)]
            yield from (own_name(member.name, f"{linear.name}.weight{kind}") for kind in own)
            yield from (own_name(member.name, f"{linear.name}.{half}") for half in ("bias", "lora_a", "lora_b"))
    for name in others:
        yield from (name, *(f"{name}{kind}" for kind in _KINDS[quantiser.bits(name)]))
        if name.rpartition(".")[0] in changed:
            for kind in ("", ".values", ".scales"):
                yield from (own_name(member.name, f"{name}{kind}") for member in part.members)
    if EMBEDDING in part.names:
        yield from (*ROTARY, *WINDOW_ROTARY)


def write_weights(
    path: Path,
    parts: list[Part],
    weights: Mapping[str, torch.Tensor],
    quantiser: Quantiser,
    on_part: Callable[[], None] = lambda: None,
) -> None:
    """Write the weights file. `on_part` is called for each part."""
    names = (name for part in parts for name in _stored_names(part, quantiser))
    with TensorFile(path, names, {"format": "motet"}) as stored:
        for part in parts:
            own = {n: np.asarray(weights[n].numpy(), dtype=np.float32) for n in part.names}
            for tensor, values in _bundle_tensors(part, own, quantiser).items():
                stored.add(tensor, values)
            on_part()


def _bundle_tensors(part: Part, base: Mapping[str, F32], quantiser: Quantiser) -> dict[str, Array]:
    """The stored tensors of a part. A single member replaces the base's weights; several members, and adapters, have
    tensors named `members.<name>.…`.

    Weights that fine-tuning changed keep at least 8 bits: the changes are smaller than a step of a 4-bit grid, so
    rounding would undo them.
    """
    tensors: dict[str, Array] = {}
    layout, members = part.layout, part.members
    if layout.config.positions == "rotary" and EMBEDDING in part.names:
        tensors |= rotary_tables(layout.config)
    fused = [{part.name for part in linear.parts} for linear in layout.linears]
    fused_with = {part: parts for parts in fused for part in parts}

    def add(member: str | None, weights: Mapping[str, F32], *, own: bool = True) -> None:
        for name, weight in weights.items():
            stored = name if member is None else own_name(member, name)
            if quantiser.bits(name) == 32:
                tensors[stored] = np.ascontiguousarray(weight)
            else:
                quantise_weight = quantiser.of_member if own else quantiser
                _add_quantised(tensors, stored, quantise_weight(name, weight))

    def prepare(weights: Mapping[str, F32]) -> dict[str, F32]:
        return _fuse(layout, equalise(layout, weights, quantiser.scales))

    shared = prepare(base)
    for member in members:
        changed = {n.rpartition(".")[0] for n, w in member.weights.items() if not np.array_equal(w, base[n])}
        together = {part for module in changed for part in fused_with.get(module, {module})}
        own = prepare({n: w for n, w in {**base, **member.weights}.items() if n.rpartition(".")[0] in together})
        if len(members) == 1:
            shared = {n: w for n, w in shared.items() if n not in own}
            add(None, own)
        else:
            add(member.name, own)
        add(member.name, fuse_adapters(layout, equalise(layout, member.adapters, quantiser.scales)))
    add(None, shared, own=False)
    return tensors


def _fuse(layout: Layout, weights: Mapping[str, F32]) -> dict[str, F32]:
    """Replace the parts of each linear layer by the fused layer: their rows, one part after the other. `weights` must
    hold all parts of a layer or none."""
    fused = dict(weights)
    for linear in layout.linears:
        for kind in ("weight", "bias") if linear.bias else ("weight",):
            names = [f"{part.name}.{kind}" for part in linear.parts]
            if names[0] in fused:
                fused[f"{linear.name}.{kind}"] = np.concatenate([fused.pop(name) for name in names])
    return fused


def _add_quantised(tensors: dict[str, Array], name: str, found: Quantised) -> None:
    for kind in ("values", "scales", "minima"):
        if (array := getattr(found, kind)) is not None:
            tensors[f"{name}.{kind}"] = array
