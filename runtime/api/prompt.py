"""A prompt as a caller passes it: text, token ids, or a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from ..errors import InvalidRequestError, shown
from .limits import MAX_MESSAGES, MAX_PARTS
from .rules import Flag, Integer, num_bytes

# {"role", "content"}, and perhaps "name", "tool_call_id" (texts) and "tool_calls" (JSON objects). A content is a text, or a list
# of parts: {"type": "text", "text"}, or {"type": "image", "image"} and {"type": "audio", "audio"}, the bytes of a file, and
# perhaps "media_type", what its sender says that they are, such as image/png.
Message = Mapping[str, Any]
_TOKEN_ID = Integer()
_MEDIA = ("image", "audio")  # types of parts, and the keys of their bytes


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and what else the model's chat template is given. `tools`: JSON schemas of functions that the model may
    call. `continue_final_message`: the answer goes on with the last message, whose turn is left open. Raises
    `InvalidRequestError`."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        for name in ("messages", "tools"):
            if not isinstance(getattr(self, name), list | tuple):
                raise InvalidRequestError(f"{name} must be a list, got {shown(getattr(self, name))}", field=name)
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequestError(
                f"a conversation has at most {MAX_MESSAGES} messages, got {len(self.messages)}", field="messages"
            )
        for message in self.messages:
            _check_message(message)
        for tool in self.tools:
            if not isinstance(tool, Mapping) or not _is_json(tool):
                raise InvalidRequestError(f"a tool is a JSON object, got {shown(tool)}", field="tools")
        Flag().check("continue_final_message", self.continue_final_message)
        if (
            sum(len(message["content"]) for message in self.messages if not isinstance(message["content"], str))
            > MAX_PARTS
        ):
            raise InvalidRequestError(
                f"the messages' contents have at most {MAX_PARTS} parts", field="messages.content"
            )
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "tools", tuple(self.tools))

    @property
    def media(self) -> list[tuple[str, bytes, str]]:
        """Of each part that is no text, in order: its type, its bytes, and the media type that its sender says, or ""."""
        parts = (part for m in self.messages if not isinstance(m["content"], str) for part in m["content"])
        return [(kind, part[kind], part.get("media_type", "")) for part in parts if (kind := part["type"]) != "text"]


Prompt = str | Sequence[int] | Sequence[Message] | Conversation


@dataclass(frozen=True, slots=True)
class PromptContent:
    """The content of a prompt: exactly one of the three is not None. That it is not empty, and that ids and roles
    exist, is checked later, by the tokenizer and the model."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    conversation: Conversation | None = None

    @classmethod
    def read(cls, prompt: Prompt) -> PromptContent:
        """Find out which of the three kinds a prompt is. Raises `InvalidRequestError` for any other kind and for a
        mixture."""
        if isinstance(prompt, Conversation):
            return cls(conversation=prompt)
        if isinstance(prompt, str):
            if num_bytes(prompt) is None:
                raise InvalidRequestError("the prompt is not valid Unicode text", field="prompt")
            return cls(text=prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise InvalidRequestError(
                f"a prompt is text, a list of token ids or a list of messages, got {type(prompt).__name__}",
                field="prompt",
            )
        if all(isinstance(item, SupportsIndex) for item in prompt):
            return cls(
                token_ids=tuple(_TOKEN_ID.check("prompt", item, "every token id of a prompt") for item in prompt)
            )
        if not all(isinstance(item, Mapping) for item in prompt[:MAX_MESSAGES]):
            raise InvalidRequestError("a prompt is text, token ids or messages, not a mixture", field="prompt")
        return cls(conversation=Conversation(tuple(prompt)))  # type: ignore[arg-type]


def _check_message(message: object) -> None:
    texts = {"role", "content", "name", "tool_call_id"}
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) <= texts | {"tool_calls"}:
        found = sorted(map(str, message)) if isinstance(message, Mapping) else message
        raise InvalidRequestError(
            f"a message has a role and a content, and may have name, tool_call_id and tool_calls, got {shown(found)}",
            field="messages",
        )
    for key in texts & set(message):
        if key == "content" and isinstance(message[key], list | tuple):
            for part in message[key]:
                _check_part(part)
            continue
        if not isinstance(message[key], str) or num_bytes(message[key]) is None:
            raise InvalidRequestError(f"a message's {key} must be text, got {shown(message[key])}", field="messages")
    calls = message.get("tool_calls", ())
    if (
        not isinstance(calls, list | tuple)
        or not all(isinstance(c, Mapping) for c in calls)
        or not _is_json(list(calls))
    ):
        raise InvalidRequestError(f"tool_calls must be a list of JSON objects, got {shown(calls)}", field="messages")


def _check_part(part: object) -> None:
    if isinstance(part, Mapping):
        keys, text, kind = set(part), part.get("text"), part.get("type")
        if (
            keys == {"type", "text"}
            and part["type"] == "text"
            and isinstance(text, str)
            and num_bytes(text) is not None
        ):
            return
        is_typed = isinstance(part.get("media_type", ""), str)
        if kind in _MEDIA and keys - {"media_type"} == {"type", kind} and is_typed and isinstance(part[kind], bytes):
            return
    found = {key: type(value).__name__ for key, value in part.items()} if isinstance(part, Mapping) else part
    raise InvalidRequestError(
        "a part of a message's content is {type: text, text}, {type: image, image} or {type: audio, audio}, where image and "
        f"audio are the bytes of a file, got {shown(found)}",
        field="messages.content",
    )


def has_media(prompt: Prompt) -> bool:
    """Whether a prompt has messages with anything but text. It may be one that `PromptContent.read` refuses."""
    messages = prompt.messages if isinstance(prompt, Conversation) else prompt
    if isinstance(messages, str) or not isinstance(messages, list | tuple):
        return False
    contents = (message.get("content") for message in messages[:MAX_MESSAGES] if isinstance(message, Mapping))
    parts = (part for content in contents if isinstance(content, list | tuple) for part in content)
    return any(isinstance(part, Mapping) and part.get("type") != "text" for part in parts)


def _is_json(value: object) -> bool:
    try:
        return num_bytes(json.dumps(value, ensure_ascii=False, allow_nan=False)) is not None
    except (TypeError, ValueError, RecursionError):
        return False
