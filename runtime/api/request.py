"""What a client asks, after tokenisation: prompts, an ensemble, sampling parameters. Frozen, checked at construction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..errors import InvalidEnsembleError, InvalidRequestError
from .config import MAX_SPECULATIVE_TOKENS

MIX_TOLERANCE = 1e-6
MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 1024
MAX_CHOICES = 64
MAX_LOGPROBS = 64
MAX_MEMBERS = 64


class Space(StrEnum):
    """Where members are mixed. LOGITS: Σ wᵢ·zᵢ (log-linear pool). PROBS: log Σ wᵢ·softmax(zᵢ) (linear pool)."""

    LOGITS = "logits"
    PROBS = "probs"


class FinishReason(StrEnum):
    """Why an answer has ended. STOP: a stop string or token, or the end of the text. LENGTH: `max_tokens` or the context."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIME_LIMIT = "time_limit"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Member:
    """One voice: a member of the bundle, the view (index into `Request.prompts`) it sees, and its coefficient."""

    name: str
    mix: float
    view: int = 0


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Members and their mix. Raises `InvalidEnsembleError` unless the mix is finite and sums to 1 (±1e-6)."""

    members: tuple[Member, ...]
    space: Space = Space.LOGITS

    def __post_init__(self) -> None:
        if not 1 <= len(self.members) <= MAX_MEMBERS:
            raise InvalidEnsembleError(
                f"an ensemble has 1 to {MAX_MEMBERS} members, got {len(self.members)}", field="ensemble.members"
            )
        seen = set()
        for member in self.members:
            if not math.isfinite(member.mix):
                raise InvalidEnsembleError(
                    f"the mix of member '{member.name}' is {member.mix}; it must be finite",
                    field="ensemble.members.mix",
                )
            if member.mix < 0 and self.space is Space.PROBS:
                raise InvalidEnsembleError(
                    f"the mix of member '{member.name}' is {member.mix}; negative coefficients need space LOGITS",
                    field="ensemble.members.mix",
                )
            if (member.name, member.view) in seen:
                raise InvalidEnsembleError(
                    f"member '{member.name}' with view {member.view} is named twice; add its coefficients up",
                    field="ensemble.members.name",
                )
            seen.add((member.name, member.view))
        total = math.fsum(member.mix for member in self.members)
        if abs(total - 1.0) > MIX_TOLERANCE:
            raise InvalidEnsembleError(
                f"the mix sums to {total:.9g}; it must sum to 1 within {MIX_TOLERANCE:g} (it is never renormalised)",
                field="ensemble.members.mix",
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end. The defaults sample from the mixed distribution as it is.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. Truncation order: top-k, top-p, min-p, all on
    the tempered distribution. `repetition_penalty` (> 0; CTRL, Keskar et al. 2019) counts prompt and answer,
    `presence_penalty` and `frequency_penalty` the answer only. `seed` None draws one, which the result reports.
    `logprobs` n: the chosen token's and the n best tokens' log-probabilities of the mixed distribution (before
    penalties, temperature and truncation). `max_tokens` None: up to the end of the context. `speculative_tokens`: the
    longest draft, which changes how fast an answer comes and nothing else; 0 is off, None the engine's default.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    speculative_tokens: int | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """The token is the largest logit's, and nothing else about the logits is asked for."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        plain = self.temperature == 0 and self.logprobs is None and penalties == (1.0, 0.0, 0.0)
        return plain and not self.logit_bias

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, limit: str) -> None:
            if not ok:
                raise InvalidRequestError(f"{name} must be {limit}, got {getattr(self, name)!r}", field=name)

        finite = math.isfinite
        check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        check("min_tokens", self.min_tokens >= 0, "at least 0")
        if self.max_tokens is not None:
            check("min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens ({self.max_tokens})")
        check("temperature", finite(self.temperature) and 0 <= self.temperature <= 100, "a number in 0…100")
        check("top_k", self.top_k >= 0, "at least 0 (0 is off)")
        check("top_p", finite(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        check("min_p", finite(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        check("repetition_penalty", finite(self.repetition_penalty) and self.repetition_penalty > 0, "a number above 0")
        check("presence_penalty", finite(self.presence_penalty), "a finite number")
        check("frequency_penalty", finite(self.frequency_penalty), "a finite number")
        if not all(finite(bias) for bias in self.logit_bias.values()):
            raise InvalidRequestError("every logit_bias must be a finite number", field="logit_bias")
        check("seed", self.seed is None or 0 <= self.seed < 2**64, "in 0…2^64-1")
        check("n", 1 <= self.n <= MAX_CHOICES, f"in 1…{MAX_CHOICES}")
        check("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"in 0…{MAX_LOGPROBS}")
        check(
            "speculative_tokens",
            self.speculative_tokens is None or 0 <= self.speculative_tokens <= MAX_SPECULATIVE_TOKENS,
            f"in 0…{MAX_SPECULATIVE_TOKENS}",
        )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"{len(self.stop)} stop strings; at most {MAX_STOP_STRINGS} are allowed", field="stop"
            )
        if any(not stop or len(stop.encode()) > MAX_STOP_BYTES for stop in self.stop):
            raise InvalidRequestError(f"a stop string has 1 to {MAX_STOP_BYTES} bytes", field="stop")
        if len(self.stop_token_ids) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"{len(self.stop_token_ids)} stop token ids; at most {MAX_STOP_STRINGS} are allowed",
                field="stop_token_ids",
            )


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the engine takes it. `prompts[view]` are token ids; view 0 is the request's own prompt.

    `time_limit_s` ends the request with what it has (FinishReason.TIME_LIMIT), counted from its arrival.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    ensemble: Ensemble
    sampling: SamplingParams = field(default_factory=SamplingParams)
    time_limit_s: float | None = None
    return_member_logprobs: bool = False

    def __post_init__(self) -> None:
        if not self.prompts or any(not prompt for prompt in self.prompts):
            raise InvalidRequestError("the prompt is empty; it needs at least one token", field="prompt")
        for member in self.ensemble.members:
            if not 0 <= member.view < len(self.prompts):
                raise InvalidEnsembleError(
                    f"member '{member.name}' asks for view {member.view}; the request has {len(self.prompts)}",
                    field="ensemble.members.view",
                )
        if self.time_limit_s is not None and not (math.isfinite(self.time_limit_s) and self.time_limit_s > 0):
            raise InvalidRequestError(f"time_limit must be above 0, got {self.time_limit_s!r}", field="time_limit_ms")
