"""`GraphInterface`: the inputs and outputs of a decoder graph that another program exported, checked against its sizes.

    input_ids [batch, sequence]      attention_mask [batch, past + sequence]      position_ids [batch, sequence]
    past_key_values.N.key, .value [batch, kv_heads, past, head_size]

    logits [batch, sequence, vocab]  present.N.key, .value [batch, kv_heads, past + sequence, head_size]

`attention_mask` and `position_ids` may be absent. These are the names and shapes of Optimum's exporter, and of ONNX Runtime's
own model builder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import UnsupportedModelError, shown
from ...model.decoder_graph import GraphConfig

_INTEGERS: Mapping[str, Any] = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_FLOATS: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ROWS = {"input_ids": 2, "attention_mask": 2, "position_ids": 2}  # dimensions
_KEYS = re.compile(r"(past_key_values|present)\.(0|[1-9][0-9]{0,5})\.(key|value)", re.ASCII)
# Inputs that other kinds of graphs have, and what to do about them.
_OTHERS = {
    "use_cache_branch": "the graph is two graphs merged by an old exporter; export the model again with optimum-onnx, which "
    "writes one graph without this input",
    "inputs_embeds": "the graph reads embeddings; export one that reads input_ids",
    "encoder_hidden_states": "the graph attends to an encoder's output; Motet serves decoders alone",
    "encoder_attention_mask": "the graph attends to an encoder's output; Motet serves decoders alone",
}


class Value(Protocol):
    """An input or output as ONNX Runtime describes it."""

    name: str
    type: str
    shape: Sequence[Any] | None  # a number, a name, or None for each dimension


@dataclass(frozen=True, slots=True)
class GraphInterface:
    """What a graph that can be run is given. `rows`: the type of each of input_ids, attention_mask and position_ids that
    it has."""

    rows: Mapping[str, npt.DTypeLike]
    caches: tuple[str, ...]  # N.key and N.value of each layer
    cache_type: npt.DTypeLike

    @classmethod
    def of(cls, inputs: Sequence[Value], outputs: Sequence[Value], config: GraphConfig) -> GraphInterface:
        """Raises `UnsupportedModelError` for an input or output that is missing or unknown, or has another type or shape."""
        caches = tuple(f"{layer}.{kind}" for layer in range(config.num_layers) for kind in ("key", "value"))
        rows: dict[str, npt.DTypeLike] = {}
        found: dict[str, npt.DTypeLike] = {}
        for value in inputs:
            if value.name in _ROWS:
                rows[value.name] = _type(value, _INTEGERS)
                _check_shape(value, (None, None))
            else:
                name = _cache_name(value.name, "past_key_values", caches)
                found[name] = _type(value, _FLOATS)
                _check_shape(value, (None, config.num_kv_heads, None, config.head_size))
        if "input_ids" not in rows:
            raise UnsupportedModelError(
                f"the graph has no input input_ids, only {shown(sorted(v.name for v in inputs))}"
            )
        if not found:
            raise UnsupportedModelError(
                "the graph has no inputs past_key_values.N.key, so it cannot go on from what it has read; export it with "
                "`--task text-generation-with-past`"
            )
        _check_all("input past_key_values", caches, found)
        if len(set(found.values())) > 1:
            raise UnsupportedModelError("the graph's inputs past_key_values have several types; one is needed for all")
        cache_type = next(iter(found.values()))
        presents = set()
        for value in outputs:
            if value.name == "logits":
                _type(value, _FLOATS)
                _check_shape(value, (None, None, config.vocab_size))
                continue
            presents.add(_cache_name(value.name, "present", caches))
            if _type(value, _FLOATS) is not cache_type:
                raise UnsupportedModelError(
                    f"the graph's output {value.name} has another type than its past_key_values"
                )
            _check_shape(value, (None, config.num_kv_heads, None, config.head_size))
        if all(value.name != "logits" for value in outputs):
            raise UnsupportedModelError(
                f"the graph has no output logits, only {shown(sorted(v.name for v in outputs))}"
            )
        _check_all("output present", caches, presents)
        return cls(rows, caches, cache_type)


def _cache_name(name: str, prefix: str, caches: Sequence[str]) -> str:
    """N.key or N.value. Raises `UnsupportedModelError` for a name that is none of the model's."""
    match = _KEYS.fullmatch(name)
    short = name.partition(".")[2]
    if match is not None and match[1] == prefix:
        if short in caches:
            return short
        raise UnsupportedModelError(f"the graph has {shown(name)}, and config.json says {len(caches) // 2} layers")
    kind = "input" if prefix == "past_key_values" else "output"
    reason = _OTHERS.get(name)
    if reason is None and ".encoder." in name:
        reason = "the graph attends to an encoder's output; Motet serves decoders alone"
    if reason is None:
        known = (
            [*_ROWS, "past_key_values.N.key and .value"] if kind == "input" else ["logits", "present.N.key and .value"]
        )
        reason = f"known are {', '.join(known)}; export the graph without it"
    raise UnsupportedModelError(f"the graph has the {kind} {shown(name)}: {reason}")


def _check_all(what: str, expected: Sequence[str], found: Any) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise UnsupportedModelError(
            f"the graph has no {what}.{missing[0]}, and config.json says {len(expected) // 2} layers with keys and values"
        )


def _type(value: Value, known: Mapping[str, Any]) -> Any:
    if value.type not in known:
        raise UnsupportedModelError(
            f"the graph's {value.name} is {value.type}, known are {', '.join(known)}; export it with one of them"
        )
    return known[value.type]


def _check_shape(value: Value, expected: Sequence[int | None]) -> None:
    """None: any size, which the graph must not fix. A size that the graph leaves open is checked when it is run."""
    shape = list(value.shape or [])
    fits = len(shape) == len(expected) and all(
        not isinstance(size, int) or size == wanted for size, wanted in zip(shape, expected)
    )
    if value.name == "logits" and len(shape) == 3 and shape[1] == 1:  # of the last position alone
        fits = _fits_last(shape, expected)
    if not fits:
        wanted_shape = ["any" if size is None else size for size in expected]
        raise UnsupportedModelError(
            f"the graph's {value.name} has the shape {shown(shape)}, needed is {wanted_shape} (by config.json); export it with "
            "sizes of batch and sequence that may vary, and beside its own config.json"
        )


def _fits_last(shape: Sequence[Any], expected: Sequence[int | None]) -> bool:
    return not isinstance(shape[0], int) and (not isinstance(shape[2], int) or shape[2] == expected[2])
