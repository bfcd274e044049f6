"""PEFT's adapter format (Mangrulkar et al. 2022), read and written without PEFT: adapter_config.json, the *settings*,
and the stored tensors of adapter_model.safetensors.

Read: LoRA (Hu et al. 2021), rsLoRA, ranks and alphas by pattern, DoRA (Liu et al. 2024), trained biases, modules that
are saved whole. PEFT itself skips tensors and settings that it does not know; here everything is used or refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import BundleError, UnsupportedModelError
from ...model.config import DecoderConfig
from ...model.families import FAMILIES
from ...model.families.family import Family
from ...model.layout import Part, decoder_layout
from ..fused import join_rows, split_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Settings = Mapping[str, Any]
F32 = npt.NDArray[np.float32]

_PREFIX = "base_model.model."
_USED = {
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "use_dora",
    "init_lora_weights", "base_model_name_or_path",
}  # fmt: skip
# Settings of the training, or of options that are off unless another setting, which is refused, turns them on. PEFT
# sets fan_in_fan_out itself, to how the base stores its weights.
_NO_BEARING = {
    "lora_dropout", "inference_mode", "peft_version", "auto_mapping", "revision", "fan_in_fan_out", "megatron_core",
    "qalora_group_size", "eva_config",
}  # fmt: skip
# These leave the base's weights as they are. Others, such as pissa, train beside a base that they have changed.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_LORA = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_PIECES = {"lora_A": ("lora_a", 2), "lora_B": ("lora_b", 2), "lora_magnitude_vector": ("magnitude", 1)}  # dimensions


# ---- names -----------------------------------------------------------------------------------------------------------


def _model_name(family: Family, canonical: str) -> str | None:
    """The name that a module has in transformers' model; None if the model has no such module."""
    if not family.modules or canonical == "lm_head":
        return canonical
    number = re.search(r"(?<=\.)\d+(?=\.)", canonical)
    pattern = canonical if number is None else f"{canonical[: number.start()]}{{}}{canonical[number.end() :]}"
    found = next((name for name, own in family.modules.items() if own == pattern), None)
    return None if found is None else family.prefix + found.format(number and number[0])


def _modules(config: DecoderConfig) -> dict[str, tuple[Part, ...]]:
    """Name in transformers' model of each module that an adapter may change → its parts: more than one where the model
    has a fused layer."""
    family = FAMILIES[config.family]
    modules: dict[str, tuple[Part, ...]] = {}
    for linear in decoder_layout(config).linears:
        fused = _model_name(family, linear.name) if family.modules else None
        if fused is not None:
            modules[fused] = linear.parts
        else:
            modules |= {_model_name(family, part.name) or part.name: (part,) for part in linear.parts}
    return modules | {"lm_head": (Part("lm_head", config.vocab_size),)}


def _head_name(settings: Settings, stored: Collection[str], config: DecoderConfig) -> str:
    """The name that the adapter has for the head: "lm_head", or one that older releases of transformers gave it. Raises
    `BundleError` if it has both."""
    named: set[str] = set()
    for spec in (settings.get("target_modules"), settings.get("modules_to_save")):
        named |= {spec} if isinstance(spec, str) else set(spec or ())
    named |= {name.removeprefix(_PREFIX).partition(".")[0] for name in stored}
    heads = [name for name, own in FAMILIES[config.family].modules.items() if own == "lm_head" and name in named]
    if len(heads) > 1:
        raise BundleError(
            f"the adapter names the head {' and '.join(sorted(heads))}; it has one head, and one name for it"
        )
    return heads[0] if heads else "lm_head"


def _split(config: DecoderConfig, parts: tuple[Part, ...], rows: Tensor) -> dict[str, Tensor]:
    """Part's name → its rows of a tensor of the whole module."""
    if len(rows) != sum(part.rows for part in parts):
        return {part.name: rows for part in parts}  # a wrong shape, which `fit` reports
    return split_rows(config, {part.name: part.rows for part in parts}, rows)


# ---- reading ---------------------------------------------------------------------------------------------------------


