"""Outputs, and what a model says of itself ↔ protocol buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ....proto import admin_pb2, inference_pb2
from ...api.limits import MAX_DELTA_BYTES, MAX_MESSAGE_BYTES
from ...api.model_info import MemberOrigin, ModelInfo
from ...api.output import PER_PROMPT_TOKEN, PER_TOKEN, Output, Timings, Usage
from ...api.request import Ensemble, FinishReason, Member
from ...errors import InvalidRequestError
from ..embeddings import Embeddings
from .wire import SPACES, member_to_proto, space_from_proto, temperature_from_proto

_REASONS = {
    FinishReason.STOP: inference_pb2.STOP,
    FinishReason.LENGTH: inference_pb2.LENGTH,
    FinishReason.CANCELLED: inference_pb2.CANCELLED,
    FinishReason.TIME_LIMIT: inference_pb2.TIME_LIMIT,
    FinishReason.SHUTDOWN: inference_pb2.SHUTDOWN,
}


def responses_from_output(output: Output) -> Iterator[inference_pb2.GenerateResponse]:
    """A delta as messages of about `MAX_DELTA_BYTES` at most. Only the last has the finish reason, usage and timings."""
    ids, text = output.token_ids, output.text
    top = 16 * max(map(len, (*output.top_logprobs, *output.prompt_top_logprobs)), default=0)
    size = 40 + top + 8 * max(map(len, output.member_logprobs), default=0)  # bytes per token
    size += 4 * max(map(len, output.candidate_logprobs), default=0)
    scored = len(output.prompt_logprobs)
    count = max(1, -(-max(len(ids), scored) * size // MAX_DELTA_BYTES), -(-len(text) * 4 // MAX_DELTA_BYTES))
    if count == 1:
        yield response_from_output(output)
        return
    tokens, characters, prompt = -(-len(ids) // count), -(-len(text) // count), -(-scored // count)
    for index in range(count):
        at, of_prompt = slice(index * tokens, (index + 1) * tokens), slice(index * prompt, (index + 1) * prompt)
        piece = Output(
            output.request_id,
            output.choice,
            output.seed,
            text[index * characters : (index + 1) * characters],
            **{name: getattr(output, name)[at] for name in PER_TOKEN},
            **{name: getattr(output, name)[of_prompt] for name in PER_PROMPT_TOKEN},
        )
        if index == count - 1:
            piece.finish_reason, piece.stop_matched = output.finish_reason, output.stop_matched
            piece.usage, piece.timings = output.usage, output.timings
            piece.answer_confidence, piece.abstained = output.answer_confidence, output.abstained
        yield response_from_output(piece)


def response_from_output(output: Output) -> inference_pb2.GenerateResponse:
    message = inference_pb2.GenerateResponse(
        request_id=output.request_id,
        choice=output.choice,
        text=output.text,
        token_ids=output.token_ids,
        seed=output.seed,
        member_logprobs=[inference_pb2.MemberLogprobs(logprobs=values) for values in output.member_logprobs],
        candidate_logprobs=[inference_pb2.CandidateLogprobs(logprobs=values) for values in output.candidate_logprobs],
        confidence=output.confidence,
        disagreement=output.disagreement,
        answer_confidence=output.answer_confidence,
        abstained=output.abstained,
    )
    for target, logprobs, tops in (
        (message.logprobs, output.logprobs, output.top_logprobs),
        (message.prompt_logprobs, output.prompt_logprobs, output.prompt_top_logprobs),
    ):
        for logprob, top in zip(logprobs, tops, strict=True):
            best = [inference_pb2.TokenLogprob(token_id=token_id, logprob=value) for token_id, value in top]
            target.add(logprob=logprob, top=best)
    if output.finish_reason in _REASONS:
        message.finish_reason = _REASONS[output.finish_reason]
    if isinstance(output.stop_matched, str):
        message.stop = output.stop_matched
    elif output.stop_matched is not None:
        message.stop_token_id = output.stop_matched
    if output.usage is not None and output.timings is not None:
        usage, timings = output.usage, output.timings
        message.usage.prompt_tokens = usage.prompt_tokens
        message.usage.completion_tokens = usage.completion_tokens
        message.usage.cached_tokens = usage.cached_tokens
        message.timings.queue_s = timings.queue_s
        message.timings.prefill_s = timings.prefill_s
        message.timings.decode_s = timings.decode_s
    return message


def output_from_response(message: inference_pb2.GenerateResponse) -> Output:
    reasons = {value: reason for reason, value in _REASONS.items()}
    matched = message.WhichOneof("stop_matched")
    usage, timings = message.usage, message.timings
    return Output(
        request_id=message.request_id,
        choice=message.choice,
        seed=message.seed,
        text=message.text,
        token_ids=list(message.token_ids),
        logprobs=[entry.logprob for entry in message.logprobs],
        top_logprobs=list(map(_top_from_proto, message.logprobs)),
        prompt_logprobs=[entry.logprob for entry in message.prompt_logprobs],
        prompt_top_logprobs=list(map(_top_from_proto, message.prompt_logprobs)),
        member_logprobs=[list(entry.logprobs) for entry in message.member_logprobs],
        candidate_logprobs=[list(entry.logprobs) for entry in message.candidate_logprobs],
        confidence=list(message.confidence),
        disagreement=list(message.disagreement),
        answer_confidence=message.answer_confidence if message.HasField("answer_confidence") else None,
        abstained=message.abstained,
        finish_reason=reasons.get(message.finish_reason),
        stop_matched=getattr(message, matched) if matched else None,
        usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        if message.HasField("usage")
        else None,
        timings=Timings(timings.queue_s, timings.prefill_s, timings.decode_s) if message.HasField("timings") else None,
    )


def _top_from_proto(message: inference_pb2.Logprobs) -> list[tuple[int, float]]:
    return [(top.token_id, top.logprob) for top in message.top]


def check_embeddings_size(found: Embeddings) -> None:
    """Raises `InvalidRequestError` if they do not fit a message."""
    size = sum(vector.nbytes + 8 for vector in found.vectors)
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequestError(
            f"{len(found.vectors)} embeddings have {size} bytes, a message at most {MAX_MESSAGE_BYTES}; send fewer texts",
            field="input",
        )


def embeddings_to_proto(found: Embeddings) -> inference_pb2.EmbedResponse:
    embeddings = [inference_pb2.Embedding(values=vector) for vector in found.vectors]
    return inference_pb2.EmbedResponse(embeddings=embeddings, prompt_tokens=found.prompt_tokens)


def model_to_proto(model: ModelInfo) -> admin_pb2.ModelInfo:
    message = admin_pb2.ModelInfo(
        name=model.name,
        members=model.members,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        digest=model.digest,
        hidden_size=model.hidden_size,
        media=model.media,
        origins=[admin_pb2.MemberOrigin(**dataclasses.asdict(origin)) for origin in model.origins],
    )
    message.default_ensemble.space = SPACES[model.default_ensemble.space]
    message.default_ensemble.members.extend(map(member_to_proto, model.default_ensemble.members))
    return message


def model_from_proto(message: admin_pb2.ModelInfo) -> ModelInfo:
    members = tuple(
        Member(member.name, member.mix, temperature=temperature_from_proto(member))
        for member in message.default_ensemble.members
    )
    return ModelInfo(
        name=message.name,
        members=tuple(message.members),
        default_ensemble=Ensemble(members, space_from_proto(message.default_ensemble.space)),
        eos_token_ids=tuple(message.eos_token_ids),
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        digest=message.digest,
        hidden_size=message.hidden_size,
        media=tuple(message.media),
        origins=tuple(map(_origin_from_proto, message.origins)),
    )


def _origin_from_proto(message: admin_pb2.MemberOrigin) -> MemberOrigin:
    return MemberOrigin(
        message.kind,
        message.method,
        message.data,
        message.trained_on,
        message.epsilon if message.HasField("epsilon") else None,
        message.delta if message.HasField("delta") else None,
    )
