"""`RequestReader`: from what a caller asks to what the engine accepts."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import uuid

from ..api.request import Ensemble, GenerateRequest, Owner, Request
from ..engine.interface import ServedEngine
from ..errors import InvalidRequestError
from ..text.prompt import build_prompt
from ..trust.identity import Identity
from ..trust.quotas import Quotas


class RequestReader:
    """Thread-safe. It tokenises, so it must not run on the event loop."""

    def __init__(self, engine: ServedEngine, quotas: Quotas) -> None:
        self._engine, self._quotas = engine, quotas

    def read(self, request: GenerateRequest, identity: Identity) -> Request:
        """The request as the engine accepts it. Views with equal tokens become one. The engine's id is new: two
        clients may choose the same id, and must not cancel each other's request."""
        tokenizer, limit = self._engine.tokenizer, self._engine.model.max_model_len
        prompts: dict[tuple[int, ...], int] = {build_prompt(tokenizer, request.prompt, limit): 0}
        view_of = [0]  # view of the request → index into the prompts
        for view in request.views:
            view_of.append(prompts.setdefault(build_prompt(tokenizer, view, limit), len(prompts)))
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
        return Request(
            request_id=uuid.uuid4().hex,
            prompts=tuple(prompts),
            ensemble=ensemble,
            sampling=sampling,
            time_limit_s=request.time_limit_s,
            return_member_logprobs=request.return_member_logprobs,
            return_confidence=request.return_confidence,
            abstain_below=request.abstain_below,
            drafts=request.drafts,
            priority=request.priority,
            structure=request.structure,
            cache_salt=_salt(identity.tenant, request.cache_salt),
            owner=owner,
        )

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
