"""`Engine`: the loop schedule → step → commit → stream, on one thread, and thread-safe calls into it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..api.config import EngineConfig
from ..api.model_info import ModelInfo
from ..api.output import Completion, Output
from ..api.request import FinishReason, Request
from ..backends.base import Backend
from ..errors import MotetError, UnavailableError
from ..schedule.admission import Admission
from ..schedule.background import foreground
from ..schedule.batch import StepOutput
from ..schedule.blocks import BlockManager
from ..schedule.packing import GroupTokens, ScheduledBatch
from ..schedule.scheduler import Scheduler
from ..schedule.sequence import Group
from ..text.grammar import Grammars
from ..text.media import MediaReader, NoMedia
from ..text.stream import answer_stream
from ..text.tokenizer import Tokenizer
from .answer import Answer, OnOutput, OnSent, Sender
from .embedder import Embedder
from .inbox import Abort, Inbox
from .observer import Observer, StepReport, notify
from .stats import EngineStats

log = logging.getLogger("motet.engine")
_MAX_RESTARTS = 3  # after internal errors
_RESTARTS_WITHIN_S = 60.0


class Engine:
    """Serves requests on one backend, which `close` closes too. `submit` and `abort` may be called from any thread."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        model: ModelInfo,
        config: EngineConfig,
        observers: Sequence[Observer] = (),
        media: MediaReader | None = None,
    ) -> None:
        """`media`: reads what a message holds beside text; None: it may hold nothing else."""
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer, model.vocab_size, model.eos_token_ids)
        self.model = model
        self.media = media if media is not None else NoMedia(f"'{model.name}' has no encoder; send text")
        self.config = config
        self._backend = backend
        self._observers = tuple(observers)
        blocks = BlockManager(backend.num_blocks, backend.block_size)
        self._admission = Admission(
            model, config, blocks, can_verify=backend.can_verify, takes_embedded=backend.takes_embedded
        )
        self._scheduler = self._new_scheduler(blocks)
        self._answers: dict[Group, Answer] = {}
        self._taken: deque[list[Answer] | Abort] = deque()  # from the inbox, not yet processed
        self._inbox = Inbox(config.max_waiting, config.max_waiting_tokens)
        self.embedder = Embedder(backend, model, config, self._inbox)
        self._restarts: deque[float] = deque(maxlen=_MAX_RESTARTS)  # when the latest were
        self._num_restarts = 0
        self._sender = Sender()
        self._steps = 0
        self._tokens = 0
        self._prompt_tokens = self._cached_tokens = 0
        self._thread = threading.Thread(target=self._run, name="motet-engine", daemon=True)
        self._thread.start()

    def _new_scheduler(self, blocks: BlockManager) -> Scheduler:
        return Scheduler(
            blocks,
            self.config.max_num_seqs,
            self.config.max_num_batched_tokens,
            self.config.prefill_chunk,
            prefix_cache=self.config.prefix_cache,
            keeps_trunk=self._backend.keeps_trunk,
            sample_prefill=self._backend.can_sample_prefill,
        )

    @classmethod
    def from_bundle(cls, path: Path | str, config: EngineConfig | None = None, *, verify: bool = True) -> Engine:
        """Load a bundle and start an engine on it (see `open_engine`)."""
        from .open import open_engine  # here, because it imports this module

        return open_engine(path, config, verify=verify)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ---- calls from other threads --------------------------------------------------------------------------------

    def submit(self, request: Request, on_output: OnOutput, on_sent: OnSent | None = None) -> None:
        """Queue a request. `on_output` gets every delta, from the engine's thread; it must not block. `on_sent` is called after
        each step in which it got one, before the next is computed, and once for all requests that gave the same.

        Raises `InvalidRequestError`, `InvalidEnsembleError`, `ContextLengthError`, `OverloadedError` (the queue is
        full), `UnavailableError` (draining or closed). After it returns, every choice ends with a `finish_reason`.
        """
        with self._telling_refusal(request):
            self._accept(request, on_output, on_sent)

    def check(self, request: Request) -> None:
        """Whether `submit` would take a request now, before its media are decoded and encoded: the prompts have placeholders, and
        `embedded` is empty. Raises what `submit` raises."""
        with self._telling_refusal(request):
            self._admission.check(request, embeds=True)
            choices = request.sampling.n
            self._inbox.check(request.owner, choices, choices * sum(map(len, request.prompts)))

    @contextmanager
    def _telling_refusal(self, request: Request) -> Iterator[None]:
        try:
            yield
        except MotetError as error:
            refused = error
            notify(self._observers, lambda observer: observer.on_reject(request, refused))
            raise

    def _accept(self, request: Request, on_output: OnOutput, on_sent: OnSent | None) -> None:
        now = time.monotonic()
        matcher = None if request.structure is None else self.grammars.matcher(request.structure, request.owner.tenant)
        groups = self._admission.groups_of(request, matcher)
        streams = (answer_stream(self.tokenizer, request.prompts[0], request.sampling) for _ in groups)
        answers = [
            Answer(request, *each, on_output, on_sent, now, self.model.calibration) for each in zip(groups, streams)
        ]
        self._inbox.put(answers)

    def abort(self, request_id: str | None, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End all requests with this id, or with any if it is None, that were submitted so far; their answers keep what
        they have. There may be none."""
        self._inbox.abort(request_id, reason)

    def subscribe(self, observer: Observer) -> None:
        """Add an observer; it hears of everything from now on."""
        self._observers = (*self._observers, observer)

    def complete(self, requests: Sequence[Request], on_output: OnOutput | None = None) -> list[list[Completion]]:
        """Run requests to their end and return the choices of each, for offline use. Raises what `submit` raises (the
        other requests are then cancelled) and the error of a choice that failed. Not to be called from the engine's
        thread."""
        for request in requests:
            self._admission.check(request)
        choices: list[dict[int, Completion]] = [{} for _ in requests]
        room = threading.Semaphore(self.config.max_waiting)  # never more in flight than the queue holds

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
            for _ in range(self.config.max_waiting):  # all permits are back: every choice has ended
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
        blocks, counts = self._scheduler.blocks, self._scheduler.counts
        return EngineStats(
            waiting=self._inbox.num_waiting,
            running=len(self._scheduler.running),
            free_blocks=blocks.num_free,
            num_blocks=blocks.num_blocks,
            steps=self._steps,
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            drafted_tokens=counts["drafted"],
            preemptions=counts["preempted"],
            restarts=self._num_restarts,
            accepted_tokens=counts["accepted"],
            waiting_tokens=self._inbox.num_waiting_tokens,
            block_size=blocks.block_size,
        )

    def cached_digests(self) -> list[bytes]:
        """Of the blocks that a prompt could share now."""
        return self._scheduler.blocks.cached_digests()

    def drain(self) -> None:
        """Accept no more requests. Those that run go on to their end; those that wait end with `UnavailableError`."""
        self._inbox.drain()

    def close(self) -> None:
        """End all requests (CANCELLED, with what they have), the thread and the backend."""
        self._inbox.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self.grammars.close()
        self.media.close()

    @property
    def failure(self) -> MotetError | None:
        """Why the loop ended by itself; None while it runs, and after `close`. Such an engine refuses every request."""
        return self._inbox.failure

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or running."""
        return self._inbox.is_empty and not self._answers and self.embedder.is_idle

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """The engine's thread. Whatever ends the loop, every answer gets a last output."""
        while True:
            try:
                while self._take_inbox():
                    self._step()
                for answer in list(self._answers.values()):
                    self._finish(answer, FinishReason.CANCELLED)
                break
            except Exception:  # a fault of ours: the requests of now end, those that follow shall not notice
                log.exception("the engine's loop failed")
                if not self._restart():
                    break
        for item in (*self._taken, *self._inbox.take(wait=False)):
            for answer in item if isinstance(item, list) else ():
                self._end(answer, FinishReason.ERROR if self.failure else FinishReason.CANCELLED, self.failure)
        self.embedder.fail(self.failure or UnavailableError("the engine was closed"), close=True)
        self._sender.tell()
        self._backend.close()

    def _restart(self) -> bool:
        """After an internal error: end all answers, and go on with a new schedule. False, and the engine is closed, if that
        was tried too often lately."""
        now = time.monotonic()
        again = len(self._restarts) < _MAX_RESTARTS or now - self._restarts[0] > _RESTARTS_WITHIN_S
        text = "the engine stopped after an internal error; the log has it; "
        error = MotetError(text + ("send the request again" if again else "restart the server"))
        if not again:
            self._inbox.close(error)
        self.embedder.fail(error)
        for answer in list(self._answers.values()):
            try:
                self._end(answer, FinishReason.ERROR, error)  # without the scheduler: it may be broken
            except Exception:  # so may the answer; its reader must be told all the same
                log.exception("an answer could not be ended")
                last = Output(answer.request.request_id, answer.group.choice, answer.group.seed)
                last.finish_reason, last.error = FinishReason.ERROR, error
                self._sender.send(answer, last)
        self._restarts.append(now)
        if again:
            self._num_restarts += 1
            old = self._scheduler
            self._scheduler = self._new_scheduler(
                BlockManager(old.blocks.num_blocks, old.blocks.block_size, stale=True)
            )
            self._scheduler.counts = old.counts
        return again

    def _take_inbox(self) -> bool:
        """Process the inbox; sleep while there is nothing to do. False if the engine is closed."""
        is_idle = not self._answers and not self._taken and self.embedder.is_idle
        if is_idle:
            self._sender.tell()
        self._taken.extend(self._inbox.take(wait=is_idle))
        while self._taken:  # one at a time: a fault at one must not lose the others
            item = self._taken.popleft()
            if isinstance(item, list):
                for answer in item:
                    self._answers[answer.group] = answer
                    self._scheduler.add(answer.group)
                continue
            request_id, reason = item
            self.embedder.end_all(self._scheduler.blocks) if request_id is None else None
            for answer in [a for a in self._answers.values() if request_id in (None, a.request.request_id)]:
                self._finish(answer, reason)
        if self._inbox.is_draining and self._inbox.num_waiting:
            gone = UnavailableError("the server goes out of service; send the request to another one")
            for answer in [a for a in self._answers.values() if a.admitted is None]:
                self._finish(answer, FinishReason.ERROR, gone)
        return not self._inbox.is_closed

    def _step(self) -> None:
        self._end_overdue()
        scheduler = self._scheduler
        is_busy, may_start = bool(foreground(self._answers)), bool(scheduler.running) or not scheduler.waiting
        is_short = any(not group.owner.is_background for group in scheduler.waiting)
        if not self.embedder.is_idle:
            self._sender.tell()
        if not self.embedder.step(scheduler.blocks, is_busy=is_busy, is_short=is_short, may_start=may_start):
            scheduler.preempt_all()
        scheduled = scheduler.schedule() if self._answers else None
        self._sender.tell()  # while the backend computes, the readers have the interpreter
        if scheduled is None:
            if self.embedder.is_idle:
                scheduler.check_integrity()
            return
        self._note_admitted()
        start = time.monotonic()
        try:
            output = self._backend.step(scheduled.batch)
        except Exception:  # whatever the backend raises must not end the engine
            self._fail_step(scheduled)
            return
        now = time.monotonic()
        self._steps += 1
        if self._observers:
            step = StepReport(scheduled.batch, output, now - start, self._backend.seconds())
            notify(self._observers, lambda observer: observer.on_step(step))
        for run in self._scheduler.commit(scheduled, output, lambda group, token: self._answers[group].push(token)):
            self._emit(run, output, now)

    def _note_admitted(self) -> None:
        now = time.monotonic()
        for group in self._scheduler.running:
            answer = self._answers[group]
            if answer.admitted is None:
                answer.admitted = now
                self._inbox.leave(answer)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for answer in list(self._answers.values()):
            limit = answer.request.time_limit_s
            if limit is not None and now - answer.arrived >= limit:
                self._finish(answer, FinishReason.TIME_LIMIT)

    def _fail_step(self, scheduled: ScheduledBatch) -> None:
        """A whole step failed: its groups end with an error, all others go on."""
        log.exception("a step failed; its requests end with an error")
        for group in self._scheduler.fail(scheduled):
            failure = MotetError("the backend failed in a step of this request; the server's log has the error")
            self._finish(self._answers[group], FinishReason.ERROR, failure)

    def _emit(self, run: GroupTokens, output: StepOutput, now: float) -> None:
        """Send the tokens that a step drew for a group, as one delta."""
        answer, group = self._answers[run.group], run.group
        if run.count > len(run.scored_ids) and answer.first_token is None:
            answer.first_token = now
            self._prompt_tokens += sum(sequence.num_prompt for sequence in group.sequences)
            self._cached_tokens += sum(sequence.num_cached for sequence in group.sequences)
        self._tokens += run.count - len(run.scored_ids)
        answer.add_logprobs(run, output)
        if run.reason is not None:
            self._finish(answer, run.reason)
        elif run.error is not None:
            self._finish(answer, FinishReason.ERROR, answer.no_token(run.error))
        else:
            self._sender.send(answer, answer.take_delta())

    def _finish(self, answer: Answer, reason: FinishReason, error: MotetError | None = None) -> None:
        self._scheduler.abort(answer.group)
        self._end(answer, reason, error)

    def _end(self, answer: Answer, reason: FinishReason, error: MotetError | None = None) -> None:
        """Send the last output of an answer."""
        if answer.admitted is None:
            self._inbox.leave(answer)
        self._answers.pop(answer.group, None)
        last = answer.last_delta(reason, error, time.monotonic())
        notify(self._observers, lambda observer: observer.on_finish(answer.request, last))
        self._sender.send(answer, last)