def decode(settings: Settings, stored: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """The tensors of an adapter as Motet names them (see `adapter`), in float32, from PEFT's settings and stored
    tensors. `config`: the base's. Raises `UnsupportedModelError` for a setting or tensor that Motet cannot use,
    `BundleError` if settings and tensors do not agree."""
    _check_settings(settings)
    head = _head_name(settings, stored, config)
    modules = {head if name == "lm_head" else name: parts for name, parts in _modules(config).items()}
    norms = decoder_layout(config).norm_tensors
    result: dict[str, Tensor] = {}
    adapted: set[str] = set()
    whole: set[str] = set()
    for key, tensor in stored.items():
        if not key.startswith(_PREFIX):
            raise BundleError(f"an adapter's tensors are named {_PREFIX}…, this one has '{key}'")
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        tensor = tensor.float()
        found = _LORA.fullmatch(name)
        if found and found[1] in modules:
            adapted.add(found[1])
            piece, ndim = _PIECES[found[2]]
            if tensor.ndim != ndim:
                raise BundleError(f"the adapter's '{key}' must have {ndim} dimensions, it is {tuple(tensor.shape)}")
            if piece == "lora_a":
                _check_rank(settings, found[1], tensor)
                result |= {f"{part.name}.lora_a": tensor for part in modules[found[1]]}
            else:
                tensor = tensor * _scale(settings, found[1]) if piece == "lora_b" else tensor
                result |= {f"{part}.{piece}": rows for part, rows in _split(config, modules[found[1]], tensor).items()}
        elif "lora_" in name:
            raise UnsupportedModelError(
                f"the adapter's tensor '{key}' cannot be used: low-rank updates of {sorted(_short_names(modules))} are "
                "read, not those of embeddings or other modules, and of each lora_A, lora_B and the magnitudes of DoRA"
            )
        else:
            whole.add(name)
            result |= _whole(config, modules, norms, name, tensor)
    _check_targets(settings, modules, adapted, whole, head)
    return result


def _whole(
    config: DecoderConfig, modules: Mapping[str, tuple[Part, ...]], norms: Collection[str], name: str, tensor: Tensor
) -> dict[str, Tensor]:
    family = FAMILIES[config.family]
    module, _, kind = name.rpartition(".")
    if module in modules:
        turned = tensor.t() if family.transposed and module != "lm_head" and tensor.ndim == 2 else tensor
        return {f"{part}.{kind}": rows.contiguous() for part, rows in _split(config, modules[module], turned).items()}
    if name.startswith(tuple(family.encoders)):
        raise UnsupportedModelError(
            f"the adapter's tensor '{_PREFIX}{name}' is of an encoder, which members share with the base; train without it in "
            "modules_to_save and bias"
        )
    canonical = family.canonical_name(name)
    if canonical is None:
        return {}
    return {canonical: tensor + family.norm_offset if canonical in norms else tensor}


def _check_settings(settings: Settings) -> None:
    kind, task, init = (settings.get(name) for name in ("peft_type", "task_type", "init_lora_weights"))
    if kind != "LORA":
        raise UnsupportedModelError(f"the adapter's peft_type is {kind!r}; LORA can be used, merge others with PEFT")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedModelError(f"the adapter's task_type is {task!r}; a language model's is CAUSAL_LM")
    if init not in _INITS:
        raise UnsupportedModelError(
            f"the adapter's init_lora_weights is {init!r}, which changes the base too; convert it to plain LoRA with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…) of PEFT"
        )
    on = {name: value for name, value in settings.items() if name not in _USED | _NO_BEARING and value}
    if on:
        raise UnsupportedModelError(f"the adapter's settings {on} cannot be used; merge it into its base with PEFT")
    sizes = [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
    alphas = [settings.get("lora_alpha"), *(settings.get("alpha_pattern") or {}).values()]
    if not all(type(size) is int and size > 0 for size in sizes) or not all(
        type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas
    ):
        raise BundleError(f"{CONFIG} must have whole ranks above 0 and finite alphas, it has {sizes} and {alphas}")
    wrong = [name for name in ("use_rslora", "use_dora") if settings.get(name) not in (None, True, False)]
    if wrong:
        raise BundleError(f"{wrong} in {CONFIG} must be true or false")
    if settings.get("bias", "none") not in ("none", "all", "lora_only"):
        raise BundleError(f"bias in {CONFIG} is none, all or lora_only, got {settings['bias']!r}")


def _by_pattern(settings: Settings, name: str, module: str, default: str) -> Any:
    """A setting of one module: that of the first pattern which its name ends with, as PEFT does it."""
    patterns = settings.get(name) or {}
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, settings[default])


def _scale(settings: Settings, module: str) -> float:
    rank = _by_pattern(settings, "rank_pattern", module, "r")
    alpha: float = _by_pattern(settings, "alpha_pattern", module, "lora_alpha")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _check_rank(settings: Settings, module: str, lora_a: Tensor) -> None:
    rank = _by_pattern(settings, "rank_pattern", module, "r")
    if len(lora_a) != rank:
        raise BundleError(f"the adapter's '{module}' has rank {len(lora_a)}, {CONFIG} says {rank}")


def _check_targets(
    settings: Settings, modules: Mapping[str, tuple[Part, ...]], adapted: set[str], whole: set[str], head: str
) -> None:
    """Raises `BundleError` unless the modules with tensors are those that the settings name."""
    targets = {module for module in modules if _is_target(settings, module, head)}
    if targets != adapted:
        raise BundleError(
            f"{CONFIG} and the tensors do not agree: modules without tensors {sorted(targets - adapted)[:4]}, tensors of "
            f"modules that are no targets {sorted(adapted - targets)[:4]}"
        )
    saved = settings.get("modules_to_save") or ()
    empty = [name for name in saved if not any(f".{name}." in f".{tensor}" for tensor in whole)]
    if empty:
        raise BundleError(f"{CONFIG} says that {empty} are saved whole (modules_to_save), but no tensor is theirs")
    if settings.get("use_dora") and not adapted:
        raise BundleError(f"{CONFIG} has use_dora, but there are no low-rank updates")


def _is_target(settings: Settings, module: str, head: str) -> bool:
    """Whether PEFT would adapt the module."""
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    saved = settings.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved) or (excluded and _names(excluded, module)):
        return False
    if targets == "all-linear":
        return module != head
    if not targets or not _names(targets, module):
        return False
    layers = settings.get("layers_to_transform")
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    given = settings.get("layers_pattern") or r"[^.]*"
    patterns = [given] if isinstance(given, str) else given
    number = next(filter(None, (re.match(rf"(?:^|.*?\.){one}\.(\d+)\.", module) for one in patterns)), None)
    return number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else layers)


