"""Random bundles, written directly: tiny decoders of every shape that `DecoderConfig` has, with tails and adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from motet.export.quantisation.groups import quantise
from motet.runtime.api.request import Space
from motet.runtime.model.bundle import FORMAT, MANIFEST, WEIGHTS, Bundle
from motet.runtime.model.config import DecoderConfig
from motet.runtime.model.layout import EMBEDDING, POSITIONS, Layout, Norm, decoder_layout
from motet.runtime.model.members import MemberKind
from motet.runtime.model.rotary import rotary_tables
from motet.runtime.model.stored import own_name
from safetensors.numpy import save_file

VOCABULARIES = (1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 100, 129, 320)
KINDS = (MemberKind.BASE, MemberKind.TAIL, MemberKind.ADAPTER)


class Writer:
    """Collects the tensors of one bundle. `huge`: the chance that a weight is so large that its products overflow."""

    def __init__(self, rng: np.random.Generator, bits: int, group: int, huge: float) -> None:
        self.rng, self.bits, self.group, self.huge = rng, bits, group, huge
        self.tensors: dict[str, np.ndarray] = {}

    def weight(self, name: str, rows: int, columns: int, bits: int, group: int, gain: float = 1.0) -> None:
        weight = (self.rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)
        if self.rng.random() < 0.1:
            weight[:, : group or 16] = 0  # groups without a scale
        if self.rng.random() < self.huge:
            weight *= np.float32(1e22)
        if bits == 32:
            self.tensors[name] = weight
            return
        stored = quantise(weight, bits, group)
        self.tensors |= {f"{name}.values": stored.values, f"{name}.scales": stored.scales}
        if stored.minima is not None:
            self.tensors[f"{name}.minima"] = stored.minima

    def vector(self, name: str, size: int, mean: float) -> None:
        self.tensors[name] = (mean + 0.2 * self.rng.standard_normal(size)).astype(np.float32)

    def norm(self, norm: Norm, member: str | None = None) -> None:
        for name in norm.tensors:
            stored = name if member is None else own_name(member, name)
            self.vector(stored, norm.size, 0.0 if name.endswith("bias") else 1.0)

    def layers(self, layout: Layout, first: int, member: str | None = None) -> None:
        """Layers from `first` on. A member has random ones of their tensors; what it lacks is the base's."""
        bits = self.bits if member is None else max(self.bits, 8)
        for layer in layout.layers[first:]:
            for linear in layer.linears:
                if member is not None and self.rng.random() < 0.4:
                    continue
                name = f"{linear.name}.weight"
                stored = name if member is None else own_name(member, name)
                self.weight(stored, linear.rows, linear.columns, bits, self.group)
                if linear.bias:
                    self.vector(stored.removesuffix("weight") + "bias", linear.rows, 0.0)
            if layer.router is not None and (member is None or self.rng.random() < 0.5):
                name = f"{layer.router}.weight"
                shape = (layout.config.num_experts, layout.config.hidden_size)
                values = self.rng.standard_normal(shape) * (2 / np.sqrt(shape[1]))
                self.tensors[name if member is None else own_name(member, name)] = values.astype(np.float32)
            for norm in layer.norms:
                if member is None or self.rng.random() < 0.5:
                    self.norm(norm, member)
        if member is None or self.rng.random() < 0.5:
            self.norm(layout.norm, member)

    def adapter(self, layout: Layout, first: int, member: str) -> None:
        """Updates of some linear layers from layer `first` on."""
        rank = int(self.rng.integers(1, 6))
        for linear in (linear for layer in layout.layers[first:] for linear in layer.adaptable):
            if self.rng.random() < 0.5:
                a, b = ((rank, linear.columns), (linear.rows, rank))
                for half, shape in (("lora_a", a), ("lora_b", b)):
                    values = self.rng.standard_normal(shape) * (0.3 / np.sqrt(shape[1]))
                    self.tensors[own_name(member, f"{linear.name}.{half}")] = values.astype(np.float32)


_SCALES = (
    *("embedding_scale", "residual_scale", "attention_softcap"),
    *("logit_scale", "logit_softcap"),
)


