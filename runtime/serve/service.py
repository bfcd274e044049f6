"""`Service`: what every door calls. It accepts requests that depend on no transport, and answers with deltas.

A door finds out who calls (`Access`) and whether that caller may use the method, translates its messages to
`GenerateRequest`, its calls to these methods, and `MotetError` to its statuses. Everything else is done here, once for
all doors: checks and defaults, quotas, tenants, tokenising off the event loop, unique request ids, choices, slow readers,
cancelling, draining, the record of each call.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, contextmanager, suppress
from typing import Any, TypeVar

from ..api.limits import MAX_MESSAGE_BYTES, MAX_REQUEST_ID_BYTES, MAX_TEXTS
from ..api.model_info import ModelInfo
from ..api.output import Completion, Output, join
from ..api.prompt import Prompt, has_media
from ..api.request import Ensemble, FinishReason, GenerateRequest, Request
from ..api.rules import Text
from ..engine.consensus import draft_requests, most_agreed
from ..engine.interface import ServedEngine
from ..engine.stats import EngineStats
from ..errors import InvalidRequestError, MotetError, NotFoundError, shown
from ..text.prompt import build_prompt
from ..text.tokenizer import Tokenizer
from ..trust.quotas import Quotas, TenantLimits
from .answer_size import check_answer_size
from .calls import Call, Caller, Calls, CallSink
from .embeddings import Embeddings, embed_all
from .output_queue import Delivery, OutputQueue
from .reading import Reading, RequestReader
from .structures import StructureCompiler

log = logging.getLogger("motet.service")
T = TypeVar("T")
_POLL_S = 0.02
_REQUEST_ID = Text(MAX_REQUEST_ID_BYTES)
_READERS = 2  # threads that read and tokenise requests, and as many for those with media, which take longer


class Service:
    """One engine, for any number of doors on one event loop. Raises typed errors (`runtime.errors`) and no others."""

    def __init__(
        self,
        engine: ServedEngine,
        *,
        limits: Mapping[str, TenantLimits] | None = None,
        sinks: Iterable[CallSink] = (),
        send_timeout_s: float = 60.0,
        stream_interval: int = 1,
    ) -> None:
        """`limits`: of tenants, see `Quotas`. `send_timeout_s`: seconds that a delta may wait for its reader; then the request
        ends, and so does the task that should have read. `stream_interval`: tokens per delta of a choice, see `OutputQueue`."""
        self._engine = engine
        self._quotas = Quotas(limits or {}, engine.config.max_requests)
        self.calls = Calls(sinks, engine.model.name)
        self.send_timeout_s, self._stream_interval = send_timeout_s, stream_interval
        self._is_leaving = self._is_shut_down = False
        self._delivery = Delivery()
        self._reader = RequestReader(engine, self._quotas)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="motet-reader")
        self._media_readers = ThreadPoolExecutor(_READERS, thread_name_prefix="motet-media")
        self._structures = StructureCompiler(engine.grammars, self._run)
        self._of_caller: dict[tuple[str, str], set[str]] = {}  # tenant and the client's id → ids of the engine

    # ---- generation ----------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest, caller: Caller) -> AsyncGenerator[Output, None]:
        """Deltas of all choices, until each has one with a `finish_reason`.

        Closing the iterator (`contextlib.aclosing`) or cancelling the task that reads it ends the request and frees its
        blocks. Raises `InvalidRequestError`, `InvalidEnsembleError`, `ContextLengthError`, `OverloadedError`,
        `UnavailableError`, and the error that ended a choice, such as `NumericalError`.
        """
        with self.calls.call("generate", caller, request.request_id) as call, self._open(caller):
            tokenised = await self._accept(request, caller, call)
            async with aclosing(self._outputs(request, tokenised, call)) as outputs:
                async for output in outputs:
                    yield output

    async def complete(
        self, request: GenerateRequest, caller: Caller, most_bytes: int = MAX_MESSAGE_BYTES
    ) -> list[Completion]:
        """The whole answer, one completion per choice, in order; refused if it may have more than `most_bytes` bytes.
        Cancelling and errors: see `generate`."""
        with self.calls.call("complete", caller, request.request_id) as call, self._open(caller):
            tokenised = await self._accept(request, caller, call, most_bytes)
            choices: dict[int, Completion] = {}
            async with aclosing(self._outputs(request, tokenised, call)) as outputs:
                async for output in outputs:
                    join(choices, output)
            return [choices[choice] for choice in sorted(choices)]

    async def _accept(
        self, request: GenerateRequest, caller: Caller, call: Call, most_bytes: int | None = None
    ) -> Request:
        """The request as the engine accepts it, within the tenant's quota of tokens. `most_bytes`: of the answer, if it is sent
        whole. Media are decoded and encoded only after all that can refuse the request has been asked."""
        if (structure := request.structure) is not None:  # the engine finds it among those of late
            await self._structures.compile(structure, caller.identity.tenant)
        threads = None
        if any(map(has_media, (request.prompt, *request.views))):
            self._quotas.check_tokens(caller.identity.tenant, 1)  # before they are read
            threads = self._media_readers
        reading = await self._run(lambda: self._reader.read(request, caller.identity), threads)
        tokenised = reading.request
        call.submitted(tokenised)
        self._quotas.check_tokens(caller.identity.tenant, call.prompt_tokens)
        if most_bytes is not None:
            check_answer_size(tokenised, self._engine, most_bytes)
        if reading.has_media:
            for one in draft_requests(tokenised) if tokenised.drafts else (tokenised,):
                self._engine.check(one)
            call.request = tokenised = await self._encoded(reading)
        return tokenised

    async def _encoded(self, reading: Reading) -> Request:
        """The request with its media. A caller that goes away keeps its place until the thread is done, which encodes no further
        medium: otherwise callers that cancel would queue more work than there are places."""
        is_gone = threading.Event()
        work = self._media_readers.submit(reading.encoded, lambda: not is_gone.is_set())
        done = asyncio.wrap_future(work)
        try:
            return await self._translated(asyncio.shield(done))
        except asyncio.CancelledError:
            is_gone.set()
            while not work.cancel() and not work.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([done])
            done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else asks
            raise

    async def _outputs(self, request: GenerateRequest, tokenised: Request, call: Call) -> AsyncGenerator[Output, None]:
        if tokenised.drafts:
            chosen = await self._consensus(request.request_id, tokenised)
            call.add(chosen)
            yield chosen
            return
        async with aclosing(self._answer(request.request_id, tokenised)) as outputs:
            async for output in outputs:
                call.add(output)
                yield output

    async def _consensus(self, request_id: str, tokenised: Request) -> Output:
        """The draft that agrees most with the others, whole. Its seed is the request's."""
        assert tokenised.sampling.seed is not None

        async def run(draft: Request) -> Output:
            choices: dict[int, Completion] = {}
            async with aclosing(self._answer(request_id, draft)) as outputs:
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
        tenant, unfinished = tokenised.owner.tenant, tokenised.sampling.n
        with self._known(tenant, request_id, tokenised.request_id):
            queue = OutputQueue(self._delivery.here(), self._stream_interval)
            self._engine.submit(tokenised, queue.put, self._delivery.wake)
            self._quotas.spend(tenant, sum(map(len, tokenised.prompts)))
            watch = asyncio.create_task(self._end_if_unread(queue, asyncio.current_task()))
            try:
                while unfinished:
                    for output in await queue.take():
                        if output.error is not None:
                            raise output.error
                        unfinished -= output.finish_reason is not None
                        self._quotas.spend(tenant, len(output.token_ids))
                        output.request_id = request_id or tokenised.request_id
                        yield output
            finally:
                watch.cancel()
                if unfinished:
                    self._engine.abort(tokenised.request_id, FinishReason.CANCELLED)

    async def _end_if_unread(self, queue: OutputQueue, reader: asyncio.Task[Any] | None) -> None:
        """A reader that takes nothing holds memory, and a place among the open requests."""
        while queue.unread_s < self.send_timeout_s:
            await asyncio.sleep(max(self.send_timeout_s - queue.unread_s, _POLL_S))
        log.warning("an answer was not read for %g s; it is ended", self.send_timeout_s)
        if reader is not None:
            reader.cancel()

    def abort(self, request_id: str, caller: Caller) -> int:
        """End the open requests of the caller's tenant with this id; their answers keep what they have. Returns how many
        there were."""
        _REQUEST_ID.check("request_id", request_id)
        with self.calls.call("abort", caller, request_id):
            found = self._of_caller.get((caller.identity.tenant, request_id), set()) if request_id else set()
            for engine_id in found:
                self._engine.abort(engine_id, FinishReason.CANCELLED)
            return len(found)

    @contextmanager
    def _known(self, tenant: str, request_id: str, engine_id: str) -> Iterator[None]:
        """Let `abort` find a request while it is open."""
        key = tenant, request_id
        self._of_caller.setdefault(key, set()).add(engine_id)
        try:
            yield
        finally:
            self._of_caller[key].remove(engine_id)
            if not self._of_caller[key]:
                del self._of_caller[key]

    async def embed(self, prompts: Sequence[Prompt], ensemble: Ensemble | None, caller: Caller) -> Embeddings:
        """The embedding of each prompt, of length 1 (see `Embedder`). `ensemble` None is the bundle's own; its members see the
        prompts themselves. Raises what `generate` raises."""
        tenant, model = caller.identity.tenant, self._engine.model
        if not 1 <= len(prompts) <= MAX_TEXTS:
            raise InvalidRequestError(f"1 to {MAX_TEXTS} texts are embedded at once, got {len(prompts)}", field="input")
        with (
            self.calls.call("embed", caller) as call,
            self._quotas.open(tenant, is_background=caller.identity.is_background),
        ):
            tokens = await self._run(
                lambda: [build_prompt(self.tokenizer, prompt, model.max_model_len) for prompt in prompts]
            )
            call.prompt_tokens = sum(map(len, tokens))
            self._quotas.check_tokens(tenant, call.prompt_tokens)
            chosen = ensemble or model.default_ensemble
            call.mix = {member.name: member.mix for member in chosen.members}
            self._quotas.spend(tenant, call.prompt_tokens)
            found = await embed_all(self._engine.embedder, tokens, chosen, self._reader.owner(caller.identity))
            return Embeddings(found, call.prompt_tokens)

    async def tokenize(self, prompt: Prompt, caller: Caller) -> tuple[int, ...]:
        """Token ids of a prompt, chat template applied. Raises `InvalidRequestError`, and `ContextLengthError` if there
        are certainly more than the context holds."""
        threads = self._media_readers if has_media(prompt) else None
        with self.calls.call("tokenize", caller) as call, self._quotas.place(caller.identity.tenant):
            found = await self._run(lambda: self._reader.built(prompt).token_ids, threads)
            call.prompt_tokens = len(found)
            return found

    async def detokenize(self, token_ids: Sequence[int], caller: Caller, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises what `RequestReader.text` raises."""
        with self.calls.call("detokenize", caller):
            return await self.in_thread(lambda: self._reader.text(token_ids, skip_special_tokens), caller)

    async def read(self, method: str, work: Callable[[], T], caller: Caller) -> T:
        """A door's message as what the method takes (`in_thread`). One that is refused is recorded as a call."""
        try:
            return await self.in_thread(work, caller)
        except MotetError:
            with self.calls.call(method, caller):
                raise

    async def in_thread(self, work: Callable[[], T], caller: Caller) -> T:
        """Run work that grows with a client's message in one of few threads, so that neither the event loop nor other
        work stands still. Cancelling ends it if it has not begun. An exception that is not a `MotetError` is a bug: it
        is logged and raised as `MotetError`. Raises `OverloadedError` if too many requests are open."""
        with self._quotas.place(caller.identity.tenant):
            return await self._run(work)

    def _open(self, caller: Caller) -> AbstractContextManager[None]:
        return self._quotas.open(caller.identity.tenant, is_background=caller.identity.is_background)

    def place(self, caller: Caller) -> AbstractContextManager[None]:
        """A place among the open requests, for what a door does by itself. Raises `OverloadedError`."""
        return self._quotas.place(caller.identity.tenant)

    def at_once(self, most: int, caller: Caller) -> int:
        """How many requests may be made of one: `most`, or what the tenant may have open."""
        limit = self._quotas.of(caller.identity.tenant).max_requests
        return most if limit is None else max(1, min(most, limit // 2 if caller.identity.is_background else limit))

    async def encode(self, work: Callable[[], T]) -> T:
        """An answer as a message, in a reader's thread. The answer is made: it needs no place any more."""
        return await self._run(work)

    async def _run(self, work: Callable[[], T], threads: ThreadPoolExecutor | None = None) -> T:
        return await self._translated(asyncio.get_running_loop().run_in_executor(threads or self._readers, work))

    async def _translated(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except MotetError:
            raise
        except Exception as error:
            log.exception("a message could not be translated")
            raise MotetError("the server failed on this message; its log has the error") from error

    # ---- the model -----------------------------------------------------------------------------------------------

    @property
    def served(self) -> ModelInfo:
        """The model that is served, for doors; `models` and `model` are calls of a caller."""
        return self._engine.model

    @property
    def places_for_jobs(self) -> int:
        """Records of batch jobs that are answered at once."""
        return self._engine.config.max_num_seqs

    @property
    def most_media_bytes(self) -> int:
        """Bytes of a request's media, beside which its other fields have their own limit; 0: it may have none."""
        return self._engine.media.most_bytes

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def models(self, caller: Caller) -> list[ModelInfo]:
        with self.calls.call("list_models", caller):
            return [self._engine.model]

    def model(self, name: str, caller: Caller) -> ModelInfo:
        """The model of that name; the served one if the name is empty. Raises `NotFoundError`."""
        model = self._engine.model
        with self.calls.call("get_model", caller):
            if name not in ("", model.name):
                raise NotFoundError(f"there is no model {shown(name)} here; this server serves '{model.name}'")
            return model

    def stats(self) -> EngineStats:
        return self._engine.stats()

    # ---- going out of service ------------------------------------------------------------------------------------

    @property
    def failure(self) -> MotetError | None:
        """Why the engine ended by itself, or calls cannot be recorded any more; None while all is well."""
        return self._engine.failure or self.calls.failure

    @property
    def is_leaving(self) -> bool:
        return self._is_leaving

    def leave(self, caller: Caller | None = None) -> None:
        """Go out of service soon: doors report it (`wait_out_of_service`), requests are still answered. `caller`: who wants
        it, if it is not the operator."""
        if caller is not None:
            with self.calls.call("drain", caller):
                pass
        self._is_leaving = True

    def drain(self, caller: Caller | None = None) -> None:
        """Accept no more requests; those that run go on to their end, those that wait end with `UnavailableError`. Returns
        at once."""
        self.leave(caller)
        self._engine.drain()

    async def wait_out_of_service(self) -> None:
        """Wait until `leave` or `drain` is called or the engine fails."""
        while not self._is_leaving and self.failure is None:
            await asyncio.sleep(_POLL_S)

    async def wait_lame_duck(self, seconds: float) -> None:
        """Wait so many seconds, or until `shut_down` is called or the engine fails."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._is_shut_down and self.failure is None:
            await asyncio.sleep(_POLL_S)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until every answer has been read, at most so many seconds. Returns whether that is so."""
        end = time.monotonic() + timeout_s
        while self._quotas.num_open and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        return not self._quotas.num_open

    def close(self) -> None:
        """End the threads that read messages, when no door calls any more. What they have begun ends by itself."""
        for threads in (self._readers, self._media_readers):
            threads.shutdown(wait=False, cancel_futures=True)

    def shut_down(self) -> None:
        """End all requests with what they have (FinishReason.SHUTDOWN)."""
        self._is_shut_down = True
        self._engine.drain()
        self._engine.abort(None, FinishReason.SHUTDOWN)
