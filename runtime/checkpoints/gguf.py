"""A GGUF file → a model directory as Hugging Face's libraries read it. Needs the package gguf.

Every key and every tensor of the file is used, known to change nothing, or refused by name. transformers' own reader fills
missing tensors with random numbers and ignores what it does not know, so it is not used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, UnsupportedModelError, shown
from ..model.files import check_space
from .gguf_architectures import ARCHITECTURES, OPTIONAL, Architecture, File
from .gguf_names import EXPERTS
from .gguf_tokenizer import KEYS, check_tokenizer, end_tokens, write_tokenizer

F32 = npt.NDArray[np.float32]

# Keys that describe the file.
_DESCRIPTIVE = ("general.", "GGUF.", "quantize.")


def convert_gguf(path: Path, out: Path, on_tensor: Callable[[int], None] = lambda size: None) -> None:
    """Write config.json, generation_config.json, model.safetensors (float32) and the tokenizer of a GGUF file into the folder
    `out`. `on_tensor(bytes)` is called for each tensor.

    Raises `DataError` if the file is damaged, `UnsupportedModelError` for an architecture, key or tensor that is not
    computed, or one part of a split file. That tensors are complete and have the right shapes is checked by
    `read_weights`, which reads the result.
    """
    from safetensors.numpy import save_file

    try:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = list(reader.tensors)
    except Exception as error:  # a torn file fails in many ways inside the reader
        raise DataError(f"'{path}' cannot be read as GGUF: {error}") from error
    architecture = _architecture(path, metadata)
    config = _config(path, metadata, architecture, {tensor.name: tensor for tensor in tensors})
    check_space(out, 4 * sum(int(tensor.n_elements) for tensor in tensors), f"'{path.name}' in float32")
    weights: dict[str, F32] = {}
    for tensor in tensors:
        if tensor.name == _FACTORS and architecture.family == "llama":
            config |= _scaled_rope(path, _values(path, tensor), config)
            continue
        if tensor.name in architecture.tensors:
            continue
        for name, values in _weights(path, tensor, architecture, config):
            if name in weights:
                raise DataError(f"'{path}' holds the tensor '{tensor.name}' twice")
            weights[name] = values
            on_tensor(values.nbytes)
    eos = end_tokens(metadata) or None
    config |= {
        "tie_word_embeddings": architecture.modules.get("output", "") + ".weight" not in weights,
        "vocab_size": _vocab_size(path, architecture, weights, metadata),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}, indent=1) + "\n")
    write_tokenizer(path, metadata, out)


def _architecture(path: Path, metadata: Mapping[str, Any]) -> Architecture:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"'{path}' has the architecture {shown(name)}; GGUF files of {sorted(ARCHITECTURES)} are read"
        )
    if metadata.get("split.count", 1) != 1:
        raise UnsupportedModelError(
            f"'{path}' is one of {metadata['split.count']} parts of a split model; merge them first (llama-gguf-split --merge)"
        )
    return ARCHITECTURES[name]


def _config(
    path: Path, metadata: Mapping[str, Any], architecture: Architecture, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json, but for what depends on the weights' shapes. Refuses keys that are not read."""
    prefix = f"{metadata['general.architecture']}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    missing = [key for key in architecture.keys if key not in values and key not in OPTIONAL]
    if missing:
        raise DataError(f"'{path}' lacks the keys {[prefix + key for key in missing]}")
    config: dict[str, Any] = {
        "model_type": architecture.family,
        "architectures": [architecture.name],
        "dtype": "float32",
        **architecture.fixed,
    }
    config |= {name: values.pop(key) for key, name in architecture.keys.items() if key in values}
    for key, name in architecture.keys.items():
        value = config.get(name)
        if isinstance(value, list):
            raise UnsupportedModelError(f"'{path}' has another {name} for each layer, which is not computed here")
        number = (int, float) if key.endswith(("epsilon", "freq_base", "scale")) else (int,)
        if value is not None and not (type(value) in number and value > 0):
            kind = "number" if float in number else "whole number"
            raise DataError(f"'{path}' has {prefix}{key}={shown(value)}; it must be a {kind} above 0")
    hidden, heads = (config[architecture.keys[key]] for key in ("embedding_length", "attention.head_count"))
    head_size = config.get("head_dim", hidden // heads)
    if "rms_norm_eps" in config:
        config["head_dim"] = head_size
        config.setdefault("num_key_value_heads", heads)
        config["rope_parameters"] = _rope(path, values, config.pop("rope_theta", 10000.0), bool(architecture.tensors))
    _check_layers(path, tensors, config[architecture.keys["block_count"]])
    if architecture.own is not None:
        architecture.own(File(path, values, tensors, lambda tensor: _values(path, tensor)), config, values)
    neutral: dict[str, Any] = {
        "vocab_size": values.get("vocab_size"),  # compared with the embedding
        "attention.head_count_kv": heads,
        "attention.value_length": head_size,
        "attention.key_length": head_size,  # if it is none of the architecture's own keys
        "rope.dimension_count": head_size,
        "attention.causal": True,
        "expert_count": 0,
        "expert_used_count": 0,
        "expert_shared_count": 0,
        "expert_weights_norm": config.get("norm_topk_prob"),
        "expert_weights_scale": 1.0,
    }
    for key, value in values.items():
        if key not in neutral or value != neutral[key]:
            raise UnsupportedModelError(f"'{path}' has {prefix}{key}={shown(value)}, which is not computed here")
    for key in metadata:
        known = key.startswith((prefix, *_DESCRIPTIVE, "split.")) or key in KEYS
        if not known:
            raise UnsupportedModelError(f"'{path}' has the key '{key}', which is not read here")
    check_tokenizer(path, metadata)
    return config


def _check_layers(path: Path, names: Iterable[str], stated: int) -> None:
    """Before anything is made for each layer."""
    found = len({name.split(".")[1] for name in names if name.startswith("blk.")})
    if found != stated:
        raise DataError(f"'{path}' has tensors of {found} layers, and block_count is {stated}")


def _rope(path: Path, values: dict[str, Any], theta: float, longrope: bool) -> dict[str, Any]:
    """rope_parameters of config.json. Takes the keys that it uses out of `values`; the others are then refused. `longrope`:
    whether the architecture can have it."""
    kind = values.pop("rope.scaling.type", "none")
    if kind == "linear" and "rope.scaling.factor" in values:
        return {"rope_type": "linear", "rope_theta": theta, "factor": values.pop("rope.scaling.factor")}
    if kind == "longrope" and longrope:
        return {"rope_type": "longrope", "rope_theta": theta}
    if kind != "none":
        raise UnsupportedModelError(f"'{path}' has rope scaling of type {shown(kind)}; known are 'none' and 'linear'")
    return {"rope_type": "default", "rope_theta": theta}


_FACTORS = "rope_freqs.weight"  # by which the frequencies of Llama 3.1 and later are divided


def _scaled_rope(path: Path, factors: F32, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's keys of a rotation whose frequencies are divided by these factors."""
    given = config["rope_parameters"]
    if given["rope_type"] != "default" or factors.shape != (config["head_dim"] // 2,) or not (factors > 0).all():
        raise UnsupportedModelError(
            f"'{path}' has {_FACTORS} of {factors.shape} with the rope scaling {given['rope_type']!r}; one factor above 0 for "
            f"each pair of {config['head_dim']} channels is read, without another scaling"
        )
    scaling = {"rope_type": "longrope", "attention_factor": 1.0}
    own = dict.fromkeys(("short_factor", "long_factor"), factors.astype(float).tolist())
    return {"rope_parameters": {**given, **scaling, **own}}


def _weights(
    path: Path, tensor: Any, architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[tuple[str, F32]]:
    """Names and values of a tensor as the family's checkpoints have them: of experts, one for each."""
    module, _, kind = tensor.name.rpartition(".")
    number = re.search(r"(?<=^blk\.)\d+(?=\.)", module)
    pattern = module if number is None else f"blk.{{}}{module[number.end() :]}"
    experts = "num_experts" in config and pattern in EXPERTS and kind == "weight" and len(tensor.shape) == 3
    modules = architecture.modules_of(config)
    if not experts and (pattern not in modules or kind not in ("weight", "bias")):
        raise UnsupportedModelError(
            f"'{path}' holds the tensor '{tensor.name}', which is not computed here for the architecture {architecture.family}"
        )
    values = _values(path, tensor)
    if experts:
        assert number is not None
        for index, one in enumerate(values):
            yield f"model.layers.{number[0]}.mlp.experts.{index}.{EXPERTS[pattern]}.weight", np.ascontiguousarray(one)
        return
    if architecture.permuted and module.endswith((".attn_q", ".attn_k")):
        heads = config["num_attention_heads" if module.endswith("_q") else "num_key_value_heads"]
        if values.shape[0] % (2 * heads):
            raise DataError(f"the tensor '{tensor.name}' of '{path}' has {values.shape[0]} rows for {heads} heads")
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    if architecture.grouped and module.endswith(".attn_qkv"):
        values = _grouped(path, tensor.name, values, config)
    if architecture.norm_offset and module.endswith("_norm"):
        values = values - np.float32(architecture.norm_offset)
    if architecture.transposed and values.ndim == 2 and number is not None:
        values = values.T
    yield f"{modules[pattern].format(number and number[0])}.{kind}", np.ascontiguousarray(values)


def _grouped(path: Path, name: str, values: F32, config: Mapping[str, Any]) -> F32:
    """All queries, keys and values, one after the other → for each head of keys its queries, its key and its value."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_kv_heads", heads)
    size = config["hidden_size"] // heads
    if heads % kv_heads or values.shape[0] != (heads + 2 * kv_heads) * size:
        raise DataError(
            f"the tensor '{name}' of '{path}' has {values.shape[0]} rows for {heads} heads of {size} channels, {kv_heads} of keys"
        )
    parts = np.split(values, [heads * size, (heads + kv_heads) * size])
    own = [part.reshape(kv_heads, -1, *values.shape[1:]) for part in parts]
    return np.concatenate(own, axis=1).reshape(values.shape)


def _values(path: Path, tensor: Any) -> F32:
    from gguf import dequantize

    try:
        values: F32 = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
    except Exception as error:  # of a type that the package does not widen, or of another size
        raise DataError(f"the tensor '{tensor.name}' of '{path}' cannot be read: {error}") from error
    if not np.isfinite(values).all():
        raise DataError(f"the tensor '{tensor.name}' of '{path}' holds NaN or infinite values")
    return values


def _vocab_size(path: Path, architecture: Architecture, weights: Mapping[str, F32], metadata: Mapping[str, Any]) -> int:
    """Rows of the embedding; the file's other counts of the vocabulary must fit."""
    name = architecture.modules["token_embd"] + ".weight"
    if name not in weights:
        raise DataError(f"'{path}' lacks the tensor 'token_embd.weight'")
    rows, tokens = len(weights[name]), len(metadata.get("tokenizer.ggml.tokens", ()))
    stated = metadata.get(f"{metadata['general.architecture']}.vocab_size", rows)
    if tokens > rows or stated != rows:
        raise DataError(f"'{path}' has an embedding of {rows} tokens, a vocabulary of {tokens}, and states {stated}")
    return rows
