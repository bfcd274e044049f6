"""`Inbox`: what other threads hand to the engine's thread, and how much of it may wait."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque

from ..api.request import FinishReason, Owner
from ..errors import MotetError, OverloadedError, UnavailableError
from .answer import Answer

Abort = tuple[str | None, FinishReason]  # (id of the requests, None: all; why they end)
_RATE_OVER = 32  # departures from the queue that its speed is measured over
_LONGEST_RETRY_S = 60.0


class Inbox:
    """Thread-safe. Answers wait from `put` until `leave`. The order of items matters: an abort does not end requests that
    were put after it."""

    def __init__(self, max_waiting: int, max_waiting_tokens: int) -> None:
        self._max_waiting, self._max_tokens = max_waiting, max_waiting_tokens
        self._changed = threading.Condition()
        self._items: deque[list[Answer] | Abort] = deque()
        self._waiting: Counter[str] = Counter()  # choices by tenant
        self._tokens: Counter[str] = Counter()  # of their prompts
        self._batch = Counter[str]()  # "choices" and "tokens" of batch work among them: at most half
        self._departures: deque[float] = deque([time.monotonic()], maxlen=_RATE_OVER)
        self._is_woken = False
        self.is_draining = False
        self.is_closed = False
        self.failure: MotetError | None = None

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    @property
    def num_waiting_tokens(self) -> int:
        return self._tokens.total()

    def put(self, answers: list[Answer]) -> None:
        """Queue the choices of a request, all or none. Raises `UnavailableError` (draining, closed, failed),
        `OverloadedError` (the queue, or the tenant's part of it, is full). Prompts that are larger than the queue may wait
        alone."""
        owner, tokens = answers[0].request.owner, sum(map(_num_tokens, answers))
        with self._changed:
            self._check(owner, len(answers), tokens)
            self._tokens[owner.tenant] += tokens
            self._waiting[owner.tenant] += len(answers)
            if owner.is_background:
                self._batch.update(choices=len(answers), tokens=tokens)
            self._items.append(answers)
            self._changed.notify()

    def check(self, owner: Owner, choices: int, tokens: int) -> None:
        """Raises what `put` would raise now for so many choices of an owner, with so many tokens in their prompts."""
        with self._changed:
            self._check(owner, choices, tokens)

    def _check(self, owner: Owner, choices: int, tokens: int) -> None:
        if self.failure is not None:
            raise UnavailableError(str(self.failure))
        if self.is_draining or self.is_closed:
            raise UnavailableError("the engine is shutting down; send the request to another server")
        for waiting, limit, whose in (
            (self._waiting[owner.tenant], owner.max_waiting, f"of tenant '{owner.tenant}' "),
            (self._batch["choices"], self._max_waiting // 2 if owner.is_background else None, "of batch work "),
            (self.num_waiting, self._max_waiting, ""),
        ):
            excess = 0 if limit is None else waiting + choices - limit
            if excess > 0:
                wait = self._seconds_until_free(excess)
                raise OverloadedError(
                    f"{waiting} choices {whose}are waiting and {choices} more exceed max_waiting ({limit}); try again "
                    f"in {wait:.1f} s",
                    retry_after_s=wait,
                )
        for queued, limit in (
            (self._tokens[owner.tenant], self._max_tokens // 2 if owner.tenant else self._max_tokens),
            (self._batch["tokens"], self._max_tokens // 2 if owner.is_background else self._max_tokens),
            (self._tokens.total(), self._max_tokens),
        ):
            if queued and queued + tokens > limit:
                raise OverloadedError(
                    f"prompts of {queued} tokens are waiting and {tokens} more exceed max_waiting_tokens ({limit}); try "
                    "again later",
                    retry_after_s=self._seconds_until_free(choices),
                )

    def abort(self, request_id: str | None, reason: FinishReason) -> None:
        with self._changed:
            self._items.append((request_id, reason))
            self._changed.notify()

    def take(self, *, wait: bool) -> list[list[Answer] | Abort]:
        """All items; with `wait`, sleeps until there is one, `wake` is called or the inbox is closed."""
        with self._changed:
            while wait and not (self._items or self.is_closed or self._is_woken):
                self._changed.wait()
            self._is_woken = False
            items = list(self._items)
            self._items.clear()
            return items

    def wake(self) -> None:
        """There is work that is not in the inbox."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    def leave(self, answer: Answer) -> None:
        """A choice waits no more: it runs, or has ended."""
        with self._changed:
            tenant = answer.request.owner.tenant
            if answer.request.owner.is_background:
                self._batch.subtract({"choices": 1, "tokens": _num_tokens(answer)})
            self._tokens[tenant] -= _num_tokens(answer)
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant], self._tokens[tenant]
            self._departures.append(time.monotonic())

    def drain(self) -> None:
        with self._changed:
            self.is_draining = True

    def close(self, failure: MotetError | None = None) -> None:
        with self._changed:
            self.is_closed, self.failure = True, failure
            self._changed.notify()

    @property
    def is_empty(self) -> bool:
        return not self._items

    def _seconds_until_free(self, places: int) -> float:
        """By the speed at which choices left the queue lately; a second if that is not known."""
        if len(self._departures) < 3:
            return 1.0
        rate = (len(self._departures) - 1) / max(time.monotonic() - self._departures[0], 1e-3)
        return min(max(places / rate, 0.05), _LONGEST_RETRY_S)


def _num_tokens(answer: Answer) -> int:
    """Tokens of the choice's prompts."""
    return sum(map(len, answer.request.prompts))
