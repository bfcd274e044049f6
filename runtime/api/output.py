"""What the engine gives back: `Output`, a delta of one choice, and `Completion`, a finished choice."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import MotetError
from .request import FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens; `prompt_tokens` is of the request's own prompt (view 0)."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting for admission, from there to the first token, from the first token to the last."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(slots=True)
class Output:
    """Tokens and text of one choice that became ready together. The last one has a `finish_reason`, usage, timings."""

    request_id: str
    choice: int
    seed: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    member_logprobs: list[list[float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_matched: str | int | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: MotetError | None = None

    def extend(self, other: Output) -> None:
        """Coalesce: `other` is the next delta of the same choice."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.top_logprobs += other.top_logprobs
        self.member_logprobs += other.member_logprobs
        self.finish_reason = other.finish_reason
        self.stop_matched = other.stop_matched
        self.usage, self.timings, self.error = other.usage, other.timings, other.error


Completion = Output  # all deltas of a choice, coalesced


def join(choices: dict[int, Completion], delta: Output) -> None:
    """Add a delta to what there is of its choice."""
    if delta.choice in choices:
        choices[delta.choice].extend(delta)
    else:
        choices[delta.choice] = delta
