"""`Backend`: what runs a `Batch`. It knows nothing of requests, queues or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..api.config import EngineConfig
from ..errors import ConfigError
from ..schedule.batch import Batch, StepOutput

F32 = npt.NDArray[np.float32]


class Backend(Protocol):
    """Computes a batch: forward (the trunk once, each tail over its rows) → mix → sample. Not thread-safe."""

    @property
    def name(self) -> str:
        """The backend's name in `EngineConfig.backend`."""
        ...

    @property
    def kv_dtype(self) -> str:
        """The type of the KV cache: int8, bf16, fp8 or float32."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        ...

    @property
    def block_size(self) -> int:
        """Positions per block. A backend with contiguous slots has blocks as long as the context."""
        ...

    @property
    def can_verify(self) -> bool:
        """Whether a sequence may have several sampled rows in a step: only if each has the same bits as alone."""
        ...

    @property
    def has_hidden(self) -> bool:
        """Whether `hidden` can be called: there is no hidden state in a graph whose only output is logits."""
        ...

    @property
    def takes_embedded(self) -> bool:
        """Whether `Batch.embedded` may be set: rows of a prompt that are given as embeddings."""
        ...

    @property
    def keeps_trunk(self) -> bool:
        """Whether it keeps the trunk's output of every position, so that `Batch.trunk_cached` rows can be run."""
        ...

    @property
    def can_sample_prefill(self) -> bool:
        """Whether a sequence's last row may be sampled in the step that computes the rows before it."""
        ...

    def step(self, batch: Batch) -> StepOutput:
        """Run one batch. A row that cannot be sampled has an entry in `StepOutput.errors`; an exception means that
        the whole step failed."""
        ...

    def hidden(self, batch: Batch) -> list[F32]:
        """Run a batch without samples: of each sequence the final hidden states, which the head multiplies, of its rows,
        [members of the sequence, rows, hidden]."""
        ...

    def score(self, token_ids: Sequence[int], member: int) -> F32:
        """Logits [S, vocab] of `member` (its index in the bundle) at every position of one sequence. It overwrites the
        first blocks of the KV cache, so it may be called only while no request runs."""
        ...

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each part of the backend since the last call, by name; empty if it does not measure them."""
        ...

    def close(self) -> None:
        """Free memory and threads."""
        ...


def check_block_size(config: EngineConfig, block_size: int, reason: str) -> None:
    """For a backend with a fixed block size. Raises `ConfigError` if the configuration has another one; `reason` says
    why."""
    if config.block_size not in (0, block_size):
        raise ConfigError(
            f"block_size is {config.block_size}; {reason}: leave it out, or set it to {block_size} or 0 (the backend's own)"
        )


def check_float_cache(config: EngineConfig) -> None:
    """For the backends on ONNX Runtime. Raises `ConfigError` if the configuration asks for another type of cache."""
    if config.kv_dtype != "auto":
        raise ConfigError(
            f"kv_dtype is {config.kv_dtype}, and the onnx backend's KV cache is float32; leave it out, or use backend cpu"
        )
