"""`BaseModel`: the model directory that a bundle is made from. Each part is read once, on first use."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from ..runtime.checkpoints.huggingface import Weights, checkpoint_digest, eos_token_ids, open_weights, read_config
from ..runtime.text.tokenizer import Tokenizer


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
    def tokenizer(self) -> Tokenizer:
        """Raises `NotFoundError` or `BundleError` (see `Tokenizer.from_dir`), also for ids that the model does not have."""
        tokenizer = Tokenizer.from_dir(self.path)
        tokenizer.check_ids(self.config.vocab_size)
        return tokenizer

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer. Raises `BundleError` for one that the vocabulary does not have."""
        return eos_token_ids(self.path, self.tokenizer.eos_token_id)

    @cached_property
    def weights(self) -> Weights:
        """Weights in float32 under canonical names, each read when it is asked for (see `open_weights`)."""
        return open_weights(self.path)
