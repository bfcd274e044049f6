"""`Backend`: what runs a `Batch`. It knows nothing of requests, queues or text."""

from __future__ import annotations

import logging
from typing import Protocol

from ..kernels import cpu
from .batch import Batch, StepOutput
from .bundle import Bundle
from .config import EngineConfig
from .errors import UnavailableError

log = logging.getLogger("motet.backend")


class Backend(Protocol):
    """forward (trunk once, tails over their rows) → mix → sample. Not thread-safe: one engine loop owns it."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        ...

    @property
    def block_size(self) -> int:
        """Positions a block. A backend with contiguous slots has blocks as long as the context."""
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

    def close(self) -> None: ...


def open_backend(bundle: Bundle, config: EngineConfig) -> Backend:
    """The backend that `config.backend` names; "auto" is the native kernels, or ONNX Runtime where they were not built or
    do not have the model's sizes. Raises `UnavailableError` for a backend that this machine does not have."""
    if config.backend == "torch":
        try:
            from .torch_backend import TorchBackend
        except ModuleNotFoundError as error:
            raise UnavailableError(
                f"the torch backend needs {error.name}; install it with `pip install 'motet[gpu]'`"
            ) from error
        return TorchBackend(bundle, config)
    if config.backend != "onnx" and (config.backend == "cpu" or cpu.is_available()):
        from .cpu_backend import CpuBackend

        try:
            return CpuBackend(bundle, config)
        except UnavailableError as error:
            if config.backend == "cpu":
                raise
            log.warning("the onnx backend serves '%s': %s", bundle.name, error)
    from .onnx_backend import OnnxBackend

    return OnnxBackend(bundle, config)
