"""Adapters: PEFT's format on disk (see `peft_format`), beside which `motet tune` writes the manifest adapter.json.

Under the canonical module names (`model.layers.0.self_attn.q_proj` …) an adapter's tensors are, in float32:

    <module>.lora_a      [rank, K]   A
    <module>.lora_b      [N, rank]   B, with the scale folded in: the layer computes y = W x + B (A x)
    <module>.magnitude   [N]         DoRA: the lengths that the rows of W + B A are scaled to
    <weight or bias>                 a tensor that replaces the base's

An adapter of pairs A, B alone can be kept beside the base. Any other is merged into it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BundleError, ConfigError, NotFoundError, UnsupportedModelError
from ...model.config import DecoderConfig
from ...model.files import file_digest
from ...model.layout import EMBEDDING, HEAD, POSITIONS, decoder_layout
from ...model.members import MemberKind
from ..decoder import Decoder
from ..overlay import Overlay
from .files import MemberFormat, Tensors
from .peft_format import CONFIG, WEIGHTS, decode, encode

_PIECES = ("lora_a", "lora_b", "magnitude")


class AdapterFormat(MemberFormat):
    """PEFT's files. Motet's manifest beside them has their provenance; an adapter of another maker has none."""

    def is_at(self, path: Path) -> bool:
        return (path / CONFIG).is_file() or (path / self.manifest).is_file()

    def read_manifest(self, path: Path) -> dict[str, Any]:
        if not self.is_at(path):
            raise NotFoundError(f"there is no adapter at '{path}' ({CONFIG} is missing); `motet tune` makes one")
        if not (path / WEIGHTS).is_file():
            raise NotFoundError(
                f"the adapter at '{path}' has no {WEIGHTS}; save it with PEFT's save_pretrained (no pickle is read)"
            )
        with self._reading(path):
            settings = json.loads((path / CONFIG).read_bytes())
            if not isinstance(settings, dict):
                raise BundleError(f"'{path / CONFIG}' must hold a JSON object")
            if not (path / self.manifest).is_file():
                base = {"name": settings.get("base_model_name_or_path"), "digest": None}
                digest = file_digest(path / WEIGHTS)
                return {"format": self.version, "kind": self.kind, "base": base, "peft": settings, "sha256": digest}
        manifest = super().read_manifest(path)
        if manifest.get("peft") != settings:
            raise BundleError(
                f"'{path / CONFIG}' is not the one that {self.manifest} records; tune the adapter again, or remove "
                f"{self.manifest} to load it as one of an unknown base"
            )
        return manifest

    def canonical(self, manifest: Mapping[str, Any], stored: Tensors, config: DecoderConfig) -> dict[str, Tensor]:
        try:
            tensors = decode(manifest["peft"], stored, config)
        except (AttributeError, re.error) as error:
            raise BundleError(f"{CONFIG} has a value of the wrong type, or no regular expression: {error}") from error
        modules = adapted_modules(tensors)
        expected = _PIECES if manifest["peft"].get("use_dora") else _PIECES[:2]
        missing = [f"{m}.{half}" for m in modules for half in expected if f"{m}.{half}" not in tensors]
        stray = [name for name in tensors if name.endswith(".magnitude") and "magnitude" not in expected]
        if missing or stray:
            raise BundleError(
                f"the adapter lacks {missing[:4]} or should not have {stray[:4]}; see use_dora in {CONFIG}"
            )
        return tensors

    def merged(self, base: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        return merge(base, tensors)


ADAPTER = AdapterFormat(MemberKind.ADAPTER, 2, WEIGHTS)


def write_adapter(
    out: Path,
    config: DecoderConfig,
    pairs: Tensors,
    manifest: Mapping[str, Any],
    *,
    scale: float = 1.0,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter directory in PEFT's format, as a whole or not at all.

    `config`: the base's. `pairs`: `<module>.lora_a` and `.lora_b` of the same projections in each adapted layer; the
    update is scale · B A. `manifest` has `base`: its name and digest. `files`: name → text of others. Raises
    `ConfigError` if `out` exists and is something else.
    """
    floats = {name: tensor.float() for name, tensor in pairs.items()}
    settings, stored = encode(floats, config, scale=scale, base=manifest["base"]["name"])
    text = json.dumps(settings, indent=2) + "\n"
    ADAPTER.write(out, {**manifest, "peft": settings}, stored, {**(files or {}), CONFIG: text})


