"""Outputs as JSON: what the routes of generation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...api.output import Output, Usage
from ...api.request import FinishReason
from ...text.tokenizer import Tokenizer


def usage_of(usages: Sequence[Usage | None]) -> dict[str, Any]:
    """Of all choices: the prompt counts once."""
    found = [usage for usage in usages if usage is not None]
    prompt = max((usage.prompt_tokens for usage in found), default=0)
    completion = sum(usage.completion_tokens for usage in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": max((usage.cached_tokens for usage in found), default=0)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def finish_reason(output: Output) -> str | None:
    """`stop` and `length` are OpenAI's; an answer that ended otherwise says so: cancelled, time_limit, shutdown."""
    reason = output.finish_reason
    return None if reason is None or reason is FinishReason.ERROR else str(reason)


def motet_fields(output: Output) -> dict[str, Any]:
    """What a choice has beyond OpenAI's fields, where the request asked for it."""
    found: dict[str, Any] = {"seed": output.seed} if output.finish_reason is not None else {}
    if output.stop_matched is not None:
        found["stop_reason"] = output.stop_matched
    if output.prompt_logprobs:
        found["prompt_logprobs"] = [max(value, -9999.0) for value in output.prompt_logprobs]
        found["prompt_top_logprobs"] = output.prompt_top_logprobs
    if output.candidate_logprobs:
        found["candidate_logprobs"] = [[max(value, -9999.0) for value in one] for one in output.candidate_logprobs]
    for name in ("member_logprobs", "confidence", "disagreement"):
        if values := getattr(output, name):
            found[name] = values
    if output.answer_confidence is not None:
        found |= {"answer_confidence": output.answer_confidence, "abstained": output.abstained}
    return found


def chat_logprobs(tokenizer: Tokenizer, output: Output) -> dict[str, Any] | None:
    """OpenAI's chat form; None if no log-probabilities were asked for."""
    if not output.logprobs:
        return None
    content = []
    for token_id, logprob, top in zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True):
        best = [_token(tokenizer, other, value) for other, value in top]
        content.append(_token(tokenizer, token_id, logprob) | {"top_logprobs": best})
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    content = tokenizer.token_bytes(token_id)
    return {
        "token": content.decode(errors="replace"),
        "logprob": max(logprob, -9999.0),  # JSON has no infinity
        "bytes": list(content),
    }
