"""Writes a bundle from a base model and members: weights, fused and quantised, in one file, and graphs that point
into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.api.request import Ensemble, Member, Space
from ..runtime.checkpoints.overlay import Overlay
from ..runtime.errors import ConfigError, InvalidEnsembleError
from ..runtime.model.bundle import FORMAT, MANIFEST, WEIGHTS, Bundle
from ..runtime.model.config import DecoderConfig
from ..runtime.model.files import check_replaceable, file_digest, new_directory
from ..runtime.model.layout import EMBEDDING, HEAD, ROTARY, WINDOW_ROTARY, Layout, decoder_layout
from ..runtime.model.members import MemberKind
from ..runtime.model.rotary import rotary_tables
from ..runtime.model.stored import own_name, stored_tensors
from .base_model import BaseModel
from .calibrate import channel_rms, equalise
from .graph import GraphWriter, Slice, check_graphs
from .members import MemberWeights, fuse_adapters, read_member
from .parity import REPORT, HeldOut, check_chunks, measure_parity
from .quantise import HEAD_GROUP, check_group, layer_group, quantise
from .tensor_file import TensorFile

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_AT_ONCE = 2**22  # weights that are quantised together
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")


def export_bundle(
    model: BaseModel | Path,
    out: Path,
    *,
    tails: Mapping[str, Path | None] | None = None,
    loras: Mapping[str, Path] | None = None,
    merge: bool = False,
    mix: Mapping[str, float] | None = None,
    mix_chosen_by: Mapping[str, Any] | None = None,
    space: Space = Space.LOGITS,
    bits: int = 8,
    group_size: int | None = None,
    num_tail_layers: int | None = None,
    name: str | None = None,
    calibration: Sequence[Sequence[int]] = (),
    graphs: bool = True,
    held_out: HeldOut | None = None,
) -> Path:
    """Write a bundle to the directory `out`, which is replaced as a whole when the bundle is complete.

    `model`: the base, or its directory. `tails`: member name → tail directory, None for the base itself. `loras`:
    member name → adapter directory. Adapters are stored beside the base's weights, and their members run the base's
    layers from `split_layer` on with the updates; with `merge` they are added to the weights, and the member has these
    layers of its own. Without any member, the base is the only
    one. `mix`: member → coefficient; default: all equal. `mix_chosen_by`: on which data the mix was fitted, for the
    manifest. `bits`: 8, 4 (head and embedding keep 8) or 32 (not
    quantised). `group_size`: columns per group of the layers' weights; default: see `layer_group`. `num_tail_layers`:
    layers per tail; default: as many as the tails need. `calibration`: chunks of token ids on which an 8-bit bundle
    is equalised (see `calibrate`); empty: no equalisation. `graphs`: write ONNX graphs, which the onnx backend needs.
    `held_out`: text on which every member is measured before `out` is replaced. The report is a file of the bundle
    (see `read_parity`).

    Raises `ConfigError` (also for chunks that are longer than the model's context), `InvalidEnsembleError`, `BundleError`
    (a member of another base), `NotFoundError`, `UnsupportedModelError`, `UnavailableError` (the bundle cannot be
    measured here).
    """
    if bits not in (4, 8, 32):
        raise ConfigError(f"bits must be 4, 8 or 32, got {bits}")
    if merge and not loras:
        raise ConfigError("merge is for adapters, and none is given; leave it out, or give one")
    if group_size is not None and bits == 32:
        raise ConfigError("group_size is for 4 and 8 bits; leave it out with 32")
    check_replaceable(out, MANIFEST, "a bundle")  # fail early: before weights are read
    model = model if isinstance(model, BaseModel) else BaseModel(model)
    _check_sizes(model.config, bits, group_size, graphs)
    check_chunks(calibration, model.config, "calibration")
    check_chunks(held_out.chunks if held_out else (), model.config, "held-out")
    given: dict[MemberKind, Mapping[str, Path | None]] = {
        MemberKind.TAIL: tails or {},
        MemberKind.ADAPTER: {**(loras or {})},
    }
    members = _read_members(model, given, merge)
    config, weights = _own_head(model.config, model.weights, members)
    ensemble = _default_ensemble([member.name for member in members], mix, space)
    split_layer = _split_layer(config, members, num_tail_layers)
    rms = channel_rms(config, weights, calibration) if bits == 8 and calibration else {}
    with new_directory(out, MANIFEST, "a bundle") as work:
        _write_weights(work / WEIGHTS, _parts(decoder_layout(config), weights, members), weights, rms, bits, group_size)
        files = _write_graphs(config, members, split_layer, work) if graphs else None
        for file in COPIED:
            if (model.path / file).is_file():
                shutil.copyfile(model.path / file, work / file)
        by_name = {member.name: member.mix for member in ensemble.members}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": name or out.name,
            "config": config.to_dict(),
            "quantisation": {
                "bits": bits,
                "group_size": layer_group(bits, config.hidden_size, group_size),
                "head_bits": max(bits, 8),
                "head_group_size": HEAD_GROUP,
            },
            "split_layer": split_layer,
            "members": [
                {"name": m.name, "kind": m.kind, "mix": by_name[m.name], "provenance": dict(m.provenance)}
                for m in members
            ],
            "space": str(space),
            "graphs": files,
            "eos_token_ids": list(model.eos_token_ids),
            "provenance": {
                "base": model.path.name,
                "base_digest": model.digest,
                "mix_chosen_by": None if mix_chosen_by is None else dict(mix_chosen_by),
            },
            "files": {file.name: file_digest(file) for file in sorted(work.iterdir())},
        }
        _write_manifest(work, manifest)
        if held_out is not None:
            measure_parity(Bundle.load(work, verify=False), weights, members, held_out).write(work / REPORT)
            manifest["files"][REPORT] = file_digest(work / REPORT)
            _write_manifest(work, manifest)
    return out


def _write_manifest(work: Path, manifest: Mapping[str, Any]) -> None:
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _read_members(
    model: BaseModel, given: Mapping[MemberKind, Mapping[str, Path | None]], merge: bool
) -> list[MemberWeights]:
    names = [name for paths in given.values() for name in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidEnsembleError(f"members need names of their own; given twice: {twice}")
    if not names:
        return [read_member(str(MemberKind.BASE), None, MemberKind.BASE, model, merge=merge)]
    return [
        read_member(name, path, kind, model, merge=merge)
        for kind, paths in given.items()
        for name, path in paths.items()
    ]


def _own_head(
    config: DecoderConfig, base: Mapping[str, torch.Tensor], members: list[MemberWeights]
) -> tuple[DecoderConfig, Mapping[str, torch.Tensor]]:
    """Configuration and base weights, with the head untied from the embedding if a single member has trained it. Raises
    `InvalidEnsembleError` if one of several members has its own head: an ensemble shares one."""
    own = [member.name for member in members if HEAD in member.weights]
    if own and len(members) > 1:
        raise InvalidEnsembleError(
            f"{own} have a head of its own; members share one: export it alone, or train without --head"
        )
    if not own or not config.tied_head:
        return config, base
    return replace(config, tied_head=False), Overlay({HEAD: base[EMBEDDING]}, base)


def _default_ensemble(names: list[str], mix: Mapping[str, float] | None, space: Space) -> Ensemble:
    if mix is None:
        mix = dict.fromkeys(names, 1.0 / len(names))
    unknown = sorted(set(mix) - set(names))
    if unknown:
        raise InvalidEnsembleError(f"the mix names {unknown}; the bundle's members are {sorted(names)}")
    return Ensemble(tuple(Member(n, float(mix.get(n, 0.0))) for n in names), space)


def _split_layer(config: DecoderConfig, members: list[MemberWeights], num_tail_layers: int | None) -> int:
    needed = min(member.split_layer for member in members)
    if num_tail_layers is None:
        return needed
    if not 0 <= num_tail_layers <= config.num_layers:
        raise ConfigError(f"tails may have 0 to {config.num_layers} layers, got {num_tail_layers}")
    split_layer = config.num_layers - num_tail_layers
    if split_layer > needed:
        raise ConfigError(
            f"{num_tail_layers} tail layers are too few: a member changes layers from {needed} on, "
            f"which takes {config.num_layers - needed}"
        )
    return split_layer


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _check_sizes(config: DecoderConfig, bits: int, group_size: int | None, graphs: bool) -> None:
    """Raises `ConfigError` or `UnsupportedModelError` for sizes that cannot be stored or served, before any work."""
    if graphs:
        check_graphs(config)
    if bits != 32:
        check_group(EMBEDDING, config.hidden_size, HEAD_GROUP)
        for linear in decoder_layout(config).linears:
            check_group(linear.name, linear.columns, layer_group(bits, linear.columns, group_size))


@dataclass(frozen=True, slots=True)
class _Part:
    """A layer, or what is in no layer: the names of its weights, and what members have of it. `layout` has that layer alone."""

    layout: Layout
    names: list[str]
    members: list[MemberWeights]


def _parts(layout: Layout, names: Iterable[str], members: list[MemberWeights]) -> list[_Part]:
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
        parts.append(_Part(replace(layout, layers=layers), chosen(names, prefix), own))
    return parts


def _stored_names(part: _Part, bits: int) -> Iterator[str]:
    """Names of at least the tensors of the part that are stored. A header has no room for many that are not."""
    kinds = {4: (".values", ".scales", ".minima"), 8: (".values", ".scales"), 32: ("",)}
    changed = {name.rpartition(".")[0] for member in part.members for name in (*member.weights, *member.adapters)}
    fused = {name for linear in part.layout.linears for name in (linear.name, *(p.name for p in linear.parts))}
    others = [name for name in part.names if name.rpartition(".")[0] not in fused]
    for linear in part.layout.linears:
        is_changed = any(p.name in changed for p in linear.parts)
        weights = [f"{linear.name}.weight{kind}" for kind in kinds[bits]] + [f"{linear.name}.bias"] * linear.bias
        yield from weights
        for member in part.members if is_changed else ():
            own = kinds[max(bits, 8)] if bits < 32 else ("",)
            yield from (own_name(member.name, f"{linear.name}.weight{kind}") for kind in own)
            yield from (own_name(member.name, f"{linear.name}.{half}") for half in ("bias", "lora_a", "lora_b"))
    for name in others:
        yield from (name, f"{name}.values", f"{name}.scales")
        if name.rpartition(".")[0] in changed:
            for kind in ("", ".values", ".scales"):
                yield from (own_name(member.name, f"{name}{kind}") for member in part.members)
    if EMBEDDING in part.names:
        yield from (*ROTARY, *WINDOW_ROTARY)


def _write_weights(
    path: Path,
    parts: list[_Part],
    weights: Mapping[str, torch.Tensor],
    rms: Mapping[str, F32],
    bits: int,
    group_size: int | None,
) -> None:
    names = (name for part in parts for name in _stored_names(part, bits))
    with TensorFile(path, names, {"format": "motet"}) as stored:
        for part in parts:
            own = {n: np.asarray(weights[n].numpy(), dtype=np.float32) for n in part.names}
            for tensor, values in _bundle_tensors(part, own, rms, bits, group_size).items():
                stored.add(tensor, values)


def _bundle_tensors(
    part: _Part, base: Mapping[str, F32], rms: Mapping[str, F32], bits: int, group_size: int | None
) -> dict[str, Array]:
    """The stored tensors of a part. A single member replaces the base's weights; several members, and adapters, have
    tensors named `members.<name>.…`.

    Weights that fine-tuning changed keep at least 8 bits: the changes are smaller than a step of a 4-bit grid, so
    rounding would undo them.
    """
    tensors: dict[str, Array] = {}
    layout, members = part.layout, part.members
    if layout.config.positions == "rotary" and EMBEDDING in part.names:
        tensors |= rotary_tables(layout.config)
    quantised = {f"{linear.name}.weight" for linear in layout.linears}
    fused = [{part.name for part in linear.parts} for linear in layout.linears]
    fused_with = {part: parts for parts in fused for part in parts}

    def add(member: str | None, weights: Mapping[str, F32], bits: int) -> None:
        for name, weight in weights.items():
            stored = name if member is None else own_name(member, name)
            if bits == 32 or name not in quantised | {EMBEDDING, HEAD}:
                tensors[stored] = np.ascontiguousarray(weight)
            elif name in quantised:
                _add_quantised(tensors, stored, weight, bits, layer_group(bits, weight.shape[1], group_size))
            else:
                _add_quantised(tensors, stored, weight, 8, HEAD_GROUP)

    def prepare(weights: Mapping[str, F32]) -> dict[str, F32]:
        return _fuse(layout, equalise(layout, weights, rms, group_size) if rms else weights)

    shared = prepare(base)
    for member in members:
        changed = {n.rpartition(".")[0] for n, w in member.weights.items() if not np.array_equal(w, base[n])}
        together = {part for module in changed for part in fused_with.get(module, {module})}
        own = prepare({n: w for n, w in {**base, **member.weights}.items() if n.rpartition(".")[0] in together})
        if len(members) == 1:
            shared = {n: w for n, w in shared.items() if n not in own}
            add(None, own, max(bits, 8))
        else:
            add(member.name, own, max(bits, 8))
        adapters = equalise(layout, member.adapters, rms, group_size) if rms else member.adapters
        add(member.name, fuse_adapters(layout, adapters), 32)
    add(None, shared, bits)
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


def _add_quantised(tensors: dict[str, Array], name: str, weight: F32, bits: int, group_size: int) -> None:
    """Some rows at a time: beside them, quantising needs a multiple of their memory."""
    count = max(1, _AT_ONCE // weight.shape[1])
    pieces = [
        quantise(weight[first : first + count], bits, group_size, name=name) for first in range(0, len(weight), count)
    ]
    for kind in ("values", "scales", "minima"):
        found = [getattr(piece, kind) for piece in pieces if getattr(piece, kind) is not None]
        if found:
            tensors[f"{name}.{kind}"] = np.concatenate(found)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def _write_graphs(config: DecoderConfig, members: list[MemberWeights], split_layer: int, work: Path) -> dict[str, Any]:
    tensors = stored_tensors(work / WEIGHTS)
    last = config.num_layers
    shared = GraphWriter(config, tensors, WEIGHTS)
    shared.write(Slice(embedding=False, start=last, stop=last, norm=False, head=True), work / "head.onnx")
    if len(members) == 1:
        alone = GraphWriter(config, tensors, WEIGHTS, members[0].name)
        alone.write(Slice(embedding=True, start=0, stop=last, norm=True, head=False), work / "model.onnx")
        return {"trunk": "model.onnx", "tails": {}, "head": "head.onnx"}
    shared.write(Slice(embedding=True, start=0, stop=split_layer, norm=False, head=False), work / "trunk.onnx")
    tails = {}
    for member in members:
        tails[member.name] = f"tail-{member.name}.onnx"
        writer = GraphWriter(config, tensors, WEIGHTS, member.name)
        part = Slice(embedding=False, start=split_layer, stop=last, norm=True, head=False)
        writer.write(part, work / tails[member.name])
    return {"trunk": "trunk.onnx", "tails": tails, "head": "head.onnx"}
