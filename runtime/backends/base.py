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
    """forward (trunk once, tails over their rows) → mix → sample. Not thread-safe: one engine loop owns it."""

    @property
    def name(self) -> str:
        """As `EngineConfig.backend` names it."""
        ...

    @property
    def kv_dtype(self) -> str:
        """What the KV cache holds: int8, bf16, fp8 or float32."""
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
        """May a sequence have several sampled rows in a step? Only if each is what it would be alone, bit for bit."""
        ...

    @property
    def can_sample_prefill(self) -> bool:
        """May a sequence's last row be sampled in the step that computes rows before it?"""
        ...

    def step(self, batch: Batch) -> StepOutput:
        """Run one batch. A bad row ends in `StepOutput.errors`; an exception means that the whole step failed."""
        ...

    def score(self, token_ids: Sequence[int], member: int) -> F32:
        """Logits [S, vocab] of `member` (its index in the bundle) at every position of one sequence. Writes over the first
        blocks of the KV cache: only while nothing runs."""
        ...

    def seconds(self) -> dict[str, float]:
        """Seconds of the backend's parts since the last call, by name; empty where it does not measure them."""
        ...

    def close(self) -> None:
        """Give memory and threads back."""
        ...


def check_block_size(config: EngineConfig, block_size: int, reason: str) -> None:
    """For a backend whose block size is not chosen. Raises `ConfigError` if the configuration asks for another one."""
    if config.block_size not in (0, block_size):
        raise ConfigError(
            f"block_size is {config.block_size}; {reason}: leave it out, or set it to {block_size} or 0 (the backend's own)"
        )
