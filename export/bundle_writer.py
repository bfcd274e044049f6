"""Writes a bundle from a base model and members: weights, fused and quantised, in one file, and graphs that point
into it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.api.request import Ensemble, Member, Space
from ..runtime.backends.probe import PROBE
from ..runtime.checkpoints.overlay import Overlay
from ..runtime.errors import ConfigError, InvalidEnsembleError
from ..runtime.model.bundle import FORMAT, MANIFEST, WEIGHTS, Bundle
from ..runtime.model.config import DecoderConfig
from ..runtime.model.encoders import TEMPLATE, processor_template
from ..runtime.model.files import check_replaceable, file_digest, new_directory
from ..runtime.model.layout import EMBEDDING, HEAD, decoder_layout
from ..runtime.model.members import MemberKind
from ..runtime.model.stored import stored_tensors, stored_weight
from .base_model import BaseModel
from .bundle_tensors import parts_of, write_weights
from .encoder_graph import write_encoders
from .graph import GraphWriter, Slice, check_graphs
from .graph_nodes import in_file
from .members import MemberWeights, read_member
from .parity import REPORT, HeldOut, check_chunks, measure_parity
from .quantisation.calibration import Calibration, QuantisationConfig
from .quantisation.method import Method, Target
from .quantisation.quantiser import Quantiser

COPIED = ("tokenizer.json", "tokenizer_config.json", TEMPLATE, "config.json", "generation_config.json")


def export_bundle(
    model: BaseModel | Path,
    out: Path,
    *,
    tails: Mapping[str, Path | None] | None = None,
    loras: Mapping[str, Path] | None = None,
    merge: bool = False,
    mix: Mapping[str, float] | None = None,
    temperatures: Mapping[str, float] | None = None,
    mix_chosen_by: Mapping[str, Any] | None = None,
    space: Space = Space.LOGITS,
    bits: int | None = None,
    group_size: int | None = None,
    method: Method = Method.ROUND,
    target: Target | None = None,
    num_tail_layers: int | None = None,
    name: str | None = None,
    calibration: Calibration | None = None,
    graphs: bool = True,
    held_out: HeldOut | None = None,
) -> Path:
    """Write a bundle to the directory `out`, which is replaced as a whole when the bundle is complete.

    `model`: the base, or its directory. `tails`: member name → tail directory, None for the base itself. `loras`:
    member name → adapter directory. Adapters are stored beside the base's weights, and their members run the base's
    layers from `split_layer` on with the updates; with `merge` they are added to the weights, and the member has these
    layers of its own. Without any member, the base is the only
    one. `mix`: member → coefficient; default: all equal. `temperatures`: member → what divides its logits before they are mixed;
    default: 1. `mix_chosen_by`: on which data the mix was fitted, for the
    manifest. `bits`: 8 (default), 4 (head and embedding keep 8) or 32 (not
    quantised). `group_size`: columns per group of the layers' weights; default: see `layer_group`. `method`: how 4-bit values
    are chosen. `target`, instead of `bits`: each weight has the scheme with which the bundle is within it and loses least.
    All methods but `round`, and targets, need `calibration`: text, on which 8-bit weights are equalised too. They quantise
    what a single member has trained as they quantise the base; in ensembles, members' own weights keep 8 bits at least.
    `num_tail_layers`: layers per tail; default: as many as the tails need. `graphs`: write ONNX graphs, which the onnx
    backend needs.
    `held_out`: text on which every member is measured before `out` is replaced. The report is a file of the bundle
    (see `read_parity`), and so is the probe that backends answer when they load it.

    Raises `ConfigError` (also for chunks that are longer than the model's context), `InvalidEnsembleError`, `BundleError`
    (a member of another base), `NotFoundError`, `UnsupportedModelError`, `UnavailableError` (the bundle cannot be
    measured here).
    """
    if merge and not loras:
        raise ConfigError("merge is for adapters, and none is given; leave it out, or give one")
    check_replaceable(out, MANIFEST, "a bundle")  # fail early: before weights are read
    model = model if isinstance(model, BaseModel) else BaseModel(model)
    wanted = QuantisationConfig(bits, group_size, method, target)
    check_chunks(calibration.chunks if calibration else (), model.config, "calibration")
    wanted.check(model.config, calibration)
    if graphs:
        check_graphs(model.config)
    check_chunks(held_out.chunks if held_out else (), model.config, "held-out")
    given: dict[MemberKind, Mapping[str, Path | None]] = {
        MemberKind.TAIL: tails or {},
        MemberKind.ADAPTER: {**(loras or {})},
    }
    members = _read_members(model, given, merge)
    config, weights = _own_head(model.config, model.weights, members)
    ensemble = _default_ensemble([member.name for member in members], mix, temperatures or {}, space)
    split_layer = _split_layer(config, members, num_tail_layers)
    stored, rest, digest = weights, members, model.digest
    if target is not None and target.megabytes is not None and (len(members) > 1 or members[0].adapters):
        raise ConfigError(
            "a target of megabytes counts the base alone, and members of their own come on top; give a target of bits or KL"
        )
    if wanted.is_calibrated and len(members) == 1:
        stored, rest, digest = _merged(weights, members[0], digest)
    with new_directory(out, MANIFEST, "a bundle") as work, ExitStack() as stack:
        quantiser = wanted.quantiser(config, stored, digest, calibration, stack)
        parts = parts_of(decoder_layout(config), stored, rest)
        write_weights(work / WEIGHTS, parts, stored, quantiser, _on_part(calibration, len(parts)))
        files = _write_graphs(config, members, split_layer, work) if graphs else None
        for file in COPIED:
            if (model.path / file).is_file():
                shutil.copyfile(model.path / file, work / file)
        encoders = write_encoders(model.path, work)
        if (template := processor_template(model.path)) is not None:
            (work / TEMPLATE).write_text(template)
        by_name = {member.name: _part_in_mix(member) for member in ensemble.members}
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": name or out.name,
            "config": config.to_dict(),
            "quantisation": _quantisation(work / WEIGHTS, config, wanted, quantiser, calibration),
            "split_layer": split_layer,
            "members": [
                {"name": m.name, "kind": m.kind, **by_name[m.name], "provenance": dict(m.provenance)} for m in members
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
        if encoders:
            manifest["encoders"] = encoders
        _write_manifest(work, manifest)
        if held_out is not None:
            report, probe = measure_parity(Bundle.load(work, verify=False), weights, members, held_out)
            report.write(work / REPORT)
            probe.write(work / PROBE)
            manifest["files"] |= {file: file_digest(work / file) for file in (REPORT, PROBE)}
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


def _merged(
    base: Mapping[str, torch.Tensor], member: MemberWeights, digest: str
) -> tuple[Mapping[str, torch.Tensor], list[MemberWeights], str]:
    """A single member's own weights as a part of the base's; the member without them; the digest of both."""
    merged, found = {name: torch.from_numpy(weight) for name, weight in member.weights.items()}, hashlib.sha256()
    found.update(digest.encode())
    for name, weight in member.weights.items():
        found.update(name.encode())
        found.update(np.ascontiguousarray(weight).data)
    return Overlay(merged, base), [replace(member, weights={})], found.hexdigest() if merged else digest


def _on_part(calibration: Calibration | None, total: int) -> Callable[[], None]:
    count = itertools.count(1)
    return lambda: calibration.on_progress("quantising", next(count), total) if calibration else None


def _quantisation(
    path: Path,
    config: DecoderConfig,
    wanted: QuantisationConfig,
    quantiser: Quantiser,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """What the manifest says of it."""
    layout, tensors = decoder_layout(config), stored_tensors(path)
    weights = [stored_weight(tensors, f"{linear.name}.weight") for linear in layout.linears]
    head = stored_weight(tensors, layout.head)
    quantised = [*weights, *(stored_weight(tensors, name) for name in {EMBEDDING, layout.head})]
    num_bytes = sum(tensors[name].length for weight in quantised for name in weight.tensors)
    average = 8 * num_bytes / sum(weight.rows * weight.columns for weight in quantised)
    groups = {weight.group_size for weight in weights}
    return {
        "bits": round(average, 2) if wanted.target else wanted.num_bits,
        "average_bits": round(average, 4),
        "group_size": (groups.pop() or None) if len(groups) == 1 else None,
        "head_bits": head.bits,
        "head_group_size": head.group_size or None,
        "method": str(wanted.method),
        "target": dataclasses.asdict(wanted.target) if wanted.target else None,
        "expected_kl": quantiser.expected or None,
        "calibration_tokens": sum(map(len, calibration.chunks)) if calibration else None,
    }


def _part_in_mix(member: Member) -> dict[str, float]:
    return {"mix": member.mix} | ({} if member.temperature == 1 else {"temperature": member.temperature})


def _default_ensemble(
    names: list[str], mix: Mapping[str, float] | None, temperatures: Mapping[str, float], space: Space
) -> Ensemble:
    if mix is None:
        mix = dict.fromkeys(names, 1.0 / len(names))
    unknown = sorted(set(mix) - set(names))
    if unknown:
        raise InvalidEnsembleError(f"the mix names {unknown}; the bundle's members are {sorted(names)}")
    idle = sorted(name for name in temperatures if not mix.get(name))
    if idle:
        raise InvalidEnsembleError(f"the temperatures name {idle}, which have no part in the mix; leave them out")
    parts = ((n, float(mix.get(n, 0.0)), float(temperatures.get(n, 1.0))) for n in names)
    return Ensemble(tuple(Member(n, c, temperature=t) for n, c, t in parts), space)


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


# ---- graphs ----------------------------------------------------------------------------------------------------------


def _write_graphs(config: DecoderConfig, members: list[MemberWeights], split_layer: int, work: Path) -> dict[str, Any]:
    tensors = stored_tensors(work / WEIGHTS)
    place, last = in_file(WEIGHTS), config.num_layers
    shared = GraphWriter(config, tensors, place)
    shared.write(Slice(embedding=False, start=last, stop=last, norm=False, head=True), work / "head.onnx")
    if len(members) == 1:
        alone = GraphWriter(config, tensors, place, members[0].name)
        alone.write(Slice(embedding=True, start=0, stop=last, norm=True, head=False), work / "model.onnx")
        return {"trunk": "model.onnx", "tails": {}, "head": "head.onnx"}
    shared.write(Slice(embedding=True, start=0, stop=split_layer, norm=False, head=False), work / "trunk.onnx")
    tails = {}
    for member in members:
        tails[member.name] = f"tail-{member.name}.onnx"
        writer = GraphWriter(config, tensors, place, member.name)
        part = Slice(embedding=False, start=split_layer, stop=last, norm=True, head=False)
        writer.write(part, work / tails[member.name])
    return {"trunk": "trunk.onnx", "tails": tails, "head": "head.onnx"}