def random_config(rng: np.random.Generator, group: int) -> DecoderConfig:
    """Sizes that the kernels and the groups fit."""
    unit = max(group, 32)
    head_size = int(rng.choice([16, 32, 48, 64, 128]))
    heads = int(rng.choice([h for h in (1, 2, 3, 4, 6, 8) if h * head_size % unit == 0 and h * head_size <= 384]))
    layers = int(rng.integers(1, 4))
    window = int(rng.choice([1, 5, 33, 100])) if rng.random() < 0.25 else None
    experts = int(rng.integers(1, 7)) if rng.random() < 0.2 else 0
    places = str(rng.choice(["before", "before", "around", "after"]))
    parallel = bool(places == "before" and not experts and rng.random() < 0.3)
    return DecoderConfig(
        family="llama",
        vocab_size=int(rng.choice(VOCABULARIES)),
        hidden_size=unit * int(rng.integers(1, 4)) if unit < 128 else unit,
        intermediate_size=unit * int(rng.integers(1, 4)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(rng.choice([k for k in (1, 2, 3, 4, 6, 8) if heads % k == 0])),
        head_size=head_size,
        max_position_embeddings=int(rng.choice([40, 96, 200])),
        norm=str(rng.choice(["rms", "layer"])),  # type: ignore[arg-type]
        norm_eps=float(rng.choice([1e-6, 1e-5])),
        positions=str(rng.choice(["rotary", "rotary", "learned"])),  # type: ignore[arg-type]
        activation=str(rng.choice(["swiglu", "swiglu", "geglu", "gelu", "gelu_erf"])),  # type: ignore[arg-type]
        norm_places=places,  # type: ignore[arg-type]
        parallel_residual=parallel,
        shared_norm=bool(parallel and rng.random() < 0.5),
        rotary_size=int(rng.integers(1, head_size // 2 + 1)) * 2 if rng.random() < 0.2 else None,
        window_rope_theta=float(rng.choice([100.0, 1e6])) if rng.random() < 0.3 else None,
        unrotated_layers=(int(rng.integers(layers)),) if rng.random() < 0.2 else (),
        qkv_bias=bool(rng.random() < 0.4),
        out_bias=bool(rng.random() < 0.3),
        mlp_bias=bool(rng.random() < 0.3),
        qk_norm=[None, None, "head", "projection"][rng.integers(4)],
        sliding_window=window,
        window_layers=tuple(range(int(rng.integers(layers)), layers)) if window else None,
        num_experts=experts,
        experts_per_token=int(rng.integers(1, experts + 1)) if experts else 0,
        expert_size=unit * int(rng.integers(1, 3)) if experts else 0,
        normalises_experts=bool(rng.random() < 0.5),
        dense_layers=(int(rng.integers(layers)),) if rng.random() < 0.3 else (),
        tied_head=bool(rng.random() < 0.5),
        attention_scale=head_size**-0.5 * float(rng.choice([0.3, 2.0])) if rng.random() < 0.2 else None,
        **{name: float(rng.choice([0.3, 4.0])) for name in _SCALES if rng.random() < 0.15},  # type: ignore[arg-type]
    )


def write_bundle(path: Path, rng: np.random.Generator) -> Bundle:
    """A random bundle of one to four members in the new directory `path`."""
    bits = int(rng.choice([4, 8, 32]))
    group = int(rng.choice([16, 32, 64, 128]))
    config = random_config(rng, group)
    head_group = int(rng.choice([g for g in (16, 32, 64) if config.hidden_size % g == 0]))
    layout = decoder_layout(config)
    writer = Writer(rng, bits, group, huge=0.3 if rng.random() < 0.05 else 0.0)
    head_bits = int(rng.choice([4, 8])) if bits == 4 else bits
    for name in dict.fromkeys((EMBEDDING, layout.head)):
        gain = 3.0 if name == layout.head else 1.0
        writer.weight(name, config.vocab_size, config.hidden_size, head_bits, head_group, gain)
    if config.positions == "learned":
        writer.tensors[POSITIONS] = (
            0.1 * rng.standard_normal((config.max_position_embeddings, config.hidden_size))
        ).astype(np.float32)
    else:
        writer.tensors |= rotary_tables(config)
    writer.layers(layout, 0)
    kinds = [KINDS[i] for i in rng.integers(0, 3, rng.integers(1, 5))]
    names = [f"m{index}" for index in range(len(kinds))]
    tails = len(kinds) > 1
    split = int(rng.integers(0, config.num_layers + 1)) if tails else config.num_layers
    for name, kind in zip(names, kinds):
        if kind is MemberKind.TAIL and tails:
            writer.layers(layout, split, name)
        if kind is MemberKind.ADAPTER:
            writer.adapter(layout, split if tails else 0, name)
            if rng.random() < 0.3:
                writer.norm(layout.norm, name)
    path.mkdir(parents=True)
    save_file(writer.tensors, path / WEIGHTS)
    manifest = {
        "format": FORMAT,
        "name": path.name,
        "config": config.to_dict(),
        "quantisation": {
            "bits": bits,
            "group_size": group,
            "head_bits": head_bits,
            "head_group_size": head_group,
        },
        "split_layer": split,
        "members": [{"name": n, "kind": str(k), "mix": 1 / len(kinds)} for n, k in zip(names, kinds)],
        "space": str(Space.LOGITS),
        "graphs": None,
        "eos_token_ids": [config.vocab_size - 1],
        "files": {WEIGHTS: "", "tokenizer.json": ""},
    }
    (path / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.load(path, verify=False)
