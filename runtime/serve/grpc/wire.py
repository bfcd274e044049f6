"""Protocol buffers ↔ requests, outputs and errors. The only file that knows both."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from ....proto import admin_pb2, inference_pb2
from ... import errors
from ...api.model_info import ModelInfo
from ...api.output import Output, Timings, Usage
from ...api.request import MAX_STOP_STRINGS, Ensemble, FinishReason, Member, Request, SamplingParams, Space
from ...errors import InvalidEnsembleError, InvalidRequestError, MotetError, OverloadedError
from ...text.prompt import Prompt, build_prompt
from ...text.tokenizer import Tokenizer

MAX_MESSAGE_BYTES = 4 * 2**20

# ---- errors ----------------------------------------------------------------------------------------------------------

_CODES: Mapping[type[Exception], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnsupportedModelError: grpc.StatusCode.UNIMPLEMENTED,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.NumericalError: grpc.StatusCode.INTERNAL,
}
_DOMAIN = "motet"


def status_of(error: MotetError) -> grpc.Status:
    """The gRPC status of an error, with google.rpc details: ErrorInfo, BadRequest, RetryInfo."""
    code = next((c for cls, c in _CODES.items() if isinstance(error, cls)), grpc.StatusCode.INTERNAL)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)]
    if isinstance(error, InvalidRequestError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError):
        delay = Duration()
        delay.FromMilliseconds(int(1000 * error.retry_after_s))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=str(error))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def error_of(call_error: Any) -> MotetError:
    """The typed error behind a failed call, for clients: the same class that the server raised."""
    message = call_error.details() or str(call_error.code())
    status = rpc_status.from_call(call_error) if call_error.trailing_metadata() is not None else None
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == _DOMAIN:
            cls = getattr(errors, info.reason, MotetError)
            if isinstance(cls, type) and issubclass(cls, MotetError):
                return cls(message)
    code = call_error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.UnavailableError(f"no answer from the server: {message}; is `motet serve` running there?")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return InvalidRequestError(f"the message is too large: {message}")
    return MotetError(f"{code.name}: {message}")


# ---- requests --------------------------------------------------------------------------------------------------------


def request_from_proto(message: inference_pb2.GenerateRequest, tokenizer: Tokenizer, model: ModelInfo) -> Request:
    """Check and tokenise. Raises `InvalidRequestError` and its kin, naming the field."""
    sampling = _sampling_from_proto(message)
    prompts = [prompt_from_proto(message.prompt, tokenizer)]
    ensemble, wants_member_logprobs = model.default_ensemble, message.ensemble.return_member_logprobs
    if message.HasField("ensemble") and message.ensemble.members:
        ensemble = _ensemble_from_proto(message.ensemble, prompts, tokenizer)
    return Request(
        request_id=message.request_id or uuid.uuid4().hex,
        prompts=tuple(prompts),
        ensemble=ensemble,
        sampling=sampling,
        time_limit_s=message.time_limit_ms / 1000 if message.HasField("time_limit_ms") else None,
        return_member_logprobs=wants_member_logprobs,
    )


def prompt_from_proto(message: inference_pb2.Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of a prompt. Raises `InvalidRequestError` if it is empty or absent."""
    kind = message.WhichOneof("prompt")
    prompt: Prompt = message.text
    if kind == "token_ids":
        prompt = list(message.token_ids.ids)
    elif kind == "messages":
        prompt = [{"role": m.role, "content": m.content} for m in message.messages.messages]
    return build_prompt(tokenizer, prompt)


def _ensemble_from_proto(
    message: inference_pb2.Ensemble, prompts: list[tuple[int, ...]], tokenizer: Tokenizer
) -> Ensemble:
    """The ensemble; views are appended to `prompts`, equal ones once."""
    members = []
    for member in message.members:
        view = 0
        if member.HasField("view"):
            prompt = prompt_from_proto(member.view.prompt, tokenizer)
            if prompt not in prompts:
                prompts.append(prompt)
            view = prompts.index(prompt)
        if member.mix < 0 and not message.allow_negative:
            raise InvalidEnsembleError(
                f"the mix of member '{member.name}' is {member.mix}; set allow_negative if that is meant",
                field="ensemble.members.mix",
            )
        members.append(Member(member.name, member.mix, view))
    return Ensemble(tuple(members), Space.PROBS if message.space == inference_pb2.PROBS else Space.LOGITS)


def _sampling_from_proto(message: inference_pb2.GenerateRequest) -> SamplingParams:
    """Fields that are absent keep the defaults of `SamplingParams`."""
    if len(message.stopping.stop) > MAX_STOP_STRINGS:  # before a million strings are copied
        raise InvalidRequestError(
            f"{len(message.stopping.stop)} stop strings; at most {MAX_STOP_STRINGS} are allowed", field="stop"
        )
    values: dict[str, Any] = {}
    for part, names in ((message.sampling, _SAMPLING_FIELDS), (message.stopping, _STOPPING_FIELDS)):
        values |= {name: getattr(part, name) for name in names if part.HasField(name)}
    return SamplingParams(
        **values,
        logit_bias=dict(message.sampling.logit_bias),
        stop=tuple(message.stopping.stop),
        stop_token_ids=tuple(message.stopping.stop_token_ids),
    )


