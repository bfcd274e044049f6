"""`ModelInfo`: what a request is checked against."""

from __future__ import annotations

from dataclasses import dataclass

from .confidence import Calibration
from .request import Ensemble


@dataclass(frozen=True, slots=True)
class MemberOrigin:
    """Where a member comes from, as its training run wrote it; empty where nobody did."""

    kind: str
    method: str = ""  # of `motet tune`
    data: str = ""  # name of the data set
    trained_on: int = 0  # examples
    epsilon: float | None = None  # with `delta` the privacy of each training example (DP-SGD); None: it has none
    delta: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model, as requests are checked against it and clients see it."""

    name: str
    members: tuple[str, ...]
    default_ensemble: Ensemble
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int  # positions per sequence, prompt and answer together
    calibration: Calibration | None = None  # of confidences; only where the bundle is served in this process
    digest: str = ""  # of the bundle
    media: tuple[str, ...] = ()  # what messages may hold beside text: image, audio
    origins: tuple[MemberOrigin, ...] = ()  # of each member
    hidden_size: int = 0  # dimensions of embeddings; 0: there are none
