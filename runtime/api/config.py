"""`EngineConfig`: how to serve a bundle."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError

MAX_SPECULATIVE_TOKENS = 64
DEFAULT_MODEL_LEN = 2048
_COUNTS = ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "prefill_chunk", "max_waiting")
_CHOICES = {
    "backend": ("auto", "cpu", "onnx", "torch"),
    "kv_dtype": ("auto", "int8", "bf16", "fp8"),
    "onnx_provider": ("cpu", "cuda"),
}


def check_keys(cls: type, values: dict[str, Any]) -> None:
    """Raises `ConfigError` for keys that are not fields of the dataclass `cls`."""
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown {cls.__name__} key(s) {unknown}; known keys are {sorted(known)}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to serve a bundle. Values are used as they are or refused, never adjusted. Raises `ConfigError`, naming the
    key."""

    backend: Literal["auto", "cpu", "onnx", "torch"] = "auto"  # auto: the native kernels if they were built, else onnx
    # What the KV cache holds. auto: int8 on cpu, the activations' dtype on torch. fp8: torch only. onnx: always float32.
    kv_dtype: Literal["auto", "int8", "bf16", "fp8"] = "auto"
    onnx_provider: Literal["cpu", "cuda"] = "cpu"  # where the onnx backend runs its graphs; cuda needs onnxruntime-gpu
    max_num_seqs: int = 16  # sequences that hold KV at once; a choice needs one per view and adapter
    max_model_len: int | None = None  # positions per sequence, prompt and answer; None: 2048, or the model's if fewer
    max_num_batched_tokens: int = 512  # rows per step: decode rows first, then prefill chunks
    prefill_chunk: int = 256  # rows per prefill chunk; the cuts are fixed, so a result does not depend on the batch
    max_waiting: int = 256  # choices that may queue before OverloadedError
    block_size: int = 0  # positions per block of the KV cache; 0: the backend's own (only torch accepts another)
    prefix_cache: bool = True  # share the blocks of prompts that begin alike
    speculative_tokens: int = 0  # most tokens per draft, if the request sets no limit; 0: no drafts
    threads: int = 0  # 0: one per CPU that this process may use

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if name == "max_model_len" and value is None:
                continue
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
        if not isinstance(self.block_size, int) or self.block_size < 0:
            raise ConfigError(
                f"block_size must be an integer of at least 0 (0: the backend's own), got {self.block_size!r}"
            )
        if not isinstance(self.threads, int) or self.threads < 0:
            raise ConfigError(f"threads must be an integer of at least 0 (0: all CPUs), got {self.threads!r}")

    def positions(self, context: int) -> int:
        """Positions per sequence for a model whose context has `context` positions. Raises `ConfigError` if
        `max_model_len` is more than that."""
        if self.max_model_len is None:
            return min(DEFAULT_MODEL_LEN, context)
        if self.max_model_len > context:
            raise ConfigError(
                f"max_model_len must be at most {context}, the model's context, got {self.max_model_len}; lower it, or "
                "leave it out"
            )
        return self.max_model_len

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Raises `ConfigError` for unknown keys and values out of range."""
        check_keys(cls, values)
        return cls(**values)