_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "logprobs",
)
_STOPPING_FIELDS = ("max_tokens", "min_tokens", "ignore_eos")


def request_to_proto(
    prompt: Prompt,
    *,
    ensemble: Ensemble | None = None,
    views: Sequence[Prompt] = (),
    sampling: SamplingParams | None = None,
    request_id: str = "",
    time_limit_s: float | None = None,
    return_member_logprobs: bool = False,
) -> inference_pb2.GenerateRequest:
    """For clients. `views[i - 1]` is the prompt of members with view i; 0 is `prompt`."""
    message = inference_pb2.GenerateRequest(request_id=request_id, prompt=prompt_to_proto(prompt))
    if ensemble is not None:
        message.ensemble.space = inference_pb2.PROBS if ensemble.space is Space.PROBS else inference_pb2.LOGITS
        message.ensemble.allow_negative = any(member.mix < 0 for member in ensemble.members)
        for member in ensemble.members:
            added = message.ensemble.members.add(name=member.name, mix=member.mix)
            if member.view:
                added.view.prompt.CopyFrom(prompt_to_proto(views[member.view - 1]))
    message.ensemble.return_member_logprobs = return_member_logprobs
    sampling = sampling or SamplingParams()
    for part, names in ((message.sampling, _SAMPLING_FIELDS), (message.stopping, _STOPPING_FIELDS)):
        for name in names:
            if getattr(sampling, name) is not None:
                setattr(part, name, getattr(sampling, name))
    message.sampling.logit_bias.update(sampling.logit_bias)
    message.stopping.stop.extend(sampling.stop)
    message.stopping.stop_token_ids.extend(sampling.stop_token_ids)
    if time_limit_s is not None:
        message.time_limit_ms = max(1, round(1000 * time_limit_s))
    return message


def prompt_to_proto(prompt: Prompt) -> inference_pb2.Prompt:
    if isinstance(prompt, str):
        return inference_pb2.Prompt(text=prompt)
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=ids))
    messages = [inference_pb2.ChatMessage(**item) for item in prompt if not isinstance(item, int)]
    return inference_pb2.Prompt(messages=inference_pb2.ChatMessages(messages=messages))


# ---- outputs ---------------------------------------------------------------------------------------------------------

_REASONS = {
    FinishReason.STOP: inference_pb2.STOP,
    FinishReason.LENGTH: inference_pb2.LENGTH,
    FinishReason.CANCELLED: inference_pb2.CANCELLED,
    FinishReason.TIME_LIMIT: inference_pb2.TIME_LIMIT,
}


def response_from_output(output: Output) -> inference_pb2.GenerateResponse:
    message = inference_pb2.GenerateResponse(
        request_id=output.request_id,
        choice=output.choice,
        text=output.text,
        token_ids=output.token_ids,
        seed=output.seed,
        member_logprobs=[inference_pb2.MemberLogprobs(logprobs=values) for values in output.member_logprobs],
    )
    for logprob, top in zip(output.logprobs, output.top_logprobs, strict=True):
        best = [inference_pb2.TokenLogprob(token_id=token_id, logprob=value) for token_id, value in top]
        message.logprobs.add(logprob=logprob, top=best)
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
        top_logprobs=[[(top.token_id, top.logprob) for top in entry.top] for entry in message.logprobs],
        member_logprobs=[list(entry.logprobs) for entry in message.member_logprobs],
        finish_reason=reasons.get(message.finish_reason),
        stop_matched=getattr(message, matched) if matched else None,
        usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        if message.HasField("usage")
        else None,
        timings=Timings(timings.queue_s, timings.prefill_s, timings.decode_s) if message.HasField("timings") else None,
    )


def model_to_proto(model: ModelInfo) -> admin_pb2.ModelInfo:
    message = admin_pb2.ModelInfo(
        name=model.name, members=model.members, vocab_size=model.vocab_size, max_model_len=model.max_model_len
    )
    message.default_ensemble.space = (
        inference_pb2.PROBS if model.default_ensemble.space is Space.PROBS else inference_pb2.LOGITS
    )
    for member in model.default_ensemble.members:
        message.default_ensemble.members.add(name=member.name, mix=member.mix)
    return message


def model_from_proto(message: admin_pb2.ModelInfo) -> ModelInfo:
    space = Space.PROBS if message.default_ensemble.space == inference_pb2.PROBS else Space.LOGITS
    members = tuple(Member(member.name, member.mix) for member in message.default_ensemble.members)
    return ModelInfo(
        name=message.name,
        members=tuple(message.members),
        default_ensemble=Ensemble(members, space),
        eos_token_ids=(),
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
    )
