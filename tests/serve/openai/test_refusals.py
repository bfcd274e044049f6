"""What is refused says which field, and why."""

from __future__ import annotations

import openai
import pytest
from helpers.openai_door import TIME, chat

NAMED = {"type": "function", "function": {"name": "weather"}}
REFUSED = {
    "parallel calls without tools": ({"parallel_tool_calls": True}, "is for tools", "parallel_tool_calls"),
    "definitions that are none": (
        {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"$defs": []}}}], "tool_choice": "required"},
        "must be an object",
        "tools",
    ),
    "an unknown parameter": ({"extra_query": {"verbose": "1"}}, "parameter 'verbose' is unknown", "verbose"),
    "a wrong value": ({"temperature": -1}, "temperature must be", "temperature"),
    "a wrong type": ({"temperature": "hot"}, "temperature must be", "temperature"),
    "an unknown field": ({"extra_body": {"best": 1}}, "best is unknown", "best"),
    "an unknown field deep inside": (
        {"messages": [{"role": "user", "content": "x", "mood": 1}]},
        "mood is unknown",
        "messages[0].mood",
    ),
    "an unknown member": ({"extra_body": {"ensemble": {"members": [{"name": "z", "mix": 1}]}}}, "not a member", None),
    "no messages": ({"messages": []}, "empty", "messages"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "nothing is fetched",
        "messages.content",
    ),
    "tool_choice without tools": ({"tool_choice": "required"}, "there are none", "tool_choice"),
    "an unknown tool": ({"tools": [TIME], "tool_choice": NAMED}, "no tool here", "tool_choice"),
    "two forms": ({"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}}, "leave one", None),
    "top_logprobs alone": ({"top_logprobs": 2}, "needs logprobs", "top_logprobs"),
    "a schema that cannot be": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}},
        "cannot be used",
        "structure",
    ),
    "stored": ({"store": True}, "store", "store"),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, "for a stream", "stream_options"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context holds", "prompt"),
    "a negative mix": ({"model": "fake:a=1.5,b=-0.5"}, "allow_negative", "ensemble.members.mix"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(client, case):
    options, text, field = REFUSED[case]
    with pytest.raises(openai.BadRequestError, match=text) as refused:
        chat(client, **options)
    assert field is None or refused.value.param == field
    assert refused.value.type == "invalid_request_error"
