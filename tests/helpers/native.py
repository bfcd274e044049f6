"""The native CPU backend over a bundle, the instruction sets to try it on, and the sizes of a model of one layer."""

from __future__ import annotations

import numpy as np
from motet.kernels.native import library
from motet.kernels.native.structs import ModelConfig
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.cpu.backend import CpuBackend
from motet.runtime.model.bundle import Bundle

ISAS = library.isa_names() if library.is_available() else ()


def cpu_backend(path, *, isa=None, threads=2, kv="int8", length=512, seqs=6):
    """A backend for `seqs` sequences of up to `length` tokens over the bundle at `path`."""
    config = EngineConfig(max_num_seqs=seqs, max_model_len=length, threads=threads, kv_dtype=kv, backend="cpu")
    return CpuBackend(Bundle.load(path), config, isa=isa)


def tokens_of(length, seed=0, vocab=320):
    """Random token ids [length]."""
    return np.random.default_rng(seed).integers(0, vocab, length)


def model_config(**changes):
    """A model of one layer and one member, with four blocks of cache."""
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 16,
        "max_positions": 64,
        "tied_head": 1,
        "split_layer": 1,
        "num_members": 1,
        "kv_int8": 1,
        "num_blocks": 4,
        "threads": 1,
        "norm_eps": 1e-5,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "attention_scale": 0.25,
        "logit_scale": 1.0,
        "rotary_size": 16,
    }
    return ModelConfig(**{**values, **changes})