def read_adapter(path: Path, config: DecoderConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(manifest, tensors) of an adapter of a base with this configuration. Raises `NotFoundError`, `BundleError`
    (damaged, or parts of it missing), `UnsupportedModelError` (something that Motet cannot use)."""
    return ADAPTER.read(path, config)


def adapted_modules(tensors: Mapping[str, Any]) -> list[str]:
    """The modules with low-rank updates, sorted."""
    return sorted({name.rpartition(".")[0] for name in tensors if name.endswith(_PIECES)})


def is_separable(tensors: Mapping[str, Any]) -> bool:
    """Whether the adapter can be kept beside the base: it is pairs A, B of the layers' projections alone."""
    return all(name.endswith((".lora_a", ".lora_b")) and not name.startswith("lm_head.") for name in tensors)


def fit(base: Tensors, tensors: Tensors) -> dict[str, Tensor]:
    """The adapter without tensors that equal the base's (PEFT saves such embeddings and heads). `base`: canonical name
    → weight, shaped as in `Layout.checkpoint_shapes`. Raises `BundleError` unless every tensor fits the base,
    `UnsupportedModelError` if the embedding is changed, which members share."""
    base = base if HEAD in base else Overlay({HEAD: base[EMBEDDING]}, base)
    for module in adapted_modules(tensors):
        a, b, weight = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"], base.get(f"{module}.weight")
        if weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            found = "no such layer" if weight is None else f"a weight {tuple(weight.shape)}"
            raise BundleError(
                f"the adapter's '{module}' has A {tuple(a.shape)} and B {tuple(b.shape)}, the base has {found}; "
                "use the base that it was trained on"
            )
        if f"{module}.magnitude" in tensors and tensors[f"{module}.magnitude"].shape != weight.shape[:1]:
            raise BundleError(f"the adapter's '{module}' needs {len(weight)} magnitudes, for the base's rows")
    changed = dict(tensors)
    for name in [name for name in tensors if not name.endswith(_PIECES)]:
        if name not in base or base[name].shape != tensors[name].shape:
            found = "none" if name not in base else f"one {tuple(base[name].shape)}"
            raise BundleError(f"the adapter has '{name}' {tuple(tensors[name].shape)}, the base has {found}")
        if torch.equal(base[name].float(), tensors[name]):
            del changed[name]
    shared = sorted({EMBEDDING, POSITIONS} & set(changed))
    if shared:
        raise UnsupportedModelError(f"the adapter changes {shared}, which all members share; train without them")
    return changed


def merge(base: Tensors, tensors: Tensors) -> dict[str, Tensor]:
    """The changed weights and biases, and no others, in float32: W + B A, for DoRA with its rows scaled to the
    magnitudes. Raises what `fit` raises."""
    changed = fit(base, tensors)
    result = {name: tensor for name, tensor in changed.items() if not name.endswith(_PIECES)}
    for module in adapted_modules(changed):
        name = f"{module}.weight"
        own = result.get(name, base[EMBEDDING] if name == HEAD and HEAD not in base else base.get(name))
        assert own is not None
        weight = own.float() + changed[f"{module}.lora_b"] @ changed[f"{module}.lora_a"]
        if f"{module}.magnitude" in changed:
            weight = weight * (changed[f"{module}.magnitude"] / weight.norm(dim=1))[:, None]
        result[name] = weight
    return result


class AdapterLinear(nn.Module):
    """A frozen linear layer with an adapter: y = W x + B (A x)."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(lora_a, requires_grad=False)
        self.lora_b = nn.Parameter(lora_b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] → [..., N]
        result: Tensor = self.base(x)
        return result + (x @ self.lora_a.T) @ self.lora_b.T


def attach(decoder: Decoder, pairs: Tensors) -> Decoder:
    """Add an adapter that is pairs A, B alone to the layers of `decoder`, in place. Raises `BundleError` if it does not
    fit."""
    for module in adapted_modules(fit(dict(decoder.named_parameters()), pairs)):
        parent, _, name = module.rpartition(".")
        linear = decoder.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        halves = pairs[f"{module}.lora_a"], pairs[f"{module}.lora_b"]
        setattr(decoder.get_submodule(parent), name, AdapterLinear(linear, *halves))
    return decoder


@contextmanager
def attached(decoder: Decoder, pairs: Tensors) -> Iterator[None]:
    """`attach` inside the block."""
    before = {module: decoder.get_submodule(module) for module in adapted_modules(pairs)}
    attach(decoder, pairs)
    try:
        yield
    finally:
        for module, linear in before.items():
            parent, _, name = module.rpartition(".")
            setattr(decoder.get_submodule(parent), name, linear)


def random_adapter(
    decoder: Decoder, targets: tuple[str, ...] | None, rank: int, *, seed: int, scale: float
) -> dict[str, Tensor]:
    """A random adapter, for tests and for timing. B A x has about the size `scale` · |x|. `targets`: short names of
    projections; None: all. Raises `ConfigError`."""
    known = decoder_layout(decoder.config).targets
    targets = known if targets is None else targets
    unknown = sorted(set(targets) - set(known))
    if unknown or rank < 1:
        raise ConfigError(f"an adapter has a rank of at least 1 and targets of {known}, got {rank} and {unknown}")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, linear in decoder.named_modules():
        if isinstance(linear, nn.Linear) and module.endswith(targets):
            a = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
            tensors[f"{module}.lora_a"] = a
            tensors[f"{module}.lora_b"] = scale * torch.randn(linear.out_features, rank, generator=generator)
    return tensors
