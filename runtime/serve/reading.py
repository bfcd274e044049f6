"""`RequestReader`: from what a caller asks to what the engine accepts."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..api.prompt import Prompt
from ..api.request import Ensemble, GenerateRequest, Owner, Request
from ..api.rules import Integer
from ..engine.interface import ServedEngine
from ..errors import InvalidRequestError
from ..text.media import F32
from ..text.prompt import BuiltPrompt, read_prompts
from ..trust.identity import Identity
from ..trust.quotas import Quotas


@dataclass(frozen=True, slots=True)
class Reading:
    """A request as the engine accepts it, but for its media: `prompts` have placeholders in their places."""

    request: Request
    prompts: tuple[BuiltPrompt, ...]

    @property
    def has_media(self) -> bool:
        return any(one.media for one in self.prompts)

    def encoded(self, is_wanted: Callable[[], bool]) -> Request:
        """The request with its media, each decoded and encoded once. Raises what `BuiltPrompt.spans` raises."""
        rows: dict[bytes, Sequence[F32]] = {}
        salt = self.request.cache_salt
        return dataclasses.replace(
            self.request, embedded=tuple(one.spans(salt, rows, is_wanted) for one in self.prompts)
        )


class RequestReader:
    """Thread-safe. It tokenises, so it must not run on the event loop."""

    def __init__(self, engine: ServedEngine, quotas: Quotas) -> None:
        self._engine, self._quotas = engine, quotas

    def read(self, request: GenerateRequest, identity: Identity) -> Reading:
        """The request as the engine accepts it, its media not yet decoded. Views with equal tokens and media
        become one. The engine's id is new: two clients may choose the same id, and must not cancel each other's request."""
        salt = _salt(identity.tenant, request.cache_salt)
        built: dict[tuple[tuple[int, ...], tuple[bytes, ...]], BuiltPrompt] = {}
        view_of = []  # view of the request → index into the prompts
        for one in self._built((request.prompt, *request.views)):
            key = one.token_ids, tuple(medium.digest for medium in one.media)
            built.setdefault(key, one)
            view_of.append(list(built).index(key))
        prompts = tuple(built.values())
        ensemble = self._engine.model.default_ensemble
        if request.ensemble is not None:
            members = tuple(dataclasses.replace(m, view=view_of[m.view]) for m in request.ensemble.members)
            ensemble = Ensemble(members, request.ensemble.space)
        sampling, owner = request.sampling, self.owner(identity)
        choices = max(sampling.n, request.drafts)
        if owner.max_waiting is not None and choices > owner.max_waiting:
            raise InvalidRequestError(
                f"n or drafts is {choices}; the server queues at most {owner.max_waiting} choices of a tenant",
                field="n",
            )
        if request.drafts and sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(64))
        tokenised = Request(
            request_id=uuid.uuid4().hex,
            prompts=tuple(one.token_ids for one in prompts),
            ensemble=ensemble,
            sampling=sampling,
            time_limit_s=request.time_limit_s,
            return_member_logprobs=request.return_member_logprobs,
            return_confidence=request.return_confidence,
            abstain_below=request.abstain_below,
            drafts=request.drafts,
            priority=request.priority,
            structure=request.structure,
            cache_salt=salt,
            owner=owner,
        )
        return Reading(tokenised, prompts)

    def built(self, prompt: Prompt) -> BuiltPrompt:
        """A prompt as token ids; its media are not decoded."""
        [built] = self._built([prompt])
        return built

    def _built(self, prompts: Sequence[Prompt]) -> list[BuiltPrompt]:
        engine = self._engine
        return read_prompts(engine.tokenizer, prompts, engine.model.max_model_len, engine.media)

    def text(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Raises `InvalidRequestError` for more token ids than the context holds, or an unknown one."""
        model = self._engine.model
        if len(token_ids) > model.max_model_len:
            raise InvalidRequestError(
                f"{len(token_ids)} token ids; at most {model.max_model_len}, the context, are allowed",
                field="token_ids",
            )
        for token_id in token_ids:
            Integer(0, model.vocab_size - 1).check("token_ids", token_id, "every id in token_ids")
        return self._engine.tokenizer.decode(token_ids, skip_special_tokens)

    def owner(self, identity: Identity) -> Owner:
        """Whose turn this caller's requests take."""
        limits, most = self._quotas.of(identity.tenant), self._engine.config.max_waiting
        waiting = limits.max_waiting or (max(most // 2, 1) if identity.tenant else None)
        return Owner(identity.tenant, limits.weight, identity.is_background, waiting)


def _salt(tenant: str, salt: str) -> bytes:
    """What keeps a tenant's cached prefixes apart from others', and within it those of each salt of its clients."""
    if not tenant and not salt:
        return b""
    return hashlib.blake2b(salt.encode(), key=tenant.encode(), digest_size=16).digest()
