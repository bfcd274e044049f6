"""`ModelInfo`: what a request is checked against."""

from __future__ import annotations

from dataclasses import dataclass

from .request import Ensemble


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a request is checked against."""

    name: str
    members: tuple[str, ...]
    default_ensemble: Ensemble
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    adapters: frozenset[str] = frozenset()  # the members that are low-rank updates
