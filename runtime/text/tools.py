"""Calls of tools in an answer: how a model writes them, how to force it, and how to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..api.structure import Structure
from ..errors import InvalidRequestError, shown
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A call is {"name": …, `arguments`: …} between `begin` and `end`. Without `begin`, the whole answer is a call."""

    begin: str
    end: str
    arguments: str = "arguments"


HERMES = ToolFormat("<tool_call>", "</tool_call>")  # Qwen, SmolLM3, Hermes
LLAMA = ToolFormat("", "", "parameters")  # Llama 3


def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """The one that the model's chat template shows to the model."""
    return LLAMA if tokenizer.template_mentions('"parameters": ') else HERMES


def check_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name → JSON schema of the parameters, of OpenAI's list of tools. Raises `InvalidRequestError`."""
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function") if tool.get("type", "function") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        parameters = function.get("parameters", {"type": "object"}) if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or not isinstance(parameters, dict) or name in found:
            raise InvalidRequestError(
                "a tool is {type: function, function: {name, description, parameters}}, its name is given once, and its "
                f"parameters are a JSON schema; got {shown(tool)}",
                field="tools",
            )
        found[name] = parameters
    return found


def forced_call(tools: Mapping[str, dict[str, Any]], format: ToolFormat) -> Structure:
    """The answer is one call of one of these tools, with arguments of its schema."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, format.arguments: _without_definitions(parameters)},
            "required": ["name", format.arguments],
            "additionalProperties": False,
        }
        for name, parameters in tools.items()
    ]
    definitions: dict[str, Any] = {}
    for parameters in tools.values():
        for key in ("$defs", "definitions"):
            own = parameters.get(key, {})
            if not isinstance(own, dict):
                raise InvalidRequestError(f"{key} of a tool's parameters must be an object", field="tools")
            for name, schema in own.items():
                if definitions.setdefault(key, {}).setdefault(name, schema) != schema:
                    raise InvalidRequestError(
                        f"two tools define {key}/{name} differently; rename one of them", field="tools"
                    )
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = json.dumps({"anyOf": calls, **definitions, "x-guidance": options}, ensure_ascii=False)
    if not format.begin:
        return Structure.json_schema(schema)
    begin, end = json.dumps(f"{format.begin}\n"), json.dumps(f"\n{format.end}")
    return Structure.grammar(f"start: {begin} call {end}\ncall: %json {schema}")


def _without_definitions(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in ("$defs", "definitions", "$schema")}


@dataclass(slots=True)
class ToolReader:
    """Reads an answer that may call tools, piece by piece. Text before a call comes out at once."""

    format: ToolFormat
    names: frozenset[str]
    _held: str = field(default="")  # of what may be a call
    _is_text: bool = field(default=False)  # without `begin`: the answer began with something else than a call

    def push(self, text: str) -> str:
        """The text that is certainly no call."""
        self._held += text
        if not self.format.begin:
            if not self._is_text and self._held.lstrip()[:1] in ("{", ""):
                return ""
            self._is_text = True
            at = len(self._held)
        else:
            at = self._held.find(self.format.begin)
            if at < 0:
                at = len(self._held) - _overlap(self._held, self.format.begin)
        text, self._held = self._held[:at], self._held[at:]
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest: text, and calls. What is no call of a known tool is text."""
        held, self._held = self._held, ""
        if not self.format.begin:
            call = self._call(held)
            return ("", [call]) if call is not None else (held, [])
        text, calls = "", []
        while held:
            before, begin, rest = held.partition(self.format.begin)
            text += before
            if not begin:
                break
            inside, _, held = rest.partition(self.format.end)
            call = self._call(inside)
            if call is None:
                text += begin + rest
                break
            calls.append(call)
        return (text.strip() if calls else text), calls

    def _call(self, text: str) -> ToolCall | None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(name, str) or name not in self.names:
            return None
        arguments = found.get(self.format.arguments, found.get("arguments", {}))
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, begin: str) -> int:
    """How many of the last characters of `text` may be the first ones of `begin`."""
    return next((size for size in range(min(len(text), len(begin) - 1), 0, -1) if text.endswith(begin[:size])), 0)
