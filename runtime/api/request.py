"""Requests: prompts, an ensemble, sampling parameters. Frozen, checked at construction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from ..errors import InvalidEnsembleError, InvalidRequestError, shown
from .embedded import EmbeddedSpan, Spans
from .limits import (
    MAX_CHOICES,
    MAX_MEMBER_TEMPERATURE,
    MAX_MEMBERS,
    MAX_MIX,
    MAX_NAME_BYTES,
    MAX_PRIORITY,
    MAX_REQUEST_ID_BYTES,
    MAX_SALT_BYTES,
    MIN_MEMBER_TEMPERATURE,
)
from .prompt import Prompt
from .rules import Flag, Integer, Number, Text
from .sampling import SamplingParams
from .structure import Structure

MIX_TOLERANCE = 1e-6
_FLAG = Flag()
_NAME = Text(MAX_NAME_BYTES, min_bytes=1)
_MIX = Number(-MAX_MIX, MAX_MIX)
_MEMBER_TEMPERATURE = Number(MIN_MEMBER_TEMPERATURE, MAX_MEMBER_TEMPERATURE)
_REQUEST_ID = Text(MAX_REQUEST_ID_BYTES)
_SHARE = Number(0, 1)
_DRAFTS = Integer(0, MAX_CHOICES)
_PRIORITY = Integer(-MAX_PRIORITY, MAX_PRIORITY)
_SALT = Text(MAX_SALT_BYTES)
_TIME_LIMIT = Number(0, is_above=True)  # seconds


class Space(StrEnum):
    """Where members are mixed, whose logits zᵢ are divided by their temperatures first. LOGITS: Σ wᵢ·zᵢ (log-linear pool).
    PROBS: log Σ wᵢ·softmax(zᵢ) (linear pool)."""

    LOGITS = "logits"
    PROBS = "probs"


class FinishReason(StrEnum):
    """Why an answer has ended. STOP: a stop string, a stop token or the model's end of text. LENGTH: `max_tokens`, or
    the context is full. SHUTDOWN: the server went out of service before the answer was complete."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIME_LIMIT = "time_limit"
    SHUTDOWN = "shutdown"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the bundle, its coefficient in the mix, the view (index into `Request.prompts`) that it sees, and the
    temperature by which its logits are divided before they are mixed (the request's own temperature divides the mix)."""

    name: str
    mix: float
    view: int = 0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Members and their mix. `space` may also be a name, "logits" or "probs". Raises `InvalidEnsembleError` for no or
    more than 64 members, a (name, view) pair that occurs twice, a mix that is not in ±1000 or does not sum to 1
    (±1e-6), a temperature that is not in 0.01…100, or, in space LOGITS, a quotient mix / temperature that is not in
    ±1000."""

    members: tuple[Member, ...]
    space: Space = Space.LOGITS

    def __post_init__(self) -> None:
        if self.space not in tuple(Space):
            raise InvalidEnsembleError(
                f"space must be one of {[str(space) for space in Space]}, got {shown(self.space)}",
                field="ensemble.space",
            )
        object.__setattr__(self, "space", Space(self.space))
        if not isinstance(self.members, tuple | list) or not all(isinstance(m, Member) for m in self.members):
            raise InvalidEnsembleError(
                f"members must be a list of Member, got {shown(self.members)}", field="ensemble.members"
            )
        object.__setattr__(self, "members", tuple(self.members))
        if not 1 <= len(self.members) <= MAX_MEMBERS:
            raise InvalidEnsembleError(
                f"an ensemble has 1 to {MAX_MEMBERS} members, got {len(self.members)}", field="ensemble.members"
            )
        seen: set[tuple[str, int]] = set()
        for member in self.members:
            try:
                _NAME.check("ensemble.members.name", member.name, "a member's name")
                _MIX.check("ensemble.members.mix", member.mix, f"the mix of member '{member.name}'")
                label = f"the temperature of member '{member.name}'"
                _MEMBER_TEMPERATURE.check("ensemble.members.temperature", member.temperature, label)
            except InvalidRequestError as error:
                raise InvalidEnsembleError(str(error), field=error.field) from None
            if member.mix < 0 and self.space is Space.PROBS:
                raise InvalidEnsembleError(
                    f"the mix of member '{member.name}' is {member.mix}; negative coefficients need space LOGITS",
                    field="ensemble.members.mix",
                )
            share = member.mix / member.temperature  # by which its logits are multiplied
            if self.space is Space.LOGITS and abs(share) > MAX_MIX:
                raise InvalidEnsembleError(
                    f"the mix of member '{member.name}' is {member.mix:g} and its temperature {member.temperature:g}; mix / "
                    f"temperature must be in ±{MAX_MIX} in space LOGITS, got {share:g}; raise the temperature or lower the mix",
                    field="ensemble.members.temperature",
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
class GenerateRequest:
    """A request before tokenisation. It depends on no transport.

    `ensemble` None is the bundle's own. A member with view i sees `views[i - 1]`; view 0 is `prompt`. Negative
    coefficients are refused unless `allow_negative` is set. `request_id` is returned with every output; if it is
    empty, the service makes one. `time_limit_s`: seconds after arrival at which the answer ends with the tokens that
    it has. `return_confidence`: each token's confidence and disagreement, and the answer's confidence; the bundle must be
    calibrated. `abstain_below` implies it: an answer with less confidence is marked as abstained. `drafts`: the answer is
    the one of so many drafts that agrees most with the others (`engine.consensus`); it comes in one piece, when all
    have ended. `priority`: of the caller's waiting requests the one with the lowest number goes first. `cache_salt`:
    only requests of the same tenant with the same salt share cached prefixes. `structure`: the form that the answer must
    have. Raises `InvalidRequestError`,
    `InvalidEnsembleError`.
    """

    prompt: Prompt
    ensemble: Ensemble | None = None
    views: tuple[Prompt, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    time_limit_s: float | None = None
    return_member_logprobs: bool = False
    allow_negative: bool = False
    return_confidence: bool = False
    abstain_below: float | None = None
    drafts: int = 0
    priority: int = 0
    cache_salt: str = ""
    structure: Structure | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequestError(f"sampling must be SamplingParams, got {shown(self.sampling)}", field="sampling")
        if self.ensemble is not None and not isinstance(self.ensemble, Ensemble):
            raise InvalidEnsembleError(
                f"ensemble must be an Ensemble or None, got {shown(self.ensemble)}", field="ensemble"
            )
        if not isinstance(self.views, tuple | list):
            raise InvalidRequestError(f"views must be a list of prompts, got {shown(self.views)}", field="views")
        object.__setattr__(self, "views", tuple(self.views))
        members = self.ensemble.members if self.ensemble is not None else ()
        _check_views(members, 1 + len(self.views))
        unseen = set(range(1, 1 + len(self.views))) - {member.view for member in members}
        if unseen:
            raise InvalidEnsembleError(
                f"no member sees view {min(unseen)}; name it in a member of the ensemble, or leave it out",
                field="ensemble.members.view",
            )
        _FLAG.check("allow_negative", self.allow_negative)
        for member in members:
            _check_sign(member, self.allow_negative)
        _REQUEST_ID.check("request_id", self.request_id)
        _SALT.check("cache_salt", self.cache_salt)
        _check_options(self)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose turn a request takes. Its values are the service's and not the client's."""

    tenant: str = ""
    weight: float = 1.0  # of the tenant's turn
    is_background: bool = False  # it runs behind every request that is not
    max_waiting: int | None = None  # choices of the tenant that may queue; None: as many as the queue holds


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the engine accepts it. `prompts[view]` are token ids; view 0 is the request's own prompt.

    `time_limit_s`: seconds after arrival at which its answers end with the tokens that they have
    (FinishReason.TIME_LIMIT). Raises `InvalidRequestError`, `InvalidEnsembleError`.
    """

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    ensemble: Ensemble
    sampling: SamplingParams = field(default_factory=SamplingParams)
    embedded: tuple[Spans, ...] = ()  # of each prompt, if any has some
    time_limit_s: float | None = None
    return_member_logprobs: bool = False
    return_confidence: bool = False
    abstain_below: float | None = None
    drafts: int = 0  # to choose the answer from; the engine itself makes one answer, see `engine.consensus`
    structure: Structure | None = None
    cache_salt: bytes = b""  # requests with different salts share no cached prefixes; the service has one per tenant
    priority: int = 0  # among its owner's waiting requests: the lowest goes first
    owner: Owner = field(default_factory=Owner)

    def __post_init__(self) -> None:
        if not self.prompts or any(not prompt for prompt in self.prompts):
            raise InvalidRequestError("the prompt is empty; it needs at least one token", field="prompt")
        _check_views(self.ensemble.members, len(self.prompts))
        _check_options(self)
        _check_spans(self)
        if not isinstance(self.cache_salt, bytes):
            raise InvalidRequestError(
                f"cache_salt must be bytes, got {shown(self.cache_salt)}; encode it", field="cache_salt"
            )


def _check_spans(request: Request) -> None:
    """Each span has checked itself; their width is checked where the model is known (`Admission.check`)."""
    for spans in request.embedded:
        if not isinstance(spans, tuple) or not all(isinstance(span, EmbeddedSpan) for span in spans):
            raise InvalidRequestError(
                f"embedded must have a tuple of EmbeddedSpan for each prompt, got {shown(spans)}", field="embedded"
            )
    if request.embedded and len(request.embedded) != len(request.prompts):
        raise InvalidRequestError(
            f"embedded has spans of {len(request.embedded)} prompts, and there are {len(request.prompts)}",
            field="embedded",
        )
    for prompt, spans in zip(request.prompts, request.embedded):
        before = 0
        for span in spans:
            if span.start < before or span.end > len(prompt):
                raise InvalidRequestError(
                    f"embedded rows {span.rows.shape} at position {span.start} overlap others, or are not in the prompt of "
                    f"{len(prompt)} tokens",
                    field="embedded",
                )
            before = span.end


def _check_views(members: tuple[Member, ...], num_views: int) -> None:
    for member in members:
        if not isinstance(member.view, int) or not 0 <= member.view < num_views:
            raise InvalidEnsembleError(
                f"member '{member.name}' asks for view {member.view}; the request has {num_views}",
                field="ensemble.members.view",
            )


def _check_options(request: GenerateRequest | Request) -> None:
    if request.time_limit_s is not None:
        _TIME_LIMIT.check("time_limit_s", request.time_limit_s)
    _FLAG.check("return_member_logprobs", request.return_member_logprobs)
    _FLAG.check("return_confidence", request.return_confidence)
    _PRIORITY.check("priority", request.priority)
    _check_structure(request.structure, request.sampling)
    _DRAFTS.check("drafts", request.drafts)
    if request.drafts == 1 or (request.drafts and request.sampling.n > 1):
        raise InvalidRequestError(
            f"one answer is chosen of 2 drafts or more, got drafts {request.drafts} and n {request.sampling.n}; leave one out",
            field="drafts",
        )
    if request.drafts and (request.return_confidence or request.abstain_below is not None):
        raise InvalidRequestError(
            "a confidence is the ensemble's, and a draft may be of one member; leave drafts out, or return_confidence and "
            "abstain_below",
            field="drafts",
        )
    if request.sampling.prompt_logprobs is not None and request.drafts:
        raise InvalidRequestError(
            "prompt_logprobs are the ensemble's, and a draft may be of one member; leave one of the two out",
            field="drafts",
        )
    if request.abstain_below is not None:
        _SHARE.check("abstain_below", request.abstain_below)
        object.__setattr__(request, "return_confidence", True)


def _check_structure(structure: Structure | None, sampling: SamplingParams) -> None:
    if structure is None:
        return
    if not isinstance(structure, Structure):
        raise InvalidRequestError(f"structure must be a Structure or None, got {shown(structure)}", field="structure")
    for name in ("ignore_eos", "min_tokens"):
        if getattr(sampling, name):
            raise InvalidRequestError(
                f"{name} goes on where the answer's structure ends it; leave {name} out, or the structure", field=name
            )


def check_embedding(ensemble: Ensemble, allow_negative: bool) -> None:
    """Whether an ensemble can embed. Raises `InvalidEnsembleError`."""
    for member in ensemble.members:
        if member.view:
            raise InvalidEnsembleError(
                "a text is embedded as it is; leave the views out", field="ensemble.members.view"
            )
        if member.temperature != 1:
            raise InvalidEnsembleError(
                "a temperature divides logits, and an embedding has none; leave it out",
                field="ensemble.members.temperature",
            )
        _check_sign(member, allow_negative)
    if ensemble.space is not Space.LOGITS:
        raise InvalidEnsembleError("hidden states are mixed in space logits; leave space out", field="ensemble.space")


def _check_sign(member: Member, allow_negative: bool) -> None:
    if member.mix < 0 and not allow_negative:
        raise InvalidEnsembleError(
            f"the mix of member '{member.name}' is {member.mix}; set allow_negative if that is meant",
            field="ensemble.members.mix",
        )
