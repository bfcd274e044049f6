"""What the engine returns: `Output`, a delta of one choice, and `Completion`, a finished choice."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import MotetError
from .request import FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens. `prompt_tokens` counts the request's own prompt (view 0), `cached_tokens` those of it that
    were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from arrival to admission, from admission to the first token, and from the first token to the last."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(slots=True)
class Output:
    """Tokens and text of one choice that became ready together. The last delta has a `finish_reason`, usage and
    timings.

    The lists have one entry per token, or none if the request did not ask for them. Those of the prompt have one per token
    of the prompt from the second on; only choice 0 has them.
    """

    request_id: str
    choice: int
    seed: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    member_logprobs: list[list[float]] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)  # see `confidence.Calibration`
    disagreement: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_matched: str | int | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: MotetError | None = None
    answer_confidence: float | None = None  # of the whole choice; only in the last delta
    abstained: bool = False  # it is below the request's `abstain_below`
    # [token][id of `logprob_token_ids`]; -inf: the token has no probability
    candidate_logprobs: list[list[float]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)  # -inf: the token has no probability
    prompt_top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    def extend(self, other: Output) -> None:
        """Append `other`, the next delta of the same choice."""
        self.text += other.text
        for name in (*PER_TOKEN, *PER_PROMPT_TOKEN):
            if values := getattr(other, name):
                getattr(self, name).extend(values)
        self.finish_reason = other.finish_reason
        self.stop_matched = other.stop_matched
        self.usage, self.timings, self.error = other.usage, other.timings, other.error
        self.answer_confidence, self.abstained = other.answer_confidence, other.abstained


# Fields with an entry per token of the answer, and of the prompt.
PER_TOKEN = (
    *("token_ids", "logprobs", "top_logprobs", "member_logprobs"),
    *("candidate_logprobs", "confidence", "disagreement"),
)
PER_PROMPT_TOKEN = ("prompt_logprobs", "prompt_top_logprobs")
Completion = Output  # all deltas of a choice, joined


def join(choices: dict[int, Completion], delta: Output) -> None:
    """Append a delta to its choice in `choices`."""
    if delta.choice in choices:
        choices[delta.choice].extend(delta)
    else:
        choices[delta.choice] = delta
