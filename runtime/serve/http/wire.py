"""JSON → requests: what the routes of generation share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ...api.limits import MAX_MEMBERS, MAX_MESSAGES
from ...api.model_info import ModelInfo
from ...api.prompt import Conversation, Prompt
from ...api.request import Ensemble, GenerateRequest, Member, Space
from ...api.sampling import RULES, SamplingParams
from ...api.structure import Structure
from ...errors import InvalidEnsembleError, InvalidRequestError, shown
from ..model_names import ensemble_of
from .parts import Part, read_part


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class MemberFields(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    mix: float
    view: str | list[Any] | None = None  # a prompt of its own: text, messages or token ids
    temperature: float = 1.0  # by which its logits are divided before they are mixed


class EnsembleFields(msgspec.Struct, forbid_unknown_fields=True):
    members: list[MemberFields]
    space: str = Space.LOGITS.value
    allow_negative: bool = False


class StructureFields(msgspec.Struct, forbid_unknown_fields=True):
    """As vLLM's `structured_outputs`: one of these."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str = "text"
    json_schema: JsonSchema | None = None


_OWN_NAMES = {"max_tokens", "logprobs", "stop"}  # OpenAI's fields of other types or meanings; the routes have them


class Extensions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields beyond OpenAI's, which OpenAI's client sends as `extra_body`: those of `GenerateRequest` and, below,
    `SamplingParams`. null is an absent field."""

    ensemble: EnsembleFields | None = None
    request_id: str | None = None
    time_limit_s: float | None = None
    return_member_logprobs: bool | None = None
    return_confidence: bool | None = None
    abstain_below: float | None = None
    drafts: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    structured_outputs: StructureFields | None = None


class _Common(Extensions, kw_only=True):
    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    user: str | None = None  # recorded


if TYPE_CHECKING:
    Common = _Common
else:  # what all routes of generation take
    _SAMPLING = [(name, Any, None) for name in RULES if name not in _OWN_NAMES]
    Common = msgspec.defstruct("Common", _SAMPLING, bases=(_Common,), kw_only=True, forbid_unknown_fields=True)


def generate_request(
    fields: Any,
    prompt: Prompt,
    model: ModelInfo,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    structure: Structure | None = None,
) -> GenerateRequest:
    """A request of `Common` fields. Raises `InvalidRequestError` or a class derived from it, `NotFoundError` (another
    model)."""
    given = {name: value for name in RULES if name not in _OWN_NAMES and (value := getattr(fields, name)) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = _biases(given["logit_bias"])
    if isinstance(seed := given.get("seed"), int) and not isinstance(seed, bool) and -(2**63) <= seed < 0:
        given["seed"] = seed + 2**64  # OpenAI's seeds are signed
    if fields.stop is not None:
        given["stop"] = fields.stop
    ensemble, views, allow_negative = read_ensemble(fields.ensemble, fields.model, model)
    own = fields.structured_outputs
    if own is not None:
        if structure is not None:
            raise InvalidRequestError(
                "structured_outputs is given beside another structure; leave one out", field="structured_outputs"
            )
        structure = _structure(own)
    names = ("request_id", "time_limit_s", "return_member_logprobs", "return_confidence", "abstain_below")
    options = {
        name: value
        for name in (*names, "drafts", "priority", "cache_salt")
        if (value := getattr(fields, name)) is not None
    }
    return GenerateRequest(
        prompt=prompt,
        ensemble=ensemble,
        views=views,
        sampling=SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given),
        allow_negative=allow_negative,
        structure=structure,
        **options,
    )


def read_ensemble(
    fields: EnsembleFields | None, name: str, model: ModelInfo
) -> tuple[Ensemble | None, tuple[Prompt, ...], bool]:
    """The ensemble of the extension field or of the model's name, its views, and whether coefficients may be negative.
    Raises what `ensemble_of` raises."""
    named = ensemble_of(name, model)
    if fields is None:
        return named, (), False
    if named is not None:
        raise InvalidEnsembleError(
            "the model's name has a mix, and ensemble is given too; leave one out", field="ensemble"
        )
    if len(fields.members) > MAX_MEMBERS:
        raise InvalidEnsembleError(
            f"an ensemble has 1 to {MAX_MEMBERS} members, got {len(fields.members)}", field="ensemble.members"
        )
    views: list[Prompt] = []
    members = []
    for member in fields.members:
        if member.view is not None:
            views.append(_view(member.view))
        view = len(views) if member.view is not None else 0
        members.append(Member(member.name, member.mix, view, member.temperature))
    return Ensemble(tuple(members), fields.space), tuple(views), fields.allow_negative  # type: ignore[arg-type]


def _view(view: str | list[Any]) -> Prompt:
    if isinstance(view, str):
        return view
    if view and isinstance(view[0], dict):
        try:
            return conversation(msgspec.convert(view, list[ChatMessage]))
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"a view's messages: {error}", field="ensemble.members.view") from None
    return tuple(view)


def prompts_of(value: str | list[Any], field: str) -> list[Prompt]:
    """A text, token ids, or a list of these. Raises `InvalidRequestError`."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequestError(f"{field} is an empty list; send text or token ids", field=field)
    if isinstance(value[0], int):
        return [tuple(value)]
    return [tuple(one) if isinstance(one, list) else one for one in value]


