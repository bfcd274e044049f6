"""`Admission`: a request is checked against the model and the engine's limits, and becomes groups."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from ..api.config import EngineConfig
from ..api.limits import MAX_SPECULATIVE_TOKENS
from ..api.model_info import ModelInfo
from ..api.request import Ensemble, Request
from ..api.sampling import SamplingParams
from ..errors import ContextLengthError, InvalidEnsembleError, InvalidRequestError
from .blocks import BlockManager
from .drafts import Drafter
from .resolve import LogitEditor, Matcher
from .sequence import Group, Sequence


def choice_seed(seed: int, choice: int) -> int:
    """Seed of a choice: the request's own for choice 0, else splitmix64 of seed and choice (Steele et al. 2014)."""
    if choice == 0:
        return seed
    z = (seed + choice * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


class Admission:
    """Checks requests and makes their groups. Thread-safe: it reads constants only."""

    def __init__(
        self,
        model: ModelInfo,
        config: EngineConfig,
        blocks: BlockManager,
        *,
        can_verify: bool,
        takes_embedded: bool = False,
    ) -> None:
        self._model = model
        self._config = config
        self._blocks = blocks
        self._can_verify, self._takes_embedded = can_verify, takes_embedded
        self._index_of = {name: index for index, name in enumerate(model.members)}

    def groups_of(self, request: Request, matcher: Matcher | None = None) -> list[Group]:
        """One group per choice, with one sequence per view. `matcher`: of the request's structure. Raises what `check`
        raises."""
        self.check(request)
        members_of: dict[int, set[int]] = {}  # view → members
        for member in request.ensemble.members:
            members_of.setdefault(member.view, set()).add(self._index_of[member.name])
        views = sorted(members_of)
        terms = tuple((views.index(m.view), self._index_of[m.name], m.mix) for m in request.ensemble.members)
        temperatures = tuple(m.temperature for m in request.ensemble.members)
        params = request.sampling
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        eos = () if params.ignore_eos else self._model.eos_token_ids
        stop_ids = frozenset((*eos, *params.stop_token_ids))
        editor = LogitEditor(params, stop_ids, request.prompts[views[0]], matcher)
        return [
            Group(
                request_id=request.request_id,
                choice=choice,
                sequences=[
                    Sequence(
                        request.prompts[view],
                        tuple(sorted(members_of[view])),
                        root=request.cache_salt,
                        embedded=request.embedded[view] if request.embedded else (),
                    )
                    for view in views
                ],
                terms=terms,
                temperatures=temperatures if any(t != 1 for t in temperatures) else (),
                space=request.ensemble.space,
                params=params,
                seed=choice_seed(seed, choice),
                max_tokens=self._answer_room(request),
                stop_ids=stop_ids,
                editor=editor.fork(),
                return_member_logprobs=request.return_member_logprobs or request.return_confidence,
                return_logprobs=request.return_confidence,
                drafter=self._drafter(params),
                num_to_score=len(request.prompts[views[0]]) - 1
                if params.prompt_logprobs is not None and not choice
                else 0,
                can_verify=self._can_verify,
                max_forced=MAX_SPECULATIVE_TOKENS
                if matcher and self._can_verify and params.speculative_tokens != 0
                else 0,
                priority=request.priority,
                owner=request.owner,
            )
            for choice in range(params.n)
        ]

    def check(self, request: Request, *, embeds: bool = False) -> None:
        """`embeds`: the request will have embedded rows, which are not there yet. Raises `InvalidEnsembleError`
        (unknown members), `InvalidRequestError`, `ContextLengthError`."""
        for member in request.ensemble.members:
            if member.name not in self._index_of:
                raise InvalidEnsembleError(
                    f"'{member.name}' is not a member of '{self._model.name}'; "
                    f"its members are {list(self._model.members)}",
                    field="ensemble.members.name",
                )
        params = request.sampling
        if request.drafts:
            raise InvalidRequestError(
                "the engine makes one answer; make a request of each draft (engine.consensus), or use the service",
                field="drafts",
            )
        if request.return_confidence and self._model.calibration is None:
            raise InvalidRequestError(
                f"'{self._model.name}' is not calibrated, so it has no confidences; calibrate it (motet calibrate), or leave "
                "return_confidence and abstain_below out",
                field="return_confidence",
            )
        if request.return_confidence and not self._is_default(request.ensemble):
            raise InvalidRequestError(
                f"'{self._model.name}' is calibrated for its own members and mix; leave the ensemble and drafts out, or "
                "return_confidence and abstain_below",
                field="return_confidence",
            )
        if params.prompt_logprobs is not None and len({member.view for member in request.ensemble.members}) > 1:
            raise InvalidRequestError(
                "prompt_logprobs are of one prompt, and members see different ones; leave the views out, or prompt_logprobs",
                field="prompt_logprobs",
            )
        if embeds or any(request.embedded):
            self._check_embedded(request)
        if params.n > self._config.max_waiting:
            raise InvalidRequestError(
                f"n is {params.n}; the server queues at most max_waiting ({self._config.max_waiting}) choices",
                field="n",
            )
        _check_ids("logit_bias", params.logit_bias, self._model.vocab_size)
        _check_ids("logprob_token_ids", params.logprob_token_ids, self._model.vocab_size)
        _check_ids("stop_token_ids", params.stop_token_ids, self._model.vocab_size)
        for prompt in request.prompts:  # also those that no member sees
            _check_ids("prompt", (min(prompt), max(prompt)), self._model.vocab_size)
        self._check_size(request)

    def _check_embedded(self, request: Request) -> None:
        if not self._takes_embedded:
            raise InvalidRequestError(
                "the backend that serves here takes token ids only, and the prompt has embedded rows; serve with backend cpu",
                field="prompt",
            )
        hidden = self._model.hidden_size
        for span in (span for spans in request.embedded for span in spans):
            if span.rows.shape[1] != hidden:  # a step of rows of two widths would end everybody's requests
                raise InvalidRequestError(
                    f"embedded rows at position {span.start} have {span.rows.shape[1]} values, '{self._model.name}' takes "
                    f"{hidden} (hidden_size); encode them for this model",
                    field="embedded",
                )
        if request.sampling.prompt_logprobs is not None:
            raise InvalidRequestError(
                "prompt_logprobs are of tokens, and the prompt has embedded rows, which have no probability; leave "
                "prompt_logprobs out",
                field="prompt_logprobs",
            )

    def _is_default(self, ensemble: Ensemble) -> bool:
        own = self._model.default_ensemble
        return ensemble.space is own.space and set(ensemble.members) == set(own.members)

    def _check_size(self, request: Request) -> None:
        """Check that the group can run when it is alone: then it is certain to run at some time."""
        limit = self._model.max_model_len
        prompts = [request.prompts[view] for view in {member.view for member in request.ensemble.members}]
        if len(prompts) > self._config.max_num_seqs:
            raise InvalidRequestError(
                f"the request has {len(prompts)} views; at most max_num_seqs ({self._config.max_num_seqs}) can run at "
                "once; use fewer",
                field="ensemble.members.view",
            )
        for prompt in prompts:
            if len(prompt) >= limit:
                raise ContextLengthError(
                    f"the prompt has {len(prompt)} tokens; the context holds {limit} with at least one for "
                    "the answer; shorten it",
                    field="prompt",
                )
        answer = self._answer_room(request)
        needed = sum(self._blocks.blocks_for(len(prompt) + answer) for prompt in prompts)
        if needed > self._blocks.num_blocks:
            raise ContextLengthError(
                f"the request may need {needed} blocks of KV cache, there are {self._blocks.num_blocks}; "
                "lower max_tokens",
                field="max_tokens",
            )

    def _answer_room(self, request: Request) -> int:
        """Most tokens that the answer may have."""
        longest = max(len(request.prompts[member.view]) for member in request.ensemble.members)
        room = self._model.max_model_len - longest
        return room if request.sampling.max_tokens is None else min(room, request.sampling.max_tokens)

    def _drafter(self, params: SamplingParams) -> Drafter | None:
        tokens = self._config.speculative_tokens if params.speculative_tokens is None else params.speculative_tokens
        return Drafter(tokens) if tokens and self._can_verify else None


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"token id {token_id} in {field} is not in 0…{vocab_size - 1}", field=field)
