"""`ServedEngine`: what a service needs of an engine, which may run in this process or on other machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..api.config import EngineConfig
from ..api.model_info import ModelInfo
from ..api.request import FinishReason, Request
from ..errors import MotetError
from ..text.grammar import Grammars
from ..text.media import MediaReader
from ..text.tokenizer import Tokenizer
from .answer import OnOutput, OnSent
from .embedder import EmbedJob
from .observer import Observer
from .stats import EngineStats


class Embeds(Protocol):
    """See `Embedder`."""

    def submit(self, jobs: Sequence[EmbedJob]) -> None: ...

    def cancel(self, jobs: Sequence[EmbedJob]) -> None: ...


class ServedEngine(Protocol):
    """See `Engine`, which is one. Its methods may be called from any thread."""

    tokenizer: Tokenizer
    grammars: Grammars
    media: MediaReader
    model: ModelInfo
    config: EngineConfig

    @property
    def embedder(self) -> Embeds: ...

    @property
    def failure(self) -> MotetError | None: ...

    @property
    def is_idle(self) -> bool: ...

    def check(self, request: Request) -> None: ...

    def submit(self, request: Request, on_output: OnOutput, on_sent: OnSent | None = None) -> None: ...

    def abort(self, request_id: str | None, reason: FinishReason = FinishReason.CANCELLED) -> None: ...

    def subscribe(self, observer: Observer) -> None: ...

    def stats(self) -> EngineStats: ...

    def drain(self) -> None: ...

    def close(self) -> None: ...
