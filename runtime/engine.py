"""`Engine`: the loop schedule → step → commit → stream, on one thread, and the thread-safe door to it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .backend import Backend, open_backend
from .batch import StepOutput
from .blocks import BlockManager
from .bundle import Bundle
from .config import EngineConfig
from .errors import (
    ContextLengthError,
    InvalidEnsembleError,
    InvalidRequestError,
    MotetError,
    NumericalError,
    OverloadedError,
    UnavailableError,
)
from .output import Completion, Output, Timings, Usage
from .request import Ensemble, FinishReason, Member, Request
from .scheduler import Scheduler
from .sequence import Group
from .sequence import Sequence as TokenSequence
from .stream import TextStream
from .tokenizer import Tokenizer

log = logging.getLogger("motet.engine")

OnOutput = Callable[[Output], None]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a request is checked against."""

    name: str
    members: tuple[str, ...]
    default_ensemble: Ensemble
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    deltas: frozenset[str] = frozenset()  # the members that are low-rank updates


@dataclass(frozen=True, slots=True)
class EngineStats:
    waiting: int  # groups
    running: int  # groups
    free_blocks: int
    num_blocks: int
    steps: int
    tokens: int  # sampled since the start
    prompt_tokens: int  # of all views and deltas whose answer has begun
    cached_tokens: int  # of them, found in the prefix cache


@dataclass(slots=True, eq=False)
class _Stream:
    """The text side of a group."""

    request: Request
    group: Group
    text: TextStream
    on_output: OnOutput
    arrived: float
    admitted: float | None = None
    first_token: float | None = None

    def usage(self) -> Usage:
        prompt = self.request.prompts[0]
        return Usage(len(prompt), len(self.group.output), min(self.group.sequences[0].num_cached, len(prompt)))

    def timings(self, now: float) -> Timings:
        admitted = self.admitted if self.admitted is not None else now
        first = self.first_token if self.first_token is not None else now
        return Timings(admitted - self.arrived, max(0.0, first - admitted), now - first)


