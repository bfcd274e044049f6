"""`/v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from ...api.limits import MAX_HTTP_ANSWER_BYTES
from ...api.output import Output, Usage
from ...api.request import GenerateRequest
from ...errors import InvalidRequestError
from ...text.tools import ToolCall, ToolReader
from ..calls import Caller
from .answers import chat_logprobs, finish_reason, motet_fields, usage_of
from .app import Door, Work, send_whole
from .events import Events, stream_events
from .tools import NamedTool, Tools
from .wire import ChatMessage, Common, ResponseFormat, conversation, generate_request, structure_of


class ChatRequest(Common, kw_only=True, forbid_unknown_fields=True):
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None  # nothing is stored
    service_tier: Literal["auto", "default"] | None = None


async def chat_completions(door: Door, request: Request) -> Response:
    fields: Any = await door.body(request, ChatRequest, "generate", _media_size)
    caller = door.caller(request, fields.user)
    asked, tools = await door.service.read("generate", lambda: _request(fields, door), caller)
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options is for a stream; set stream, or leave it out", field="stream_options")
    answer = _Answer(door, fields, asked, tools, caller)
    return Work(answer.stream if fields.stream else answer.whole)


def _media_size(fields: Any) -> int:
    contents = (message.content for message in fields.messages if isinstance(message.content, list))
    return sum(part.media_size for content in contents for part in content)


def _request(fields: Any, door: Door) -> tuple[GenerateRequest, Tools]:
    tools = Tools(fields.tools or (), fields.tool_choice, fields.parallel_tool_calls, door.service.tokenizer)
    structure = structure_of(fields.response_format)
    if tools.structure is not None and structure is not None:
        raise InvalidRequestError(
            "tool_choice forces a call, and response_format another form; leave one out", field="response_format"
        )
    if fields.max_tokens is not None and fields.max_completion_tokens is not None:
        raise InvalidRequestError("max_tokens is max_completion_tokens's old name; leave it out", field="max_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs; set it, or leave it out", field="top_logprobs")
    asked = generate_request(
        fields,
        conversation(fields.messages, tools.shown, bool(fields.continue_final_message)),
        door.service.served,
        max_tokens=fields.max_completion_tokens if fields.max_tokens is None else fields.max_tokens,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        structure=tools.structure or structure,
    )
    return asked, tools


class _Answer:
    def __init__(self, door: Door, fields: Any, asked: GenerateRequest, tools: Tools, caller: Caller) -> None:
        self._door, self._fields, self._asked, self._tools, self._caller = door, fields, asked, tools, caller
        self._head = {
            "id": f"chatcmpl-{asked.request_id or uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": fields.model or door.service.served.name,
            "system_fingerprint": door.service.served.digest or None,
        }

    async def whole(self, send: Send) -> None:
        service = self._door.service
        choices = await service.complete(self._asked, self._caller, MAX_HTTP_ANSWER_BYTES)
        body = await service.encode(lambda: msgspec.json.encode(self._body(choices)))
        await send_whole(send, body)

    def _body(self, choices: list[Output]) -> dict[str, Any]:
        found = [self._choice(output) for output in choices]
        usage = usage_of([output.usage for output in choices])
        return self._head | {"object": "chat.completion", "choices": found, "usage": usage}

    def _choice(self, output: Output) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        reason, reader = finish_reason(output), self._tools.reader()
        if reader is not None:
            text = reader.push(output.text)
            rest, calls = reader.finish()
            if calls:
                message["content"] = (text + rest).strip() or None
                message["tool_calls"] = [_call(call) for call in self._tools.kept(calls)]
                reason = "tool_calls" if reason == "stop" else reason
        return {
            "index": output.choice,
            "message": message,
            "logprobs": chat_logprobs(self._door.service.tokenizer, output),
            "finish_reason": reason,
            **motet_fields(output),
        }

    async def stream(self, send: Send) -> None:
        async with aclosing(self._chunks()) as chunks:
            await stream_events(send, chunks, str(self._head["id"]))

    async def _chunks(self) -> AsyncGenerator[Events, None]:
        readers: dict[int, ToolReader | None] = {}
        usages: dict[int, Usage | None] = {}
        options = self._fields.stream_options
        with_usage = options is not None and options.include_usage
        async with aclosing(self._door.service.generate(self._asked, self._caller)) as outputs:
            async for output in outputs:
                is_first = output.choice not in readers
                reader = readers.setdefault(output.choice, self._tools.reader())
                if output.finish_reason is not None:
                    usages[output.choice] = output.usage
                choice = self._delta(output, reader, is_first)
                yield [self._chunk([choice], {"usage": None} if with_usage else {})]
        if with_usage:
            yield [self._chunk([], {"usage": usage_of(list(usages.values()))})]

    def _chunk(self, choices: list[dict[str, Any]], more: Mapping[str, Any]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": choices, **more}

    def _delta(self, output: Output, reader: ToolReader | None, is_first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        text, reason = output.text, finish_reason(output)
        if reader is not None:
            text = reader.push(text)
            if reason is not None:
                rest, calls = reader.finish()
                text += rest
                if calls:
                    kept = self._tools.kept(calls)
                    delta["tool_calls"] = [_call(call) | {"index": index} for index, call in enumerate(kept)]
                    reason = "tool_calls" if reason == "stop" else reason
        if text or is_first:
            delta["content"] = text
        return {
            "index": output.choice,
            "delta": delta,
            "logprobs": chat_logprobs(self._door.service.tokenizer, output),
            "finish_reason": reason,
            **motet_fields(output),
        }


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
