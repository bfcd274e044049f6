"""`/v1/responses`: text and calls of tools. Nothing is stored, so every request brings its whole conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from ...api.limits import MAX_HTTP_ANSWER_BYTES
from ...api.output import Output
from ...api.request import FinishReason, GenerateRequest
from ...errors import InvalidRequestError, shown
from ...text.tools import ToolCall
from ..calls import Caller
from .answers import motet_fields
from .app import Door, Work, send_whole
from .events import Events, stream_events
from .parts import ContentPart, Part
from .tools import NamedFunction, NamedTool, Tools
from .wire import (
    ChatMessage,
    Common,
    FunctionCall,
    JsonSchema,
    ResponseFormat,
    ToolCallFields,
    conversation,
    generate_request,
    structure_of,
)


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextFields(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None


class Item(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message, a call of a tool, or what the tool has answered."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: str = ""
    content: str | list[ContentPart] | None = None
    name: str = ""
    arguments: str = ""
    call_id: str = ""
    output: str | list[ContentPart] = ""
    id: str | None = None
    status: str | None = None


class NamedResponseTool(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    type: Literal["function"] = "function"


class ResponsesRequest(Common, kw_only=True, forbid_unknown_fields=True):
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextFields | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None  # is sent back
    store: Literal[False] | None = None  # nothing is stored
    service_tier: Literal["auto", "default"] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None


async def responses(door: Door, request: Request) -> Response:
    fields: Any = await door.body(request, ResponsesRequest, "generate", _media_size)
    caller = door.caller(request, fields.user)
    asked, tools = await door.service.read("generate", lambda: _request(fields, door), caller)
    answer = _Answer(door, fields, asked, tools, caller)
    return Work(answer.stream if fields.stream else answer.whole)


def _request(fields: Any, door: Door) -> tuple[GenerateRequest, Tools]:
    if (fields.n or 1) != 1 or fields.stream_options is not None:
        raise InvalidRequestError("a response has one choice and no stream_options; leave n and them out", field="n")
    choice = fields.tool_choice
    if isinstance(choice, NamedResponseTool):
        choice = NamedTool(NamedFunction(choice.name))
    tools = Tools(
        [_chat_tool(tool) for tool in fields.tools or ()], choice, fields.parallel_tool_calls, door.service.tokenizer
    )
    structure = structure_of(_response_format(fields.text))
    if tools.structure is not None and structure is not None:
        raise InvalidRequestError(
            "tool_choice forces a call, and text.format another form; leave one out", field="text"
        )
    asked = generate_request(
        fields,
        conversation(_messages(fields), tools.shown),
        door.service.served,
        max_tokens=fields.max_output_tokens,
        structure=tools.structure or structure,
    )
    return asked, tools


def _response_format(text: TextFields | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    one = text.format
    if one.type != "json_schema":
        return ResponseFormat(one.type)
    return ResponseFormat(one.type, JsonSchema(one.name, one.schema, one.strict, one.description))


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """The chat API has the function's fields in an object of their own."""
    return {"type": tool.get("type"), "function": {key: value for key, value in tool.items() if key != "type"}}


def _messages(fields: Any) -> list[ChatMessage]:
    found = [ChatMessage("system", fields.instructions)] if fields.instructions else []
    if isinstance(fields.input, str):
        return [*found, ChatMessage("user", fields.input)]
    for item in fields.input:
        match item.type:
            case "function_call":
                call = ToolCallFields(FunctionCall(item.name, item.arguments), item.call_id)
                if found and found[-1].role == "assistant":
                    found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
                else:
                    found.append(ChatMessage("assistant", None, tool_calls=[call]))
            case "function_call_output":
                found.append(ChatMessage("tool", _parts(item.output), tool_call_id=item.call_id))
            case _:
                if item.role not in ("user", "assistant", "system", "developer") or item.content is None:
                    raise InvalidRequestError(
                        f"an item of input is a message with role and content, a function_call or a function_call_output, "
                        f"got role {shown(item.role)}",
                        field="input",
                    )
                found.append(ChatMessage(item.role, _parts(item.content)))
    return found


def _media_size(fields: Any) -> int:
    items = () if isinstance(fields.input, str) else fields.input
    contents = (content for item in items for content in (item.content, item.output) if isinstance(content, list))
    return sum(part.media_size for content in contents for part in content)


def _parts(content: str | list[ContentPart]) -> str | list[Part]:
    return content if isinstance(content, str) else [part.as_in_chat() for part in content]


