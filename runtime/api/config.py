"""`EngineConfig`: how to serve a bundle."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .limits import MAX_MEDIA_BYTES, MAX_SPECULATIVE_TOKENS

DEFAULT_MODEL_LEN = 2048
_COUNTS = (
    "max_num_seqs",
    "max_model_len",
    "max_num_batched_tokens",
    "prefill_chunk",
    "max_waiting",
    "max_waiting_tokens",
    "max_requests",
)
_CHOICES = {
    "backend": ("auto", "cpu", "onnx", "torch"),
    "kv_dtype": ("auto", "int8", "bf16", "fp8"),
    "onnx_provider": ("cpu", "cuda"),
}


def described(default: Any, text: str, option: str | None = None) -> Any:
    """A dataclass field with a default and a help text; `option`: its name on the command line, if it has another."""
    return dataclasses.field(default=default, metadata={"help": text} | ({"option": option} if option else {}))


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

    backend: Literal["auto", "cpu", "onnx", "torch"] = described(
        "auto", "auto (the native kernels if they were built, else onnx), cpu, onnx or torch."
    )
    kv_dtype: Literal["auto", "int8", "bf16", "fp8"] = described(
        "auto", "What the KV cache holds; auto: int8 on cpu, the activations' type on torch. onnx always has float32."
    )
    onnx_provider: Literal["cpu", "cuda"] = described("cpu", "Where the onnx backend runs; cuda needs onnxruntime-gpu.")
    max_num_seqs: int = described(16, "Sequences that hold KV cache at once; a choice needs one per view.")
    max_model_len: int | None = described(
        None, "Positions per sequence, prompt and answer; default: 2048, or the model's context if that is shorter."
    )
    max_num_batched_tokens: int = described(512, "Rows per step: decode rows first, then prefill chunks.")
    prefill_chunk: int = described(
        256, "Rows per prefill chunk; the cuts are fixed, so no result depends on the batch."
    )
    max_waiting: int = described(256, "Choices that may queue; more are refused.")
    max_waiting_tokens: int = described(1_000_000, "Tokens of prompts that may queue; more are refused.")
    max_requests: int = described(
        1024, "Requests that are read, queued, running, or ended and not yet read by their clients; more are refused."
    )
    block_size: int = described(0, "Positions per block of the KV cache; 0: the backend's own (only torch has others).")
    prefix_cache: bool = described(True, "Share the blocks of prompts that begin alike.")
    probe: bool = described(
        True, "Compare the first answers with those that the bundle stores, before anything is served."
    )
    speculative_tokens: int = described(
        0, "Most tokens per prompt-lookup draft, if the request sets no limit; 0: no drafts."
    )
    max_images: int = described(8, "Images of a request; more are refused.")
    max_image_bytes: int = described(
        8 * 2**20, "Bytes of a request's images together, as they are sent; more are refused."
    )
    max_image_pixels: int = described(2**25, "Pixels of an image, asked before it is decoded; more are refused.")
    max_audios: int = described(8, "Sounds of a request; more are refused.")
    max_audio_bytes: int = described(
        8 * 2**20, "Bytes of a request's sounds together, as they are sent; more are refused."
    )
    max_audio_seconds: int = described(600, "Seconds of a sound, asked before it is decoded; more are refused.")
    media_cache_bytes: int = described(2**28, "Bytes of encoded media that are kept for later requests; 0: none.")
    threads: int = described(0, "Threads; 0: the CPUs that this process may use.")
    verify_key: Path | None = described(None, "The bundle must have a signature of this public key, PEM (motet sign).")
    verify_ca: Path | None = described(
        None, "The bundle must have a signature of a certificate that these authorities vouch for, PEM."
    )

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if name == "max_model_len" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")

        for name in ("verify_key", "verify_ca"):
            if not isinstance(getattr(self, name), Path | None):
                raise ConfigError(f"{name} must be a path, got {getattr(self, name)!r}")
        if self.verify_key is not None and self.verify_ca is not None:
            raise ConfigError(
                "verify_key and verify_ca are two ways to verify the one signature of a bundle; give one of them"
            )
        for name in ("prefix_cache", "probe"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
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
        for name, low, high in (
            ("max_images", 0, 1024),
            ("max_image_bytes", 1, MAX_MEDIA_BYTES),
            ("max_image_pixels", 1, 2**28),
            ("max_audios", 0, 1024),
            ("max_audio_bytes", 1, MAX_MEDIA_BYTES),
            ("max_audio_seconds", 1, 3 * 3600),
            ("media_cache_bytes", 0, 2**40),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{name} must be an integer in {low}…{high}, got {value!r}")
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
