"""`ChatTemplate`: a model's chat template, rendered as transformers' `apply_chat_template` renders it, in a sandbox.

The environment is that of transformers: `{% generation %}`, loop controls, `raise_exception`, `strftime_now`, `tojson`
without HTML escapes, no tools and no documents. The template comes from the model's files, never from a request, but
those files are not trusted either: a template cannot reach Python's internals, loop without end, or multiply a text beyond
measure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from types import FrameType
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import BundleError, InvalidRequestError

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "motet asks how a content is written"
_MOST = 5_000_000  # lines that one rendering may run, and the size of a product
_SHOWN = 300  # characters of a template's own error that a message shows


class _Sandbox(ImmutableSandboxedEnvironment):
    """Products are bounded too."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if isinstance(v, str | list | tuple) else abs(v) for v in (left, right)]
        if (sizes[0] * sizes[1] if operator == "*" else sizes[0] ** min(sizes[1], 64)) > _MOST:
            raise jinja2.TemplateError(f"the template computes more than {_MOST} with {operator}")
        return super().call_binop(context, operator, left, right)


@contextmanager
def _bounded() -> Iterator[None]:
    """Count the lines that templates run in this thread, and end one that runs too many."""
    left, before = _MOST, sys.gettrace()

    def on_line(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 and event == "line":
            raise jinja2.TemplateError(f"the template runs more than {_MOST} lines; it loops")
        return on_line

    def on_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        return on_line if frame.f_code.co_filename == "<template>" else None

    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


class ChatTemplate:
    """A compiled template. Raises `BundleError` if it has a syntax error."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._special_tokens = dict(special_tokens)
        self._written: dict[str, str] = {}  # for a part of a kind
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise BundleError(
                f"the model's chat template has an error: {error}; mend chat_template.jinja and export the model again"
            ) from error
        literals = [node.data for node in tree.find_all(nodes.TemplateData)]
        literals += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self._literals = "\0".join(literals)
        self._names = meta.find_undeclared_variables(tree)

    @cached_property
    def _takes(self) -> tuple[bool, bool]:
        """Whether a message's content may be a text, and whether it may be a list of parts: found by trying. A template that can
        do nothing with either way takes texts."""
        found = []
        for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
            try:
                text = self.render([{"role": "user", "content": content}])
            except InvalidRequestError:
                text = ""
            found.append(
                _PROBE in text and not any(key in text for key in ("'text'", '"text"'))
            )  # a list, written as it is
        return found[0] or not found[1], found[1]

    def shaped(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message with the content, a text or parts, in the form that the template takes. Parts of text alone become one
        text if it takes texts, joined as it would write them: many templates write a list as it is in all but a user's
        message. Those that it cannot take at all are joined by line breaks. Raises `InvalidRequestError` for parts that no
        text can stand for."""
        content = message["content"]
        takes_text, takes_parts = self._takes
        if isinstance(content, str):
            return message if takes_text else {**message, "content": [{"type": "text", "text": content}]}
        is_text = all(part["type"] == "text" for part in content)
        if takes_parts and not (is_text and takes_text):
            shown = [{k: v for k, v in part.items() if k in ("type", "text")} for part in content]
            return {**message, "content": shown}
        if not is_text:
            raise InvalidRequestError("the model's chat template has no place for media", field="messages.content")
        return {**message, "content": ("" if takes_parts else "\n").join(part["text"] for part in content)}

    def has_place(self, medium: str, placeholders: Collection[str]) -> bool:
        """Whether the template itself writes one of these for a part of this kind: found by trying."""
        if medium not in self._written:
            parts = [{"type": medium}, {"type": "text", "text": _PROBE}]
            try:
                self._written[medium] = self.render([{"role": "user", "content": parts}]) if self._takes[1] else ""
            except InvalidRequestError:
                self._written[medium] = ""
        return any(placeholder in self._written[medium] for placeholder in placeholders)

    def mentions(self, text: str) -> bool:
        """Whether the template itself may write `text`."""
        return text in self._literals

    def reads(self, name: str) -> bool:
        """Whether the template looks at what it is given under this name."""
        return name in self._names

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as text. With `continue_final_message` it ends where the last message's content ends. Raises
        `InvalidRequestError` with the template's own words if it refuses the conversation or fails on it."""
        if continue_final_message:
            opened, content = _opened(messages)
            head, tag, rest = self.render(opened, False, tools).rpartition(_TAG.strip())
            if not tag or content.strip() not in head:
                raise InvalidRequestError("the chat template changes the message to continue", field="messages")
            # The tag's own space is gone if the template trims what a message ends with.
            return head if rest.startswith(" ") else head.rstrip()
        try:
            with _bounded():
                return self._template.render(
                    messages=[dict(message) for message in messages],
                    tools=[dict(tool) for tool in tools] or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
        except Exception as error:  # a template may do anything that the sandbox allows, such as adding text to None
            raise InvalidRequestError(
                f"the chat template refuses this conversation: {str(error)[:_SHOWN]}", field="messages"
            ) from error


def _opened(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The messages with a tag behind the last one's text, and that text."""
    last = messages[-1]
    if isinstance(content := last["content"], str):
        return [*messages[:-1], {**last, "content": content + _TAG}], content
    if not content or content[-1]["type"] != "text":
        raise InvalidRequestError("a message that is continued must end with text", field="messages.content")
    text: str = content[-1]["text"]
    return [*messages[:-1], {**last, "content": [*content[:-1], {"type": "text", "text": text + _TAG}]}], text


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training. Rendering leaves them as they are."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
