"""`AuditSink`: calls as records of the audit log. While the log cannot be written, nothing is answered."""

from __future__ import annotations

import json

from ..trust.audit.chain import subject_of
from ..trust.audit.writer import AuditLog, Entry
from .calls import Call


class AuditSink:
    """`bundle`: the digest of what is served."""

    def __init__(self, audit: AuditLog, bundle: str) -> None:
        self._audit, self._bundle = audit, bundle

    def check(self) -> None:
        """Raises `UnavailableError` if calls cannot be recorded."""
        if self._audit.failure is not None:
            raise self._audit.failure

    def on_call(self, call: Call) -> None:
        who = call.caller.identity
        fields = {
            "method": call.method,
            "tenant": who.tenant,
            "subject": who.subject,
            "peer": call.caller.peer,
            "call_id": call.id,
            "request_id": call.request_id,
            "model": call.model,
            "bundle": self._bundle,
            "mix": call.mix,
            "status": call.status,
            "finish_reasons": call.finish_reasons,
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
        }
        texts = None
        if call.request is not None:
            prompts = json.dumps(call.request.prompts, separators=(",", ":"))  # token ids, a list per view
            texts = {"prompt": prompts.encode(), "answer": "".join(call.text).encode()}
        self._audit.append(Entry("call", fields, subject_of(fields), texts))

    def on_refusal(self, method: str, peer: str, error: Exception) -> None:
        self._audit.append(Entry("refusal", {"method": method, "peer": peer, "status": type(error).__name__}))
