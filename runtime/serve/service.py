"""`Service`: what every door calls. It accepts requests that depend on no transport, and answers with deltas.

A door translates its messages to `GenerateRequest`, its calls to these methods, and `MotetError` to its statuses.
Everything else is done here, once for all doors: checks and defaults, tokenising off the event loop, unique request
ids, choices, slow readers, cancelling, draining.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from ..api.model_info import ModelInfo
from ..api.output import Completion, Output, join
from ..api.prompt import Prompt
from ..api.request import Ensemble, FinishReason, GenerateRequest, Request
from ..engine.engine import Engine, EngineStats
from ..errors import MotetError, NotFoundError
from ..text.prompt import build_prompt

log = logging.getLogger("motet.service")
T = TypeVar("T")
_IDLE_POLL_S = 0.02


class OutputQueue:
    """Deltas on their way from the engine's thread to one reader on the event loop.

    `put` never waits for the reader. Deltas of a choice that the reader has not taken yet are joined, so the queue
    holds at most one per choice.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: dict[int, Output] = {}
        self._ready = asyncio.Event()

    def put(self, output: Output) -> None:
        """Add a delta. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._add, output)

    def _add(self, output: Output) -> None:
        join(self._pending, output)
        self._ready.set()

    async def take(self) -> list[Output]:
        """All deltas that are ready; waits until there is one."""
        await self._ready.wait()
        self._ready.clear()
        pending, self._pending = list(self._pending.values()), {}
        return pending


class Service:
    """One engine, for any number of doors on one event loop. Raises typed errors (`runtime.errors`) and no others."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._draining = asyncio.Event()

    # ---- generation ----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """Deltas of all choices, until each has one with a `finish_reason`.

        Closing the iterator (`contextlib.aclosing`) or cancelling the task that reads it ends the request and frees its
        blocks. Raises `InvalidRequestError`, `InvalidEnsembleError`, `ContextLengthError`, `OverloadedError`,
        `UnavailableError`, and the error that ended a choice, such as `NumericalError`.
        """
        tokenised = await _in_thread(lambda: self._tokenise(request))
        queue = OutputQueue(asyncio.get_running_loop())
        self._engine.submit(tokenised, queue.put)
        unfinished = tokenised.sampling.n
        try:
            while unfinished:
                for output in await queue.take():
                    if output.error is not None:
                        raise output.error
                    unfinished -= output.finish_reason is not None
                    output.request_id = request.request_id or tokenised.request_id
                    yield output
        finally:
            if unfinished:
                self._engine.abort(tokenised.request_id, FinishReason.CANCELLED)

    async def complete(self, request: GenerateRequest) -> list[Completion]:
        """The whole answer, one completion per choice, in order. Cancelling and errors: see `generate`."""
        choices: dict[int, Completion] = {}
        async for output in self.generate(request):
            join(choices, output)
        return [choices[choice] for choice in sorted(choices)]

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, chat template applied. Raises `InvalidRequestError`."""
        return await _in_thread(lambda: build_prompt(self._engine.tokenizer, prompt))

    def _tokenise(self, request: GenerateRequest) -> Request:
        """The request as the engine accepts it. Views with equal tokens become one. The engine's id is new: two
        clients may choose the same id, and must not cancel each other's request."""
        tokenizer = self._engine.tokenizer
        prompts = [build_prompt(tokenizer, request.prompt)]
        view_of = [0]  # view of the request → index into `prompts`
        for view in request.views:
            token_ids = build_prompt(tokenizer, view)
            if token_ids not in prompts:
                prompts.append(token_ids)
            view_of.append(prompts.index(token_ids))
        ensemble = self._engine.model.default_ensemble
        if request.ensemble is not None:
            members = tuple(dataclasses.replace(m, view=view_of[m.view]) for m in request.ensemble.members)
            ensemble = Ensemble(members, request.ensemble.space)
        return Request(
            request_id=uuid.uuid4().hex,
            prompts=tuple(prompts),
            ensemble=ensemble,
            sampling=request.sampling,
            time_limit_s=request.time_limit_s,
            return_member_logprobs=request.return_member_logprobs,
        )

    # ---- the model -----------------------------------------------------------------------------------------------

    def models(self) -> list[ModelInfo]:
        return [self._engine.model]

    def model(self, name: str = "") -> ModelInfo:
        """The model of that name; the served one if the name is empty. Raises `NotFoundError`."""
        model = self._engine.model
        if name not in ("", model.name):
            raise NotFoundError(f"there is no model '{name}' here; this server serves '{model.name}'")
        return model

    def stats(self) -> EngineStats:
        return self._engine.stats()

    # ---- going out of service ------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Accept no more requests; those already accepted run to their end. Returns at once."""
        self._engine.drain()
        self._draining.set()

    async def wait_draining(self) -> None:
        """Wait until `drain` is called."""
        await self._draining.wait()

    async def wait_idle(self) -> None:
        """Wait until no request is queued or running."""
        while not self._engine.is_idle:
            await asyncio.sleep(_IDLE_POLL_S)


async def _in_thread(work: Callable[[], T]) -> T:
    """Run slow work, such as tokenising a long prompt, in a thread. An exception that is not a `MotetError` is a bug:
    it is logged and raised as `MotetError`."""
    try:
        return await asyncio.to_thread(work)
    except MotetError:
        raise
    except Exception as error:
        log.exception("a request could not be read")
        raise MotetError(f"the server failed to read the request: {type(error).__name__}: {error}") from error
