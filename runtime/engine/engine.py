"""`Engine`: the loop schedule → step → commit → stream, on one thread, and the thread-safe door to it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..api.config import EngineConfig
from ..api.model_info import ModelInfo
from ..api.output import Completion, Output, Timings, Usage
from ..api.request import FinishReason, Request
from ..backends.base import Backend
from ..backends.open import open_backend
from ..errors import MotetError, NumericalError, OverloadedError, UnavailableError
from ..model.bundle import Bundle
from ..schedule.admission import Admission
from ..schedule.batch import StepOutput
from ..schedule.blocks import BlockManager
from ..schedule.scheduler import GroupTokens, Scheduler
from ..schedule.sequence import Group
from ..text.stream import TextStream
from ..text.tokenizer import Tokenizer

log = logging.getLogger("motet.engine")

OnOutput = Callable[[Output], None]


@dataclass(frozen=True, slots=True)
class EngineStats:
    waiting: int  # groups
    running: int  # groups
    free_blocks: int
    num_blocks: int
    steps: int
    tokens: int  # sampled since the start
    prompt_tokens: int  # of all views and adapters whose answer has begun
    cached_tokens: int  # of them, found in the prefix cache
    drafted_tokens: int  # rows of drafts that were verified, a group's once
    accepted_tokens: int  # of them, right


@dataclass(slots=True, eq=False)
class _Stream:
    """The text side of a group. It may have fewer tokens than the group, when a stop string ends in a draft."""

    request: Request
    group: Group
    text: TextStream
    on_output: OnOutput
    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    num_tokens: int = 0

    def usage(self) -> Usage:
        prompt = self.request.prompts[0]
        return Usage(len(prompt), self.num_tokens, min(self.group.sequences[0].num_cached, len(prompt)))

    def timings(self, now: float) -> Timings:
        admitted = self.admitted if self.admitted is not None else now
        first = self.first_token if self.first_token is not None else now
        return Timings(admitted - self.arrived, max(0.0, first - admitted), now - first)


class Engine:
    """Serves requests on one backend. `submit` and `abort` may be called from any thread."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, model: ModelInfo, config: EngineConfig) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.config = config
        self._backend = backend
        blocks = BlockManager(backend.num_blocks, backend.block_size)
        self._admission = Admission(model, config, blocks, can_verify=backend.can_verify)
        self._scheduler = Scheduler(
            blocks,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.prefill_chunk,
            prefix_cache=config.prefix_cache,
            sample_prefill=backend.can_sample_prefill,
        )
        self._streams: dict[Group, _Stream] = {}
        self._wake = threading.Condition()
        # Guarded by _wake, as are the next three. In order: an abort does not reach requests that come after it.
        self._inbox: deque[list[_Stream] | tuple[str, FinishReason]] = deque()
        self._num_queued = 0
        self._draining = False
        self._closed = False
        self._steps = 0
        self._tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._thread = threading.Thread(target=self._run, name="motet-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_bundle(cls, path: Path | str, config: EngineConfig | None = None, *, verify: bool = True) -> Engine:
        """Load a bundle and start an engine on it. Errors: see `Bundle.load`."""
        config = config or EngineConfig()
        bundle = Bundle.load(path, verify=verify)
        backend = open_backend(bundle, config)
        model = ModelInfo(
            name=bundle.name,
            members=bundle.members,
            default_ensemble=bundle.default_ensemble,
            eos_token_ids=bundle.eos_token_ids,
            vocab_size=bundle.config.vocab_size,
            max_model_len=min(config.max_model_len, bundle.config.max_position_embeddings),
            adapters=frozenset(bundle.members[member] for member in bundle.adapters),
        )
        return cls(backend, Tokenizer.from_dir(bundle.path), model, config)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ---- the door ------------------------------------------------------------------------------------------------

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queue a request. `on_output` gets every delta, from the engine's thread; it must not block.

        Raises `InvalidRequestError`, `InvalidEnsembleError`, `ContextLengthError`, `OverloadedError` (the queue is
        full), `UnavailableError` (draining or closed). After it returns, every choice ends with a `finish_reason`.
        """
        now = time.monotonic()
        streams = [
            _Stream(request, group, TextStream(self.tokenizer.stream(), request.sampling.stop), on_output, now)
            for group in self._admission.groups_of(request)
        ]
        with self._wake:
            if self._draining or self._closed:
                raise UnavailableError("the engine is shutting down; send the request to another server")
            if self._num_queued + len(streams) > self.config.max_waiting:
                raise OverloadedError(
                    f"{self._num_queued} choices are waiting and {len(streams)} more exceed max_waiting "
                    f"({self.config.max_waiting}); try again later"
                )
            self._num_queued += len(streams)
            self._inbox.append(streams)
            self._wake.notify()

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End all requests of this id that were submitted so far, with what they have. None is fine."""
        with self._wake:
            self._inbox.append((request_id, reason))
            self._wake.notify()

    def complete(self, requests: Sequence[Request], on_output: OnOutput | None = None) -> list[list[Completion]]:
        """Run requests to their end and return their choices, for offline use. Raises what `submit` raises (then the
        other requests are cancelled), and the error of a choice that failed. Not for the engine's own thread."""
        for request in requests:
            self._admission.check(request)
        choices: list[dict[int, Completion]] = [{} for _ in requests]
        room = threading.Semaphore(self.config.max_waiting)  # never more in flight than the queue takes

        def collector(index: int) -> OnOutput:
            def collect(delta: Output) -> None:
                empty = Completion(delta.request_id, delta.choice, delta.seed)
                choices[index].setdefault(delta.choice, empty).extend(delta)
                try:
                    if on_output is not None:
                        on_output(delta)
                finally:
                    if delta.finish_reason is not None:
                        room.release()

            return collect

        try:
            for index, request in enumerate(requests):
                for _ in range(request.sampling.n):
                    room.acquire()
                self.submit(request, collector(index))
            for _ in range(self.config.max_waiting):  # all came back: everything has ended
                room.acquire()
        except BaseException:  # an interrupt too
            for request in requests:
                self.abort(request.request_id)
            raise
        results = [[by_choice[choice] for choice in sorted(by_choice)] for by_choice in choices]
        for completion in (completion for result in results for completion in result):
            if completion.error is not None:
                raise completion.error
        return results

    def stats(self) -> EngineStats:
        blocks, waiting = self._scheduler.blocks, self._num_queued
        return EngineStats(
            waiting=waiting,
            running=len(self._scheduler.running),
            free_blocks=blocks.num_free,
            num_blocks=blocks.num_blocks,
            steps=self._steps,
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            drafted_tokens=self._scheduler.num_drafted,
            accepted_tokens=self._scheduler.num_accepted,
        )

    def drain(self) -> None:
        """Take no more requests; those that are here run to their end. Returns at once."""
        with self._wake:
            self._draining = True
            self._wake.notify()

    def close(self) -> None:
        """End all requests (CANCELLED, with what they have) and the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_idle(self) -> bool:
        """Nothing waits, nothing runs."""
        with self._wake:
            return not self._inbox and not self._streams

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """The thread. Whatever ends the loop, every stream gets its last output."""
        end = partial(self._finish, reason=FinishReason.CANCELLED)
        try:
            while self._take_inbox():
                self._step()
        except Exception as cause:  # a fault of our own: nobody may wait for an answer for ever
            log.exception("the engine stopped")
            error = MotetError(f"the engine stopped: {cause}; restart it")
            end = partial(self._end, reason=FinishReason.ERROR, error=error)  # the scheduler may be what is broken
        with self._wake:
            self._closed = True
            arrived = [stream for item in self._inbox if isinstance(item, list) for stream in item]
            self._inbox.clear()
        for stream in (*self._streams.values(), *arrived):
            end(stream)
        self._backend.close()

    def _take_inbox(self) -> bool:
        """Take in what came; sleep while there is nothing to do. False: the engine is closed."""
        ended: list[tuple[_Stream, FinishReason]] = []
        with self._wake:
            while not (self._inbox or self._closed or self._streams):
                self._wake.wait()
            while self._inbox:
                item = self._inbox.popleft()
                if isinstance(item, list):
                    for stream in item:
                        self._streams[stream.group] = stream
                        self._scheduler.add(stream.group)
                else:
                    request_id, reason = item
                    ended += [(s, reason) for s in self._streams.values() if s.request.request_id == request_id]
            closed = self._closed
        for stream, reason in ended:
            if stream.group in self._streams:  # not aborted twice
                self._finish(stream, reason)
        return not closed

    def _step(self) -> None:
        self._end_overdue()
        batch = self._scheduler.schedule()
        if batch is None:
            self._scheduler.check_integrity()
            return
        self._note_admitted()
        try:
            output = self._backend.step(batch)
        except Exception as error:  # whatever the backend raises must not end the engine
            self._fail_step(error)
            return
        self._steps += 1
        self._emit(self._scheduler.commit(output), output)

    def _note_admitted(self) -> None:
        now = time.monotonic()
        for group in self._scheduler.running:
            stream = self._streams[group]
            if stream.admitted is None:
                stream.admitted = now
                self._leave_queue()

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for stream in list(self._streams.values()):
            limit = stream.request.time_limit_s
            if limit is not None and now - stream.arrived >= limit:
                self._finish(stream, FinishReason.TIME_LIMIT)

    def _fail_step(self, error: Exception) -> None:
        """A step failed as a whole: its groups end with the error, all others go on."""
        log.exception("a step failed; its requests end with an error")
        for group in self._scheduler.fail():
            self._finish(self._streams[group], FinishReason.ERROR, error=MotetError(f"the backend failed: {error}"))

    def _emit(self, drawn: list[GroupTokens], output: StepOutput) -> None:
        now = time.monotonic()
        for run in drawn:
            stream = self._streams[run.group]
            if run.count and stream.first_token is None:
                stream.first_token = now
                self._prompt_tokens += sum(sequence.num_prompt for sequence in run.group.sequences)
                self._cached_tokens += sum(sequence.num_cached for sequence in run.group.sequences)
            self._extend(stream, run, output)

    def _extend(self, stream: _Stream, run: GroupTokens, output: StepOutput) -> None:
        """One delta of all tokens that a step gave the group, up to the one that ends it."""
        group = run.group
        delta = Output(group.request_id, group.choice, group.seed)
        for index in range(run.first, run.first + run.count):
            self._tokens += 1
            delta.token_ids.append(int(output.token_ids[index]))
            if group.params.logprobs is not None:
                delta.logprobs.append(float(output.logprobs[index]))
                delta.top_logprobs.append(output.top_logprobs[index])
            if group.return_member_logprobs:
                delta.member_logprobs.append(output.member_logprobs[index])
            reason = self._advance(stream, delta)
            if reason is not None:
                self._finish(stream, reason, delta=delta)
                return
        if run.error is None:
            self._send(stream, delta)
        else:
            error = NumericalError(f"no token for request '{group.request_id}': {run.error}")
            self._finish(stream, FinishReason.ERROR, delta=delta, error=error)

    def _advance(self, stream: _Stream, delta: Output) -> FinishReason | None:
        """Text of the delta's last token, and why it is the group's last, if it is. A stop token gives no text."""
        group, text, token_id = stream.group, stream.text, delta.token_ids[-1]
        stream.num_tokens += 1
        if token_id in group.stop_ids:
            delta.stop_matched = token_id
            return FinishReason.STOP
        delta.text += text.push(token_id, may_stop=stream.num_tokens >= group.params.min_tokens)
        if text.stopped is not None:
            delta.stop_matched = text.stopped
            return FinishReason.STOP
        return FinishReason.LENGTH if stream.num_tokens >= group.max_tokens else None

    def _finish(
        self, stream: _Stream, reason: FinishReason, *, delta: Output | None = None, error: MotetError | None = None
    ) -> None:
        self._scheduler.abort(stream.group)
        self._end(stream, reason, delta=delta, error=error)

    def _end(
        self, stream: _Stream, reason: FinishReason, *, delta: Output | None = None, error: MotetError | None = None
    ) -> None:
        """The last output, which is `delta` where there is one."""
        group = stream.group
        if stream.admitted is None:
            self._leave_queue()
        self._streams.pop(group, None)
        output = delta or Output(group.request_id, group.choice, group.seed)
        output.text += stream.text.flush()
        if reason is FinishReason.LENGTH and stream.text.stopped is not None:
            reason, output.stop_matched = FinishReason.STOP, stream.text.stopped
        output.finish_reason, output.error = reason, error
        output.usage, output.timings = stream.usage(), stream.timings(time.monotonic())
        self._send(stream, output)

    def _leave_queue(self) -> None:
        with self._wake:
            self._num_queued -= 1

    def _send(self, stream: _Stream, output: Output) -> None:
        try:
            stream.on_output(output)
        except Exception:  # a client's callback must not end the loop for the others
            log.exception("on_output of request '%s' failed", output.request_id)
