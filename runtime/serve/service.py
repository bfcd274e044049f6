"""`Service`: what every door calls. It accepts requests that depend on no transport, and answers with deltas.

A door translates its messages to `GenerateRequest`, its calls to these methods, and `MotetError` to its statuses.
Everything else is done here, once for all doors: checks and defaults, tokenising off the event loop, unique request
ids, choices, slow readers, cancelling, draining.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import TypeVar

from ..api.limits import MAX_MESSAGE_BYTES
from ..api.model_info import ModelInfo
from ..api.output import Completion, Output, join
from ..api.prompt import Prompt
from ..api.request import Ensemble, FinishReason, GenerateRequest, Request
from ..api.rules import Integer
from ..engine.consensus import draft_requests, most_agreed
from ..engine.engine import Engine
from ..engine.stats import EngineStats
from ..errors import InvalidRequestError, MotetError, NotFoundError, OverloadedError, shown
from ..text.prompt import build_prompt

log = logging.getLogger("motet.service")
T = TypeVar("T")
_POLL_S = 0.02
_READERS = 2  # threads that read and tokenise requests


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
        self._is_draining = False
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="motet-reader")
        self._num_open = 0

    # ---- generation ----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """Deltas of all choices, until each has one with a `finish_reason`.

        Closing the iterator (`contextlib.aclosing`) or cancelling the task that reads it ends the request and frees its
        blocks. Raises `InvalidRequestError`, `InvalidEnsembleError`, `ContextLengthError`, `OverloadedError`,
        `UnavailableError`, and the error that ended a choice, such as `NumericalError`.
        """
        tokenised = await self.in_thread(lambda: self._tokenise(request))
        if tokenised.drafts:
            yield await self._consensus(request.request_id, tokenised)
            return
        async with aclosing(self._answer(request.request_id, tokenised)) as outputs:
            async for output in outputs:
                yield output

    async def _consensus(self, request_id: str, tokenised: Request) -> Output:
        """The draft that agrees most with the others, whole. Its seed is the request's."""
        assert tokenised.sampling.seed is not None

        async def run(draft: Request) -> Output:
            choices: dict[int, Completion] = {}
            async with aclosing(self._answer(draft.request_id, draft)) as outputs:
                async for output in outputs:
                    join(choices, output)
            return choices[0]

        tasks = [asyncio.create_task(run(draft)) for draft in draft_requests(tokenised)]
        try:
            whole = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        loop = asyncio.get_running_loop()
        chosen = whole[await loop.run_in_executor(self._readers, most_agreed, whole)]
        chosen.request_id, chosen.seed = request_id or tokenised.request_id, tokenised.sampling.seed
        return chosen

    async def _answer(self, request_id: str, tokenised: Request) -> AsyncGenerator[Output, None]:
        with self._open():
            queue = OutputQueue(asyncio.get_running_loop())
            self._engine.submit(tokenised, queue.put)
            unfinished = tokenised.sampling.n
            try:
                while unfinished:
                    for output in await queue.take():
                        if output.error is not None:
                            raise output.error
                        unfinished -= output.finish_reason is not None
                        output.request_id = request_id or tokenised.request_id
                        yield output
            finally:
                if unfinished:
                    self._engine.abort(tokenised.request_id, FinishReason.CANCELLED)

    async def complete(self, request: GenerateRequest) -> list[Completion]:
        """The whole answer, one completion per choice, in order; refused if it may be larger than a message
        (`MAX_MESSAGE_BYTES`). Cancelling and errors: see `generate`."""
        tokenised = await self.in_thread(lambda: self._tokenise(request))
        self._check_answer(tokenised)
        if tokenised.drafts:
            return [await self._consensus(request.request_id, tokenised)]
        choices: dict[int, Completion] = {}
        async with aclosing(self._answer(request.request_id, tokenised)) as outputs:
            async for output in outputs:
                join(choices, output)
        return [choices[choice] for choice in sorted(choices)]

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, chat template applied. Raises `InvalidRequestError`, and `ContextLengthError` if there
        are certainly more than the context holds."""
        limit = self._engine.model.max_model_len
        return await self.in_thread(lambda: build_prompt(self._engine.tokenizer, prompt, limit))

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises `InvalidRequestError` for more than the context holds, or an unknown id."""
        model = self._engine.model
        if len(token_ids) > model.max_model_len:
            raise InvalidRequestError(
                f"{len(token_ids)} token ids; at most {model.max_model_len}, the context, are allowed",
                field="token_ids",
            )
        for token_id in token_ids:
            Integer(0, model.vocab_size - 1).check("token_ids", token_id, "every id in token_ids")
        return await self.in_thread(lambda: self._engine.tokenizer.decode(token_ids, skip_special_tokens))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run work that grows with a client's message in one of few threads, so that neither the event loop nor other
        work stands still. Cancelling ends it if it has not begun. An exception that is not a `MotetError` is a bug: it
        is logged and raised as `MotetError`. Raises `OverloadedError` if too many requests are open."""
        try:
            with self._open():
                return await asyncio.get_running_loop().run_in_executor(self._readers, work)
        except MotetError:
            raise
        except Exception as error:
            log.exception("a message could not be translated")
            raise MotetError("the server failed on this message; its log has the error") from error

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Count a request while it is read, and until its answer has been read."""
        limit = self._engine.config.max_requests
        if self._num_open >= limit:
            raise OverloadedError(f"{limit} requests (max_requests) are open on this server; try again later")
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def _check_answer(self, request: Request) -> None:
        """Raises `InvalidRequestError` if the whole answer may be too large for one message. What cannot be delivered
        must not be computed."""
        params, room = request.sampling, self._engine.model.max_model_len - min(map(len, request.prompts))
        tokens = params.n * min(room, params.max_tokens or room)
        size = 16 + (self._engine.tokenizer.max_token_bytes or 64)  # bytes per token: its text and id, and the fields
        if params.logprobs is not None:
            size += 16 + 16 * params.logprobs
        if request.return_member_logprobs:
            size += 8 + 4 * len(request.ensemble.members)
        if request.return_confidence:
            size += 8
        if tokens * size > MAX_MESSAGE_BYTES:
            raise InvalidRequestError(
                f"the answer may have {tokens} tokens of {size} bytes; a whole answer has at most {MAX_MESSAGE_BYTES} bytes; "
                "lower max_tokens, n or logprobs, or stream it (Generate)",
                field="max_tokens",
            )

    def _tokenise(self, request: GenerateRequest) -> Request:
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
        sampling = request.sampling
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
        )

    # ---- the model -----------------------------------------------------------------------------------------------

    def models(self) -> list[ModelInfo]:
        return [self._engine.model]

    def model(self, name: str = "") -> ModelInfo:
        """The model of that name; the served one if the name is empty. Raises `NotFoundError`."""
        model = self._engine.model
        if name not in ("", model.name):
            raise NotFoundError(f"there is no model {shown(name)} here; this server serves '{model.name}'")
        return model

    def stats(self) -> EngineStats:
        return self._engine.stats()

    # ---- going out of service ------------------------------------------------------------------------------------

    @property
    def failure(self) -> MotetError | None:
        """Why the engine ended by itself; None while it runs."""
        return self._engine.failure

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def drain(self) -> None:
        """Accept no more requests; those already accepted run to their end. Returns at once."""
        self._engine.drain()
        self._is_draining = True

    async def wait_out_of_service(self) -> None:
        """Wait until `drain` is called or the engine fails."""
        while not self._is_draining and self.failure is None:
            await asyncio.sleep(_POLL_S)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until every answer has been read, at most so many seconds. Returns whether that is so."""
        end = time.monotonic() + timeout_s
        while self._num_open and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        return not self._num_open

    def shut_down(self) -> None:
        """End all requests with what they have (FinishReason.SHUTDOWN)."""
        self._engine.abort(None, FinishReason.SHUTDOWN)
