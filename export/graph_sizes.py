"""The sizes of a decoder graph, from the config.json or genai_config.json beside it. The other settings of both are in the
graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import BundleError, NotFoundError, UnsupportedModelError, shown
from ..runtime.model.decoder_graph import GraphConfig
from ..runtime.model.files import read_object

CONFIG, GENAI = "config.json", "genai_config.json"
# The names that families have for a size.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_NAMES = {
    "vocab_size": ("vocab_size",),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "max_position_embeddings": CONTEXT_NAMES,
}
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_GENAI_MODEL = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "type", "context_length", "vocab_size", "decoder"),
}
_GENAI_DECODER = {
    *("session_options", "filename", "head_size", "hidden_size", "inputs", "outputs", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads"),
}
# What genai_config.json calls an input or output → its name in a graph that can be served.
_GENAI_NAMES = {
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
}


def read_settings(path: Path) -> dict[str, Any]:
    """What config.json or genai_config.json says. Raises `BundleError` for a file that is no JSON object."""
    return read_object(path, "export the graph again")


def read_sizes(folder: Path) -> GraphConfig:
    """Of the files in a folder; if there are both, they must agree. Raises `NotFoundError` without any, `BundleError` for a
    damaged one, `UnsupportedModelError` for a size that is missing and for settings that a decoder alone does not have."""
    found = {}
    if (folder / CONFIG).is_file():
        found[CONFIG] = _sizes(read_settings(folder / CONFIG), folder / CONFIG)
    if (folder / GENAI).is_file():
        found[GENAI] = _genai_sizes(read_settings(folder / GENAI), folder / GENAI)
    if not found:
        raise NotFoundError(
            f"'{folder}' has neither {CONFIG} nor {GENAI}, which a graph's sizes are read from; copy it there"
        )
    first = next(iter(found.values()))
    for name, sizes in found.items():
        if sizes != first:
            raise BundleError(f"{CONFIG} of '{folder}' says {first}, and {name} says {sizes}; delete the wrong one")
    return first


def genai_graph(path: Path) -> str:
    """The graph that a genai_config.json names. Raises `BundleError` or `UnsupportedModelError`."""
    decoder = _decoder(read_settings(path), path)
    name = decoder.get("filename")
    if not isinstance(name, str) or Path(name).name != name:
        raise UnsupportedModelError(f"'{path}' names the graph {shown(name)}; it must be a file beside it")
    return name


def _sizes(values: Mapping[str, Any], path: Path) -> GraphConfig:
    if values.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"'{path}' describes an encoder and a decoder; Motet serves decoders alone")
    sizes = {name: _first(values, names, path) for name, names in _NAMES.items()}
    heads = _first(values, _HEADS, path)
    if values.get("multi_query") and not values.get("new_decoder_architecture"):  # falcon
        kv_heads = 1
    else:
        kv_heads = next((values[name] for name in _KV_HEADS if values.get(name) is not None), heads)
    head_size = values.get("head_dim")
    if head_size is None:
        hidden = _first(values, _HIDDEN, path)
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
            raise UnsupportedModelError(
                f"'{path}' has {shown(heads)} heads, which do not divide {shown(hidden)}, and no head_dim; add head_dim"
            )
        head_size = hidden // heads
    return GraphConfig(**sizes, num_kv_heads=kv_heads, head_size=head_size)


def _first(values: Mapping[str, Any], names: tuple[str, ...], path: Path) -> Any:
    for name in names:
        if values.get(name) is not None:
            return values[name]
    raise UnsupportedModelError(f"'{path}' has no {' or '.join(names)}, which the graph is served with; add it")


def _decoder(values: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    model = values.get("model")
    decoder = model.get("decoder") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(decoder, Mapping):
        raise BundleError(f"'{path}' has no model with a decoder; export the graph again")
    for place, found, known in (("model", model, _GENAI_MODEL), ("model.decoder", decoder, _GENAI_DECODER)):
        unknown = sorted(set(found) - known)
        if unknown:
            raise UnsupportedModelError(
                f"'{path}' has settings in {place} that are not served: {unknown}; known are {sorted(known)}"
            )
    return decoder


def _genai_sizes(values: Mapping[str, Any], path: Path) -> GraphConfig:
    decoder, model = _decoder(values, path), values["model"]
    for kind, known in _GENAI_NAMES.items():
        names = decoder.get(kind, {})
        if not isinstance(names, Mapping) or any(known.get(key) != name for key, name in names.items()):
            raise UnsupportedModelError(
                f"'{path}' has the {kind} {shown(names)}; known are {known}: export the graph with these names"
            )
    sizes: dict[str, Any] = {  # null where there is none, which `GraphConfig` refuses by name
        "vocab_size": model.get("vocab_size"),
        "num_layers": decoder.get("num_hidden_layers"),
        "num_kv_heads": decoder.get("num_key_value_heads"),
        "head_size": decoder.get("head_size"),
        "max_position_embeddings": model.get("context_length"),
    }
    return GraphConfig(**sizes)
