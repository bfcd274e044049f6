"""Base model + members → bundle: weights fused and quantised into one safetensors file, graphs that point into it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from ..runtime.api.request import Ensemble, Member, Space
from ..runtime.checkpoints.decoder import Decoder
from ..runtime.checkpoints.huggingface import checkpoint_digest, eos_token_ids, read_config, read_weights
from ..runtime.errors import ConfigError, InvalidEnsembleError
from ..runtime.model.bundle import FORMAT, MANIFEST, WEIGHTS, Bundle, file_digest
from ..runtime.model.config import DecoderConfig
from ..runtime.model.layout import COS, EMBEDDING, HEAD, SIN, Layout, decoder_layout
from ..runtime.model.rotary import rotary_tables
from ..runtime.model.stored import own_name, stored_tensors
from .calibrate import channel_rms, equalise
from .graph import GraphWriter, Slice
from .members import BASE, MemberWeights, fuse_adapters, read_member
from .quantise import HEAD_GROUP, layer_group, quantise

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")


def export_bundle(
    model_dir: Path,
    out: Path,
    *,
    tails: Mapping[str, Path | None] | None = None,
    loras: Mapping[str, Path] | None = None,
    merge: bool = False,
    mix: Mapping[str, float] | None = None,
    space: Space = Space.LOGITS,
    bits: int = 8,
    group_size: int | None = None,
    num_tail_layers: int | None = None,
    name: str | None = None,
    calibration: Sequence[Sequence[int]] = (),
) -> Path:
    """Write a bundle to the directory `out` (replaced as a whole, only when complete).

    `tails`: member name → tail directory, None for the base itself. `loras`: member name → adapter directory; its adapters
    are stored beside the base's weights, or with `merge` added to them (a member then has all layers from the first
    that it changes). Without any member, the base is the only one. `mix`: member → coefficient, uniform by default.
    `bits`: 8, 4 (head and embedding stay in 8) or 32 (not quantised). `group_size`: columns of a group of the layers' weights
    (default: see `layer_group`). `num_tail_layers`: how many layers every member has
    of its own; by default what the tails need. `calibration`: chunks of token ids by which an 8-bit bundle is equalised
    (see `calibrate`); none, no equalisation. Raises `ConfigError`, `InvalidEnsembleError`, `BundleError` (a tail of
    another base), `NotFoundError`.
    """
    if bits not in (4, 8, 32):
        raise ConfigError(f"bits must be 4, 8 or 32, got {bits}")
    config = read_config(model_dir)
    digest = checkpoint_digest(model_dir)
    weights = read_weights(model_dir)
    members = _read_members(config, digest, weights, tails or {}, loras or {}, merge)
    config, weights = _own_head(config, weights, members)
    ensemble = _default_ensemble([member.name for member in members], mix, space)
    split_layer = _split_layer(config, members, num_tail_layers)
    rms = channel_rms(Decoder.from_weights(config, weights), calibration) if bits == 8 and calibration else {}
    base = {n: np.asarray(tensor.numpy(), dtype=np.float32) for n, tensor in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tensors = _bundle_tensors(decoder_layout(config), base, members, rms, bits, group_size)
        save_file(tensors, work / WEIGHTS, metadata={"format": "motet"})
        graphs = _write_graphs(config, members, split_layer, work)
        for file in COPIED:
            if (model_dir / file).is_file():
                shutil.copyfile(model_dir / file, work / file)
        by_name = {member.name: member.mix for member in ensemble.members}
        manifest = {
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
            "graphs": graphs,
            "eos_token_ids": list(eos_token_ids(model_dir)),
            "provenance": {"base": model_dir.name, "base_digest": digest},
            "files": {file.name: file_digest(file) for file in sorted(work.iterdir())},
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _read_members(
    config: DecoderConfig,
    digest: str,
    base: Mapping[str, torch.Tensor],
    tails: Mapping[str, Path | None],
    loras: Mapping[str, Path],
    merge: bool,
) -> list[MemberWeights]:
    twice = sorted(set(tails) & set(loras))
    if twice:
        raise InvalidEnsembleError(f"members need names of their own; given twice: {twice}")
    if not tails and not loras:
        tails = {BASE: None}
    members = [read_member(n, path, digest, config, base) for n, path in tails.items()]
    how: Literal["merge", "keep"] = "merge" if merge else "keep"
    return members + [read_member(n, path, digest, config, base, adapter=how) for n, path in loras.items()]


def _own_head(
    config: DecoderConfig, base: Mapping[str, torch.Tensor], members: list[MemberWeights]
) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """A single member may have trained the head: it is then no longer the embedding. An ensemble shares one head."""
    own = [member.name for member in members if HEAD in member.weights]
    if own and len(members) > 1:
        raise InvalidEnsembleError(
            f"{own} have a head of its own; members share one: export it alone, or train without --head"
        )
    if not own or not config.tied_head:
        return config, dict(base)
    return dataclasses.replace(config, tied_head=False), {**base, HEAD: base[EMBEDDING]}


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
    if num_tail_layers and any(m.kind == "adapter" for m in members) and not _has_tails(members):
        raise ConfigError(f"no member has a tail (adapters use the base's layers), got {num_tail_layers} tail layers")
    if split_layer > needed:
        raise ConfigError(
            f"{num_tail_layers} tail layers are too few: a member changes layers from {needed} on, "
            f"which takes {config.num_layers - needed}"
        )
    return split_layer


def _has_tails(members: list[MemberWeights]) -> bool:
    """Base and adapter members use one body. Without adapters, several members have tails, be they all the base."""
    kinds = {member.kind for member in members}
    return len(members) > 1 and ("tail" in kinds or "adapter" not in kinds)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _bundle_tensors(
    layout: Layout,
    base: Mapping[str, F32],
    members: list[MemberWeights],
    rms: Mapping[str, F32],
    bits: int,
    group_size: int | None,
) -> dict[str, Array]:
    """All stored tensors. A single member is folded into the base; several, and adapters, have `members.<name>.` tensors.

    What fine-tuning changed has 8 bits at least: its changes are smaller than a step of a 4-bit grid, and rounding them
    away would give the base back.
    """
    tensors: dict[str, Array] = {}
    if layout.config.positions == "rotary":
        tensors[COS], tensors[SIN] = rotary_tables(layout.config)
    quantised = {f"{linear.name}.weight" for linear in layout.linears}
    parts = {linear.name: {part.name for part in linear.parts} for linear in layout.linears}

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

    def is_changed(name: str, changed: set[str]) -> bool:
        module = name.rpartition(".")[0]
        return bool(parts.get(module, {module}) & changed)

    shared = prepare(base)
    for member in members:
        changed = {n.rpartition(".")[0] for n, w in member.weights.items() if not np.array_equal(w, base[n])}
        own = {n: w for n, w in prepare({**base, **member.weights}).items() if is_changed(n, changed)}
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
    """The linear layers as they are stored: their parts' rows, one part after the other."""
    fused = dict(weights)
    for linear in layout.linears:
        for kind in ("weight", "bias") if linear.bias else ("weight",):
            rows = [fused.pop(f"{part.name}.{kind}") for part in linear.parts]
            fused[f"{linear.name}.{kind}"] = np.concatenate(rows)
    return fused


