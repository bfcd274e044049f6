"""`check_answer_size`: whether a whole answer fits a message."""

from __future__ import annotations

from ..api.limits import MAX_MESSAGE_BYTES
from ..api.request import Request
from ..engine.interface import ServedEngine
from ..errors import InvalidRequestError


def check_answer_size(request: Request, engine: ServedEngine, most: int = MAX_MESSAGE_BYTES) -> None:
    """Raises `InvalidRequestError` if the whole answer may have more than `most` bytes. What cannot be delivered must not
    be computed."""
    params, room = request.sampling, engine.model.max_model_len - min(map(len, request.prompts))
    tokens = params.n * min(room, params.max_tokens or room)
    size = 16 + (engine.tokenizer.max_token_bytes or 64)  # bytes per token: its text and id, and the fields
    if params.logprobs is not None:
        size += 16 + 16 * params.logprobs
    if request.return_member_logprobs:
        size += 8 + 4 * len(request.ensemble.members)
    if params.logprob_token_ids:
        size += 8 + 4 * len(params.logprob_token_ids)
    if request.return_confidence:
        size += 8
    prompt = 0 if params.prompt_logprobs is None else len(request.prompts[0]) * (16 + 16 * params.prompt_logprobs)
    if tokens * size + prompt > most:
        raise InvalidRequestError(
            f"the answer may have {tokens} tokens of {size} bytes; a whole answer has at most {most} bytes; "
            "lower max_tokens, n, logprob_token_ids or (prompt_)logprobs, or stream it (Generate)",
            field="max_tokens",
        )