def _biases(value: Any) -> Any:
    """JSON's keys are texts."""
    if not isinstance(value, Mapping):
        return value  # refused by its rule
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError:
        raise InvalidRequestError("logit_bias maps token ids to numbers", field="logit_bias") from None


def _structure(fields: StructureFields) -> Structure:
    given = {name: value for name in fields.__struct_fields__ if (value := getattr(fields, name)) is not None}
    if len(given) != 1:
        raise InvalidRequestError(
            f"structured_outputs has one of {list(fields.__struct_fields__)}, got {sorted(given)}",
            field="structured_outputs",
        )
    [(name, value)] = given.items()
    if name == "json_object":
        if not value:
            raise InvalidRequestError("json_object is true or absent", field="structured_outputs.json_object")
        return Structure.json_object()
    make = {"json": Structure.json_schema, "regex": Structure.regex, "choice": Structure.choice}
    return make.get(name, Structure.grammar)(value)


def structure_of(format: ResponseFormat | None) -> Structure | None:
    """Of `response_format`. Raises `InvalidRequestError`."""
    if format is None:
        return None
    match format.type, format.json_schema:
        case "text", None:
            return None
        case "json_object", None:
            return Structure.json_object()
        case "json_schema", JsonSchema(schema=dict() as schema):
            return Structure.json_schema(schema)
    raise InvalidRequestError(
        "response_format is {type: text}, {type: json_object}, or {type: json_schema, json_schema: {name, schema}}",
        field="response_format",
    )


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCallFields(msgspec.Struct, forbid_unknown_fields=True):
    function: FunctionCall
    id: str = ""
    type: str = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[Part] | None = None
    type: Literal["text", "message"] | None = None  # evaluation harnesses send it
    name: str | None = None
    tool_calls: list[ToolCallFields] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    audio: None = None
    annotations: list[None] | None = None
    function_call: None = None


def conversation(
    messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] = (), continue_final_message: bool = False
) -> Conversation:
    """OpenAI's messages as the chat template gets them: images and sounds decoded from base64, arguments of calls as
    objects, `developer` as `system`. Raises `InvalidRequestError`."""
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"a conversation has at most {MAX_MESSAGES} messages, got {len(messages)}", field="messages"
        )
    return Conversation(tuple(map(_message, messages)), tuple(tools), continue_final_message)


def _message(message: ChatMessage) -> dict[str, Any]:
    content: Any = message.content
    if isinstance(content, list):
        content = [read_part(part) for part in content]
    if content is None:
        if not message.tool_calls and not message.refusal:
            raise InvalidRequestError("a message without tool_calls needs a content", field="messages.content")
        content = message.refusal or ""
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return found


def _tool_call(call: ToolCallFields) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InvalidRequestError(
                f"the arguments of a tool call are a JSON object, got {shown(arguments)}", field="messages.tool_calls"
            ) from None
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