def choice_seed(seed: int, choice: int) -> int:
    """Seed of a choice: the request's own for choice 0, else splitmix64 of it (Steele et al. 2014)."""
    if choice == 0:
        return seed
    z = (seed + choice * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


class Engine:
    """Serves requests on one backend. `submit` and `abort` may be called from any thread."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, model: ModelInfo, config: EngineConfig) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.config = config
        self._backend = backend
        blocks = BlockManager(backend.num_blocks, backend.block_size)
        self._scheduler = Scheduler(
            blocks,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.prefill_chunk,
            prefix_cache=config.prefix_cache,
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
            deltas=frozenset(bundle.members[member] for member in bundle.deltas),
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
        streams = self._streams_of(request, on_output)
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
            self._check(request)
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

    # ---- a request becomes groups --------------------------------------------------------------------------------

    def _streams_of(self, request: Request, on_output: OnOutput) -> list[_Stream]:
        self._check(request)
        index_of = {name: index for index, name in enumerate(self.model.members)}
        members_of: dict[tuple[int, int], set[int]] = {}  # (view, delta) → members
        for member in request.ensemble.members:
            members_of.setdefault(self._sequence_key(member), set()).add(index_of[member.name])
        keys = sorted(members_of)
        terms = tuple((keys.index(self._sequence_key(m)), index_of[m.name], m.mix) for m in request.ensemble.members)
        room = self.model.max_model_len - max(len(request.prompts[view]) for view, _ in keys)
        params = request.sampling
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        eos = () if params.ignore_eos else self.model.eos_token_ids
        now = time.monotonic()
        streams = []
        for choice in range(params.n):
            group = Group(
                request_id=request.request_id,
                choice=choice,
                sequences=[
                    TokenSequence(request.prompts[view], tuple(sorted(members_of[view, delta])), delta)
                    for view, delta in keys
                ],
                terms=terms,
                space=request.ensemble.space,
                params=params,
                seed=choice_seed(seed, choice),
                max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
                stop_ids=frozenset((*eos, *params.stop_token_ids)),
                return_member_logprobs=request.return_member_logprobs,
            )
            text = TextStream(self.tokenizer.stream(), params.stop)
            streams.append(_Stream(request, group, text, on_output, now))
        return streams

    def _sequence_key(self, member: Member) -> tuple[int, int]:
        """(view, delta): members with equal ones share a sequence. A low-rank update changes keys and values from the
        first layer on, so it has a sequence of its own."""
        return member.view, self.model.members.index(member.name) if member.name in self.model.deltas else -1

    def _check(self, request: Request) -> None:
        for member in request.ensemble.members:
            if member.name not in self.model.members:
                raise InvalidEnsembleError(
                    f"'{member.name}' is not a member of '{self.model.name}'; "
                    f"its members are {list(self.model.members)}",
                    field="ensemble.members.name",
                )
        params = request.sampling
        if params.n > self.config.max_waiting:
            raise InvalidRequestError(
                f"n is {params.n}; the server queues at most max_waiting ({self.config.max_waiting}) choices", field="n"
            )
        _check_ids("logit_bias", params.logit_bias, self.model.vocab_size)
        _check_ids("stop_token_ids", params.stop_token_ids, self.model.vocab_size)
        self._check_size(request)

    def _check_size(self, request: Request) -> None:
        """Can the group run when it is alone? Then it can always run in the end."""
        blocks, limit = self._scheduler.blocks, self.model.max_model_len
        keys = {self._sequence_key(member) for member in request.ensemble.members}
        prompts = [request.prompts[view] for view, _ in keys]
        if len(prompts) > self.config.max_num_seqs:
            raise InvalidRequestError(
                f"the request has {len(prompts)} views and deltas; at most max_num_seqs ({self.config.max_num_seqs}) can run at "
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
            _check_ids("prompt", (min(prompt), max(prompt)), self.model.vocab_size)
        room = limit - max(map(len, prompts))
        answer = min(request.sampling.max_tokens or room, room)
        needed = sum(blocks.blocks_for(len(prompt) + answer) for prompt in prompts)
        if needed > blocks.num_blocks:
            raise ContextLengthError(
                f"the request may need {needed} blocks of KV cache, there are {blocks.num_blocks}; lower max_tokens",
                field="max_tokens",
            )

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

    def _emit(self, groups: list[Group], output: StepOutput) -> None:
        now = time.monotonic()
        for index, group in enumerate(groups):
            stream = self._streams[group]
            if index in output.errors:
                error = NumericalError(f"no token for request '{group.request_id}': {output.errors[index]}")
                self._finish(stream, FinishReason.ERROR, error=error)
                continue
            self._tokens += 1
            if stream.first_token is None:
                stream.first_token = now
                self._prompt_tokens += sum(sequence.num_prompt for sequence in group.sequences)
                self._cached_tokens += sum(sequence.num_cached for sequence in group.sequences)
            token_id = int(output.token_ids[index])
            delta = Output(group.request_id, group.choice, group.seed, token_ids=[token_id])
            if group.params.logprobs is not None:
                delta.logprobs = [float(output.logprobs[index])]
                delta.top_logprobs = [output.top_logprobs[index]]
            if group.return_member_logprobs:
                delta.member_logprobs = [output.member_logprobs[index]]
            self._advance(stream, token_id, delta)

    def _advance(self, stream: _Stream, token_id: int, delta: Output) -> None:
        """Text of one token; ends the group if it was the last one. A stop token gives no text."""
        group, text = stream.group, stream.text
        if token_id in group.stop_ids:
            delta.stop_matched = token_id
            self._finish(stream, FinishReason.STOP, delta=delta)
            return
        delta.text = text.push(token_id, may_stop=len(group.output) >= group.params.min_tokens)
        if text.stopped is not None:
            delta.stop_matched = text.stopped
            self._finish(stream, FinishReason.STOP, delta=delta)
        elif len(group.output) >= group.max_tokens:
            self._finish(stream, FinishReason.LENGTH, delta=delta)
        else:
            self._send(stream, delta)

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


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"token id {token_id} in {field} is not in 0…{vocab_size - 1}", field=field)
