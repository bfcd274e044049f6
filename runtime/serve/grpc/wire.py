"""Protocol buffers ↔ requests and outputs. No other file knows both."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ....proto import admin_pb2, inference_pb2
from ...api.limits import (
    MAX_DELTA_BYTES,
    MAX_MEMBERS,
    MAX_MESSAGES,
)
from ...api.model_info import MemberOrigin, ModelInfo
from ...api.output import Output, Timings, Usage
from ...api.prompt import Conversation, Prompt, PromptContent
from ...api.request import Ensemble, FinishReason, GenerateRequest, Member, Space
from ...api.sampling import RULES, SamplingParams
from ...api.structure import Structure, StructureKind
from ...errors import InvalidEnsembleError, InvalidRequestError

# ---- requests --------------------------------------------------------------------------------------------------------


def _part_of(name: str) -> str:
    """The message of a GenerateRequest, Sampling or Stopping, that has the field `name` of `SamplingParams`. Raises
    `TypeError`, when this module is loaded, if the .proto lacks the field, or if an absent scalar would look like
    zero."""
    for part in _PARTS:
        message = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name[part].message_type
        field = message.fields_by_name.get(name) if message is not None else None
        if field is not None and (field.has_presence or field.is_repeated):
            return part
    raise TypeError(f"proto/motet/v1/inference.proto needs `{name}` in Sampling or Stopping, optional or repeated")


_PARTS = ("sampling", "stopping")
_PART_OF = {name: _part_of(name) for name in RULES}


def request_from_proto(message: inference_pb2.GenerateRequest) -> GenerateRequest:
    """Raises `InvalidRequestError` or a class derived from it, naming the field. Do not call it on the event loop: it
    takes longer the larger the message is."""
    if len(message.ensemble.members) > MAX_MEMBERS:  # before an object is made of each
        raise InvalidEnsembleError(
            f"an ensemble has 1 to {MAX_MEMBERS} members, got {len(message.ensemble.members)}", field="ensemble.members"
        )
    ensemble = _ensemble_from_proto(message.ensemble) if message.HasField("ensemble") else None
    views = (member.view.prompt for member in message.ensemble.members if member.HasField("view"))
    return GenerateRequest(
        prompt=prompt_from_proto(message.prompt),
        ensemble=ensemble,
        views=tuple(map(prompt_from_proto, views)),
        sampling=_sampling_from_proto(message),
        request_id=message.request_id,
        time_limit_s=message.time_limit_s if message.HasField("time_limit_s") else None,
        return_member_logprobs=message.return_member_logprobs,
        return_confidence=message.return_confidence,
        abstain_below=message.abstain_below if message.HasField("abstain_below") else None,
        drafts=message.drafts,
        priority=message.priority,
        cache_salt=message.cache_salt,
        structure=_structure_from_proto(message.structure) if message.HasField("structure") else None,
        allow_negative=message.ensemble.allow_negative,
    )


def prompt_from_proto(message: inference_pb2.Prompt) -> Prompt:
    """An absent prompt is an empty text."""
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        return tuple(message.token_ids.ids)
    if kind == "messages":
        if len(message.messages.messages) > MAX_MESSAGES:
            raise InvalidRequestError(
                f"a conversation has at most {MAX_MESSAGES} messages, got {len(message.messages.messages)}",
                field="messages",
            )
        chat = message.messages
        return Conversation(
            tuple(map(_message_from_proto, chat.messages)), _objects("tools", chat.tools), chat.continue_final_message
        )
    return message.text


def _message_from_proto(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    found |= {name: getattr(message, name) for name in ("name", "tool_call_id") if message.HasField(name)}
    return found | {"tool_calls": _objects("tool_calls", message.tool_calls)} if message.tool_calls else found


def _objects(name: str, text: str) -> list[Any]:
    """A JSON array in a field. Raises `InvalidRequestError`."""
    try:
        found = json.loads(text) if text else []
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is not JSON: {error}", field=name) from None
    if not isinstance(found, list):
        raise InvalidRequestError(f"{name} must be a JSON array", field=name)
    return found


def _ensemble_from_proto(message: inference_pb2.Ensemble) -> Ensemble:
    """Each member with a view gets a view of its own; they are numbered 1, 2, … in the order of the members."""
    numbers = itertools.count(1)
    members = (Member(m.name, m.mix, next(numbers) if m.HasField("view") else 0) for m in message.members)
    return Ensemble(tuple(members), _space_from_proto(message.space))


def _structure_from_proto(message: inference_pb2.Structure) -> Structure:
    match message.WhichOneof("structure"):
        case None:
            raise InvalidRequestError(
                "structure is set and empty; set one of its fields, or leave it out", field="structure"
            )
        case "choice":
            return Structure.choice(message.choice.texts)
        case "json_object":
            if not message.json_object:
                raise InvalidRequestError("json_object is true or absent", field="structure")
            return Structure.json_object()
        case kind:
            return Structure(StructureKind(kind), getattr(message, kind))


def _structure_to_proto(structure: Structure) -> inference_pb2.Structure:
    message = inference_pb2.Structure()
    match structure.kind:
        case StructureKind.CHOICE:
            message.choice.texts.extend(json.loads(structure.spec))
        case StructureKind.JSON_OBJECT:
            message.json_object = True
        case kind:
            setattr(message, kind, structure.spec)
    return message


def _sampling_from_proto(message: inference_pb2.GenerateRequest) -> SamplingParams:
    """Fields that are absent keep the defaults of `SamplingParams`."""
    present = {name: getattr(message, part) for name, part in _PART_OF.items()}
    return SamplingParams(
        **{
            name: getattr(part, name)
            for name, part in present.items()
            if not part.DESCRIPTOR.fields_by_name[name].has_presence or part.HasField(name)
        }
    )


def request_to_proto(prompt: Prompt, **fields: Any) -> inference_pb2.GenerateRequest:
    """For clients. `fields` are those of `GenerateRequest`, which checks them. `allow_negative` is set if a
    coefficient is negative: in a program that is on purpose."""
    ensemble: Ensemble | None = fields.get("ensemble")
    is_negative = ensemble is not None and any(member.mix < 0 for member in ensemble.members)
    request = GenerateRequest(prompt, allow_negative=is_negative, **fields)
    message = inference_pb2.GenerateRequest(
        request_id=request.request_id,
        prompt=prompt_to_proto(request.prompt),
        time_limit_s=request.time_limit_s,
        return_member_logprobs=request.return_member_logprobs,
        return_confidence=request.return_confidence,
        abstain_below=request.abstain_below,
        drafts=request.drafts,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )
    if request.structure is not None:
        message.structure.CopyFrom(_structure_to_proto(request.structure))
    if request.ensemble is not None:
        message.ensemble.space = _SPACES[request.ensemble.space]
        message.ensemble.allow_negative = request.allow_negative
        for member in request.ensemble.members:
            added = message.ensemble.members.add(name=member.name, mix=member.mix)
            if member.view:
                added.view.prompt.CopyFrom(prompt_to_proto(request.views[member.view - 1]))
    for name, part in _PART_OF.items():
        value = getattr(request.sampling, name)
        target = getattr(message, part)
        if isinstance(value, Mapping):
            getattr(target, name).update(value)
        elif isinstance(value, tuple):
            getattr(target, name).extend(value)
        elif value is not None:
            setattr(target, name, value)
    return message


def prompt_to_proto(prompt: Prompt) -> inference_pb2.Prompt:
    """Raises `InvalidRequestError` if the prompt is neither text, token ids nor messages."""
    content = PromptContent.read(prompt)
    if content.text is not None:
        return inference_pb2.Prompt(text=content.text)
    if (chat := content.conversation) is not None:
        messages = [inference_pb2.ChatMessage(**{k: _json(v) for k, v in message.items()}) for message in chat.messages]
        tools, open_ = _json(chat.tools), chat.continue_final_message
        return inference_pb2.Prompt(
            messages=inference_pb2.ChatMessages(messages=messages, tools=tools, continue_final_message=open_)
        )
    return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=content.token_ids))


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if value else ""


_SPACES = {Space.LOGITS: inference_pb2.LOGITS, Space.PROBS: inference_pb2.PROBS}


def _space_from_proto(value: int) -> Space:
    """LOGITS if it is absent. Raises `InvalidEnsembleError` for a number that this version does not know."""
    if value == inference_pb2.SPACE_UNSPECIFIED:
        return Space.LOGITS
    for space, number in _SPACES.items():
        if number == value:
            return space
    raise InvalidEnsembleError(f"space must be one of {[s.name for s in _SPACES]}, got {value}", field="ensemble.space")


# ---- outputs ---------------------------------------------------------------------------------------------------------

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
    scored = len(output.prompt_logprobs)
    count = max(1, -(-max(len(ids), scored) * size // MAX_DELTA_BYTES), -(-len(text) * 4 // MAX_DELTA_BYTES))
    tokens, characters, prompt = -(-len(ids) // count), -(-len(text) // count), -(-scored // count)
    for index in range(count):
        at = slice(index * tokens, (index + 1) * tokens)
        piece = Output(
            output.request_id,
            output.choice,
            output.seed,
            text[index * characters : (index + 1) * characters],
            ids[at],
            output.logprobs[at],
            output.top_logprobs[at],
            output.member_logprobs[at],
            output.prompt_logprobs[index * prompt : (index + 1) * prompt],
            output.prompt_top_logprobs[index * prompt : (index + 1) * prompt],
            output.confidence[at],
            output.disagreement[at],
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


def model_to_proto(model: ModelInfo) -> admin_pb2.ModelInfo:
    message = admin_pb2.ModelInfo(
        name=model.name,
        members=model.members,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        digest=model.digest,
        origins=[admin_pb2.MemberOrigin(**dataclasses.asdict(origin)) for origin in model.origins],
    )
    message.default_ensemble.space = _SPACES[model.default_ensemble.space]
    for member in model.default_ensemble.members:
        message.default_ensemble.members.add(name=member.name, mix=member.mix)
    return message


def model_from_proto(message: admin_pb2.ModelInfo) -> ModelInfo:
    members = tuple(Member(member.name, member.mix) for member in message.default_ensemble.members)
    return ModelInfo(
        name=message.name,
        members=tuple(message.members),
        default_ensemble=Ensemble(members, _space_from_proto(message.default_ensemble.space)),
        eos_token_ids=tuple(message.eos_token_ids),
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        digest=message.digest,
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
