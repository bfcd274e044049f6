"""Protocol buffers ↔ requests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from ....proto import inference_pb2
from ...api.limits import (
    MAX_MEMBERS,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TEXTS,
)
from ...api.prompt import Conversation, Prompt, PromptContent
from ...api.request import Ensemble, GenerateRequest, Member, Space, check_embedding
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


def embed_from_proto(message: inference_pb2.EmbedRequest) -> tuple[list[Prompt], Ensemble | None]:
    """Raises what `request_from_proto` raises."""
    if len(message.prompts) > MAX_TEXTS:  # before an object is made of each
        raise InvalidRequestError(
            f"1 to {MAX_TEXTS} texts are embedded at once, got {len(message.prompts)}", field="input"
        )
    ensemble = None
    if message.HasField("ensemble"):
        ensemble = _ensemble_from_proto(message.ensemble)
        check_embedding(ensemble, message.ensemble.allow_negative)
    return list(map(prompt_from_proto, message.prompts)), ensemble


def prompt_from_proto(message: inference_pb2.Prompt) -> Prompt:
    """An absent prompt is an empty text."""
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        return tuple(message.token_ids.ids)
    if kind == "messages":
        if len(message.messages.messages) > MAX_MESSAGES:
            raise _too_many_messages(len(message.messages.messages))
        chat = message.messages
        if sum(len(one.parts) for one in chat.messages) > MAX_PARTS:  # before an object is made of each
            raise _too_many_parts()
        return Conversation(
            tuple(map(_message_from_proto, chat.messages)), _objects("tools", chat.tools), chat.continue_final_message
        )
    return message.text


def _message_from_proto(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.parts:
        if message.content:
            raise InvalidRequestError("a message has content or parts; leave one out", field="messages.content")
        found["content"] = [_part_from_proto(part) for part in message.parts]
    found |= {name: getattr(message, name) for name in ("name", "tool_call_id") if message.HasField(name)}
    return found | {"tool_calls": _objects("tool_calls", message.tool_calls)} if message.tool_calls else found


def media_bytes(message: Any) -> int:
    """Bytes of the media of a request of `Inference`, which have a limit of their own. It looks at no more members, messages
    and parts than a request may have: it runs on the event loop. Raises `InvalidRequestError` for more."""
    prompts = [message.prompt]
    if isinstance(message, inference_pb2.GenerateRequest):
        if len(members := message.ensemble.members) > MAX_MEMBERS:
            raise InvalidEnsembleError(
                f"an ensemble has 1 to {MAX_MEMBERS} members, got {len(members)}", field="ensemble.members"
            )
        prompts += [member.view.prompt for member in members if member.HasField("view")]
    size = 0
    for prompt in prompts:
        chat, num_parts = prompt.messages.messages if prompt.HasField("messages") else (), 0
        if len(chat) > MAX_MESSAGES:
            raise _too_many_messages(len(chat))
        for one in chat:
            num_parts += len(one.parts)
            if num_parts > MAX_PARTS:
                raise _too_many_parts()
            size += sum(len(part.image) + len(part.audio) for part in one.parts)
    return size


def _too_many_messages(count: int) -> InvalidRequestError:
    return InvalidRequestError(f"a conversation has at most {MAX_MESSAGES} messages, got {count}", field="messages")


def _too_many_parts() -> InvalidRequestError:
    return InvalidRequestError(
        f"the messages' contents have at most {MAX_PARTS} parts; send fewer", field="messages.content"
    )


def _part_from_proto(part: inference_pb2.ContentPart) -> dict[str, Any]:
    kind = part.WhichOneof("part")
    if kind is None:
        raise InvalidRequestError("a part of a message's content is empty; leave it out", field="messages.content")
    return {"type": kind, kind: getattr(part, kind)}


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
    members = (
        Member(m.name, m.mix, next(numbers) if m.HasField("view") else 0, temperature_from_proto(m))
        for m in message.members
    )
    return Ensemble(tuple(members), space_from_proto(message.space))


def temperature_from_proto(message: inference_pb2.Member) -> float:
    return message.temperature if message.HasField("temperature") else 1.0


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
        message.ensemble.CopyFrom(ensemble_to_proto(request.ensemble))
        for added, member in zip(message.ensemble.members, request.ensemble.members):
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


def ensemble_to_proto(ensemble: Ensemble) -> inference_pb2.Ensemble:
    """Without the prompts of its views. `allow_negative` is set if a coefficient is negative."""
    members = list(map(member_to_proto, ensemble.members))
    is_negative = any(member.mix < 0 for member in ensemble.members)
    return inference_pb2.Ensemble(members=members, space=SPACES[ensemble.space], allow_negative=is_negative)


def member_to_proto(member: Member) -> inference_pb2.Member:
    """Without its view."""
    temperature = None if member.temperature == 1 else member.temperature
    return inference_pb2.Member(name=member.name, mix=member.mix, temperature=temperature)


def prompt_to_proto(prompt: Prompt) -> inference_pb2.Prompt:
    """Raises `InvalidRequestError` if the prompt is neither text, token ids nor messages, or has a media_type."""
    content = PromptContent.read(prompt)
    if content.text is not None:
        return inference_pb2.Prompt(text=content.text)
    if (chat := content.conversation) is not None:
        messages = list(map(_message_to_proto, chat.messages))
        tools, open_ = _json(chat.tools), chat.continue_final_message
        return inference_pb2.Prompt(
            messages=inference_pb2.ChatMessages(messages=messages, tools=tools, continue_final_message=open_)
        )
    return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=content.token_ids))


def _message_to_proto(message: Mapping[str, Any]) -> inference_pb2.ChatMessage:
    fields: dict[str, Any] = {key: _json(value) for key, value in message.items() if key != "content"}
    content = message["content"]
    if isinstance(content, str):
        return inference_pb2.ChatMessage(content=content, **fields)
    if any("media_type" in part for part in content):
        raise InvalidRequestError(
            "a part's media_type has no field in motet.v1, and the server looks at the file itself; leave it out",
            field="messages.content",
        )
    parts = [inference_pb2.ContentPart(**{part["type"]: part[part["type"]]}) for part in content]
    return inference_pb2.ChatMessage(parts=parts, **fields)


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if value else ""


SPACES = {Space.LOGITS: inference_pb2.LOGITS, Space.PROBS: inference_pb2.PROBS}


def space_from_proto(value: int) -> Space:
    """LOGITS if it is absent. Raises `InvalidEnsembleError` for a number that this version does not know."""
    if value == inference_pb2.SPACE_UNSPECIFIED:
        return Space.LOGITS
    for space, number in SPACES.items():
        if number == value:
            return space
    raise InvalidEnsembleError(f"space must be one of {[s.name for s in SPACES]}, got {value}", field="ensemble.space")