def _names(spec: Any, module: str) -> bool:
    """Whether a list of names, or a regular expression, names the module."""
    if isinstance(spec, str):
        return re.fullmatch(spec, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in spec)


# ---- writing ---------------------------------------------------------------------------------------------------------


def stack(parts: Sequence[Part], pairs: Mapping[str, Any]) -> tuple[F32, F32]:
    """(A, B) of a fused linear layer, [rank, columns] and [rows, rank], from the pairs of its parts: the A are stacked,
    the B are blocks of a larger B. Parts that have the same A share it; a part without a pair has rows of zeros in B.
    """
    present = [part.name for part in parts if f"{part.name}.lora_a" in pairs]
    halves = [np.asarray(pairs[f"{name}.lora_a"], np.float32) for name in present]
    shared = all(np.array_equal(half, halves[0]) for half in halves)
    a = halves[0] if shared else np.concatenate(halves)
    b = np.zeros((sum(part.rows for part in parts), len(a)), np.float32)
    row = column = 0
    for part in parts:
        if part.name in present:
            own = np.asarray(pairs[f"{part.name}.lora_b"], np.float32)
            b[row : row + part.rows, column : column + own.shape[1]] = own
            column += 0 if shared else own.shape[1]
        row += part.rows
    return a, b


def encode(
    pairs: Mapping[str, Tensor], config: DecoderConfig, *, scale: float, base: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's settings and stored tensors of low-rank updates: `<module>.lora_a` and `.lora_b` of the same projections
    in each adapted layer; the update is scale · B A. `base`: the base's name."""
    stored: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    modules = _modules(config)
    for module, parts in modules.items():
        if any(f"{part.name}.lora_a" in pairs for part in parts):
            a, b = (torch.from_numpy(half) for half in stack(parts, pairs))
            b = join_rows(config, {part.name: part.rows for part in parts}, b)
            stored |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
            ranks[module] = len(a)
    names = _short_names(modules)
    targets = {names[module]: rank for module, rank in ranks.items()}
    layers = sorted({_layer(module) for module in ranks})
    assert {(_layer(m), names[m]) for m in ranks} == set(product(layers, targets)), "the same projections in each layer"
    rank = min(targets.values())
    others = {name: size for name, size in targets.items() if size != rank}  # fused from parts with a rank each
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": {re.escape(name): size for name, size in others.items()},
        "alpha_pattern": {re.escape(name): scale * size for name, size in others.items()},
        "target_modules": sorted(targets),
        "layers_to_transform": None if len(layers) == config.num_layers else layers,
        "fan_in_fan_out": FAMILIES[config.family].transposed,
        "bias": "none",
        "inference_mode": True,
    }
    return settings, stored


def _layer(module: str) -> int:
    found = re.search(r"\.(\d+)\.", module)
    assert found is not None
    return int(found[1])


def _short_names(modules: Mapping[str, Any]) -> dict[str, str]:
    """Module → its name without what precedes the layer: the last word where that names one projection only."""
    paths = {module: re.split(r"\.\d+\.", module)[-1] for module in modules}
    last = {path: path.rpartition(".")[2] for path in paths.values()}
    words = list(last.values())
    return {module: last[path] if words.count(last[path]) == 1 else path for module, path in paths.items()}
