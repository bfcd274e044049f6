"""`BaseModel`: the model directory that a bundle is made from. Each part is read once, on first use."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from ..runtime.checkpoints.huggingface import checkpoint_digest, read_config, read_weights


class BaseModel:
    """A base model. The constructor raises `NotFoundError`, `BundleError` and `UnsupportedModelError` (see
    `read_config`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)

    @cached_property
    def digest(self) -> str:
        """Digest of configuration and weight files (see `checkpoint_digest`)."""
        return checkpoint_digest(self.path)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Weights in float32 under canonical names (see `read_weights`)."""
        return read_weights(self.path)