def _add_quantised(tensors: dict[str, Array], name: str, weight: F32, bits: int, group_size: int) -> None:
    quantised = quantise(weight, bits, group_size, name=name)
    tensors[f"{name}.values"] = quantised.values
    tensors[f"{name}.scales"] = quantised.scales
    if quantised.zero_points is not None:
        tensors[f"{name}.zero_points"] = quantised.zero_points


# ---- graphs ----------------------------------------------------------------------------------------------------------


def _write_graphs(config: DecoderConfig, members: list[MemberWeights], split_layer: int, work: Path) -> dict[str, Any]:
    tensors = stored_tensors(work / WEIGHTS)
    last = config.num_layers
    shared = GraphWriter(config, tensors, WEIGHTS)
    shared.write(Slice(embedding=False, start=last, stop=last, norm=False, head=True), work / "head.onnx")
    if not _has_tails(members):
        shared.write(Slice(embedding=True, start=0, stop=last, norm=True, head=False), work / "model.onnx")
        return {"trunk": "model.onnx", "tails": {}, "head": "head.onnx"}
    shared.write(Slice(embedding=True, start=0, stop=split_layer, norm=False, head=False), work / "trunk.onnx")
    tails = {}
    for member in members:
        if member.kind == "adapter":
            continue  # no graph of its own: a backend that knows adapters runs the base's layers
        tails[member.name] = f"tail-{member.name}.onnx"
        writer = GraphWriter(config, tensors, WEIGHTS, member.name)
        part = Slice(embedding=False, start=split_layer, stop=last, norm=True, head=False)
        writer.write(part, work / tails[member.name])
    return {"trunk": "trunk.onnx", "tails": tails, "head": "head.onnx"}


def write_standard_graph(bundle: Bundle, member: int, out: Path) -> None:
    """A directory with one member of a bundle as one standard decoder graph (attention_mask in, the last position's
    logits out), the weights (linked) and onnxruntime-genai's configuration."""
    out.mkdir(parents=True, exist_ok=True)
    config, name = bundle.config, bundle.members[member]
    for file in ("tokenizer.json", "tokenizer_config.json", WEIGHTS):
        (out / file).unlink(missing_ok=True)
        if (bundle.path / file).is_file():
            _link(bundle.path / file, out / file)
    tensors = stored_tensors(bundle.path / WEIGHTS)
    writer = GraphWriter(config, tensors, WEIGHTS, name)
    whole = Slice(embedding=True, start=0, stop=config.num_layers, norm=True, head=True)
    writer.write(whole, out / "model.onnx", standard=True)
    (out / "genai_config.json").write_text(json.dumps(_genai_config(config, bundle.eos_token_ids), indent=1))


def _link(source: Path, target: Path) -> None:
    """A hard link (ONNX Runtime refuses external data behind a symbolic one); a copy across file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _genai_config(config: DecoderConfig, eos: tuple[int, ...]) -> dict[str, Any]:
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    inputs |= {"position_ids": "position_ids"} if config.positions == "learned" else {}
    inputs |= {
        f"past_{kind}_names": f"past_key_values.%d.{part}" for kind, part in (("key", "key"), ("value", "value"))
    }
    outputs = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config.head_size,
        "hidden_size": config.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
    }
    model = {
        "bos_token_id": 0,
        "eos_token_id": list(eos) or [0],
        "pad_token_id": 0,
        "context_length": config.max_position_embeddings,
        "type": "llama",
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    search = {"max_length": config.max_position_embeddings, "do_sample": False, "past_present_share_buffer": True}
    return {"model": model, "search": search}


def _replace(work: Path, out: Path) -> None:
    """Put the finished directory in place; a reader sees the old bundle or the new one."""
    if out.exists():
        if not (out / MANIFEST).is_file():
            raise ConfigError(f"'{out}' exists and is not a bundle; choose another directory")
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
        os.replace(out, old / out.name)
        os.replace(work, out)
        shutil.rmtree(old)
    else:
        os.replace(work, out)