class _Answer:
    def __init__(self, door: Door, fields: Any, asked: GenerateRequest, tools: Tools, caller: Caller) -> None:
        self._door, self._asked, self._tools, self._caller = door, asked, tools, caller
        number = asked.request_id or uuid.uuid4().hex
        self._message_id = f"msg_{number}"
        self._head = {
            "id": f"resp_{number}",
            "object": "response",
            "created_at": time.time(),
            "model": fields.model or door.service.served.name,
            "instructions": fields.instructions,
            "metadata": fields.metadata or {},
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "temperature": asked.sampling.temperature,
            "top_p": asked.sampling.top_p,
            "max_output_tokens": asked.sampling.max_tokens,
            "tool_choice": msgspec.to_builtins(fields.tool_choice) or "auto",
            "tools": fields.tools or [],
            "store": False,
            "error": None,
        }

    async def whole(self, send: Send) -> None:
        service = self._door.service
        [output] = await service.complete(self._asked, self._caller, MAX_HTTP_ANSWER_BYTES)
        text = output.text
        calls: list[ToolCall] = []
        reader = self._tools.reader()
        if reader is not None:
            text = reader.push(text)
            rest, calls = reader.finish()
            text += rest
        await send_whole(send, msgspec.json.encode(self._ended(output, text, calls)))

    def _ended(self, output: Output, text: str, calls: list[ToolCall]) -> dict[str, Any]:
        """The response, as it is at its end."""
        is_whole = output.finish_reason is FinishReason.STOP
        details = None
        if not is_whole:
            reason = "max_output_tokens" if output.finish_reason is FinishReason.LENGTH else str(output.finish_reason)
            details = {"reason": reason}
        items = [self._message(text, "completed" if is_whole else "incomplete")] if text or not calls else []
        items += [_call_item(call) for call in self._tools.kept(calls)]
        usage = output.usage
        assert usage is not None
        return self._head | {
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": details,
            "output": items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
            **motet_fields(output),
        }

    def _message(self, text: str, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        content = [part] if status != "in_progress" else []
        return {
            "type": "message",
            "id": self._message_id,
            "status": status,
            "role": "assistant",
            "content": content,
        }

    async def stream(self, send: Send) -> None:
        async with aclosing(self._events()) as events:
            await stream_events(send, _numbered(events), str(self._head["id"]), named=True)

    async def _events(self) -> AsyncGenerator[Events, None]:
        begun = self._head | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        at = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        empty = {"type": "output_text", "text": "", "annotations": []}
        opening: Events = [
            {"type": "response.output_item.added", "output_index": 0, "item": self._message("", "in_progress")},
            {"type": "response.content_part.added", **at, "part": empty},
        ]
        reader, text, is_open = self._tools.reader(), "", False
        async with aclosing(self._door.service.generate(self._asked, self._caller)) as outputs:
            whole: Output | None = None  # whose log-probabilities and confidences the last event has
            async for output in outputs:
                batch: Events = []
                if whole is None:
                    batch = [{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")]
                    whole = output
                else:
                    whole.extend(output)
                calls: list[ToolCall] = []
                delta = output.text if reader is None else reader.push(output.text)
                if output.finish_reason is not None and reader is not None:
                    rest, calls = reader.finish()
                    delta += rest
                if delta and not is_open:
                    batch, is_open = [*batch, *opening], True
                if delta:
                    text += delta
                    batch.append({"type": "response.output_text.delta", **at, "delta": delta, "logprobs": []})
                if output.finish_reason is not None:
                    if not is_open and not calls:
                        batch, is_open = [*batch, *opening], True
                    batch += self._closing(whole, text, calls, at, is_open)
                yield batch

    def _closing(self, output: Output, text: str, calls: list[ToolCall], at: dict[str, Any], is_open: bool) -> Events:
        ended = self._ended(output, text, calls)
        found: Events = []
        if is_open:
            part = {"type": "output_text", "text": text, "annotations": []}
            found = [
                {"type": "response.output_text.done", **at, "text": text, "logprobs": []},
                {"type": "response.content_part.done", **at, "part": part},
                {"type": "response.output_item.done", "output_index": 0, "item": ended["output"][0]},
            ]
        for index, item in enumerate(ended["output"]):
            if item["type"] == "function_call":
                place = {"item_id": item["id"], "output_index": index}
                blank = item | {"arguments": "", "status": "in_progress"}
                arguments = item["arguments"]
                found += [
                    {"type": "response.output_item.added", "output_index": index, "item": blank},
                    {"type": "response.function_call_arguments.delta", **place, "delta": arguments},
                    {
                        "type": "response.function_call_arguments.done",
                        **place,
                        "arguments": arguments,
                        "name": item["name"],
                    },
                    {"type": "response.output_item.done", "output_index": index, "item": item},
                ]
        name = "response.completed" if ended["status"] == "completed" else "response.incomplete"
        return [*found, {"type": name, "response": ended}]


async def _numbered(batches: AsyncGenerator[Events, None]) -> AsyncGenerator[Events, None]:
    number = 0
    async for batch in batches:
        for event in batch:
            event["sequence_number"] = number
            number += 1
        yield batch


def _call_item(call: ToolCall) -> dict[str, Any]:
    number = uuid.uuid4().hex[:24]
    return {
        "type": "function_call",
        "id": f"fc_{number}",
        "call_id": f"call_{number}",
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }
