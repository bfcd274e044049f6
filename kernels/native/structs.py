"""Structs and enumerations of `cpp/motet.h` that describe a model and a batch. Those of samples: `sampling.py`."""

from __future__ import annotations

import ctypes
from enum import IntEnum


class LinearKind(IntEnum):
    """Linear layers, as `motet.h` numbers them. `UP` is gate and up stacked where there is a gate."""

    QKV = 0
    OUT = 1
    UP = 2
    DOWN = 3
    ROUTER = 4
    HEAD = 5
    EMBEDDING = 6


class Vector(IntEnum):
    """Vectors, as `motet.h` numbers them; indexed by layer, the final norms by member, the tables not at all."""

    ATTENTION_NORM = 0
    ATTENTION_NORM_BIAS = 1
    MLP_NORM = 2
    MLP_NORM_BIAS = 3
    ATTENTION_OUT_NORM = 4
    ATTENTION_OUT_NORM_BIAS = 5
    MLP_OUT_NORM = 6
    MLP_OUT_NORM_BIAS = 7
    Q_NORM = 8
    K_NORM = 9
    FINAL_NORM = 10
    FINAL_NORM_BIAS = 11
    POSITIONS = 12
    COS = 13
    SIN = 14
    WINDOW_COS = 15
    WINDOW_SIN = 16


class Rotary(IntEnum):
    """Tables of a layer, as `motet.h` numbers them."""

    NONE = 0
    ALL = 1
    WINDOW = 2


# Values of `DecoderConfig` in the order in which `motet.h` numbers them.
ACTIVATIONS = ("swiglu", "geglu", "gelu", "gelu_erf")
NORM_PLACES = ("before", "around", "after")
QK_NORMS = (None, "head", "projection")


class ModelConfig(ctypes.Structure):
    """`MotetConfig`."""

    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
                *(
                    "head_size",
                    "max_positions",
                    "layer_norm",
                    "activation",
                    "norm_places",
                    "parallel_residual",
                    "learned",
                ),
                *("rotary_size", "qk_norm", "tied_head", "split_layer"),
                *("num_members", "num_tails", "num_experts", "experts_per_token", "expert_size", "normalises_experts"),
                *("kv_int8", "num_blocks", "threads"),
            )
        ],
        *[
            (name, ctypes.c_float)
            for name in (
                *("norm_eps", "embedding_scale", "residual_scale", "attention_scale", "logit_scale"),
                *("attention_softcap", "logit_softcap"),
            )
        ],
        ("tail_of", ctypes.c_void_p),
    ]


class Tensor(ctypes.Structure):
    """`MotetTensor`."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minima", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class BatchArrays(ctypes.Structure):
    """`MotetBatch`."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("num_rows", "num_seqs", "max_blocks")],
        *[
            (name, ctypes.c_void_p)
            for name in (
                *("token_ids", "positions", "slot_mapping", "cu_seqlens", "context_lens", "block_tables"),
                *("trunk_cached", "member_offsets", "member_seqs"),
            )
        ],
        ("num_freed", ctypes.c_int64),
        ("freed_blocks", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int64),
        ("output_members", ctypes.c_void_p),
        ("output_rows", ctypes.c_void_p),
        ("num_embedded", ctypes.c_int64),
        ("embedded_rows", ctypes.c_void_p),
        ("embedded", ctypes.c_void_p),
    ]


class Mixes(ctypes.Structure):
    """`MotetMixes`."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("offsets", "sources", "coefficients", "temperatures", "greedy")),
        ("num_written", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("written_rows", "written")),
    ]
