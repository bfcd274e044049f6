"""`AuditSink`: calls as records of the audit log, one when a call has come and one when it has ended. While the log cannot be
written, nothing is answered."""

from __future__ import annotations

import json
import time
from typing import Any

from ..trust.audit.chain import BEGIN, END, KEY, subject_of
from ..trust.audit.writer import AuditLog, Entry
from ..trust.identity import Identity
from .calls import Call

REFUSALS_PER_SECOND = 20
_SHOWN = 100  # characters of a method's name that a stranger has sent


class AuditSink:
    """`bundle`: the digest of what is served."""

    def __init__(self, audit: AuditLog, bundle: str) -> None:
        self._audit, self._bundle = audit, bundle
        self._second, self._in_second, self._left_out = 0, 0, 0

    def check(self) -> None:
        """Raises `UnavailableError` if calls cannot be recorded."""
        if self._audit.failure is not None:
            raise self._audit.failure

    def on_begin(self, call: Call) -> None:
        self._audit.append(Entry(BEGIN, self._of_all(call)))

    def _of_all(self, call: Call) -> dict[str, Any]:
        who = call.caller.identity
        return {
            KEY: call.key,
            "method": call.method,
            "tenant": who.tenant,
            "subject": who.subject,
            "peer": call.caller.peer,
            "request_id": call.request_id,
            "model": call.model,
            "bundle": self._bundle,
        }

    def on_call(self, call: Call) -> None:
        fields = self._of_all(call) | {
            "call_id": call.id,
            "mix": call.mix,
            **({"temperatures": call.temperatures} if call.temperatures else {}),
            "status": call.status,
            "finish_reasons": call.finish_reasons,
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
        }
        texts = None
        if call.request is not None:
            prompts = json.dumps(call.request.prompts, separators=(",", ":"))  # token ids, a list per view
            texts = {"prompt": prompts.encode(), "answer": "".join(call.text).encode()}
            if any(call.request.embedded):  # a list per view: position, and digest of what was embedded there
                spans = [[[span.start, span.digest.hex()] for span in view] for view in call.request.embedded]
                texts["embedded"] = json.dumps(spans, separators=(",", ":")).encode()
        self._audit.append(Entry(END, fields, subject_of(fields), texts))

    def on_refusal(self, method: str, peer: str, error: Exception, who: Identity | None) -> None:
        """Strangers must not fill the disk: in a second so many are recorded, and the next record counts the others."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._in_second = second, 0
        self._in_second += 1
        if self._in_second > REFUSALS_PER_SECOND:
            self._left_out += 1
            return
        fields: dict[str, Any] = {"method": method[:_SHOWN], "peer": peer, "status": type(error).__name__}
        if who is not None:
            fields |= {"tenant": who.tenant, "subject": who.subject}
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        self._audit.append(Entry("refusal", fields))
