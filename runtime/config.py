"""The two configurations everything else is derived from: `DecoderConfig` (a model) and `EngineConfig` (how to serve)."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError


def _check_keys(cls: type, values: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown {cls.__name__} key(s) {unknown}; known keys are {sorted(known)}")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only transformer, said once. The torch model, the ONNX graphs and the native kernels derive from it.

    Sizes are counts of elements. `family` names the checkpoint layout (weight names); everything that changes the
    arithmetic has a field of its own, so a new family is a row in `decoder_families` and not a branch elsewhere.
    """

    family: Literal["llama", "qwen2", "qwen3", "gpt2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # only "llama3" and "linear" are known; None is plain rotary
    activation: Literal["swiglu", "gelu"] = "swiglu"  # gelu: the tanh approximation, one up and one down projection
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before rotary (qwen3)
    tied_head: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Raises `ConfigError` for unknown keys."""
        _check_keys(cls, values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size


MAX_SPECULATIVE_TOKENS = 64
_COUNTS = ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "prefill_chunk", "max_waiting", "block_size")
_CHOICES = {
    "backend": ("auto", "cpu", "onnx", "torch"),
    "kv_dtype": ("auto", "int8", "bf16", "fp8"),
    "onnx_provider": ("cpu", "cuda"),
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to serve a bundle. Unknown keys are refused, nothing is adjusted silently."""

    backend: Literal["auto", "cpu", "onnx", "torch"] = "auto"  # auto: native kernels where they were built, else onnx
    # Of a paged KV cache: auto is int8 on cpu and the activations' dtype on torch; fp8 is torch's; onnx has float32.
    kv_dtype: Literal["auto", "int8", "bf16", "fp8"] = "auto"
    onnx_provider: Literal["cpu", "cuda"] = "cpu"  # where the onnx backend runs its graphs; cuda needs onnxruntime-gpu
    max_num_seqs: int = 16  # sequences that hold KV at once; a request needs one a view
    max_model_len: int = 2048  # positions a sequence, prompt and answer together
    max_num_batched_tokens: int = 512  # rows a step: decode rows first, then prefill chunks
    prefill_chunk: int = 256  # rows a prefill chunk: fixed cuts, so that a result does not depend on the batch
    max_waiting: int = 256  # groups that may queue before OverloadedError
    block_size: int = 16  # positions a block of the torch backend's KV cache; the others have a size of their own
    prefix_cache: bool = True  # share the blocks of prompts that begin alike
    speculative_tokens: int = 0  # tokens a draft at most, where a request does not say; 0: no drafts
    threads: int = 0  # 0: as many as CPUs that this process may use

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")

        if not isinstance(self.prefix_cache, bool):
            raise ConfigError(f"prefix_cache must be true or false, got {self.prefix_cache!r}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not isinstance(self.speculative_tokens, int) or not 0 <= self.speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"speculative_tokens must be an integer in 0…{MAX_SPECULATIVE_TOKENS}, got {self.speculative_tokens!r}"
            )
        if self.onnx_provider != "cpu" and self.backend != "onnx":
            raise ConfigError(
                f"onnx_provider {self.onnx_provider} is the onnx backend's, and backend is {self.backend}; add backend onnx"
            )
        if not isinstance(self.threads, int) or self.threads < 0:
            raise ConfigError(f"threads must be an integer of at least 0 (0: all CPUs), got {self.threads!r}")

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Raises `ConfigError` for unknown keys and values out of range."""
        _check_keys(cls, values)
        return cls(**values)
