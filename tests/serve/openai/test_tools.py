"""Calls of tools: forced, by themselves, and their results."""

from __future__ import annotations

import json

import pytest
from helpers.openai_door import TIME, WEATHER, chat, streamed
from motet.runtime.text.tools import LLAMA, ToolReader

FORCED = [("required", [WEATHER]), ({"type": "function", "function": {"name": "weather"}}, [TIME, WEATHER])]


@pytest.mark.parametrize(("choice", "tools"), FORCED)
def test_a_forced_call(client, choice, tools):
    options = {"tools": tools, "tool_choice": choice, "max_completion_tokens": 300, "temperature": 1.0, "seed": 1}
    answer = chat(client, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    [call] = answer.message.tool_calls
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    chunks = [chunk.choices[0] for chunk in chat(client, stream=True, **options)]
    [streamed_call] = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert streamed_call.function == call.function.model_copy() or (
        streamed_call.function.arguments == call.function.arguments
    )
    assert chunks[-1].finish_reason == "tool_calls"
    assert not "".join(chunk.delta.content or "" for chunk in chunks)


def test_an_answer_that_calls_by_itself(client, tokenizer):
    """The model's own words, forced here by a grammar so that they are known: text, then two calls."""
    words = (
        'I look.<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>\n<tool_call>{"name": "time"}</tool_call>'
    )
    options = {
        "tools": [TIME, WEATHER],
        "extra_body": {"structured_outputs": {"choice": [words]}},
        "max_completion_tokens": 200,
    }
    answer = chat(client, **options).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("I look.", "tool_calls")
    assert [call.function.name for call in answer.message.tool_calls] == ["time", "time"]
    assert len(chat(client, parallel_tool_calls=False, **options).choices[0].message.tool_calls) == 1
    chunks = [chunk.choices[0] for chunk in chat(client, stream=True, **options)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "I look."
    assert [call.index for chunk in chunks for call in chunk.delta.tool_calls or []] == [0, 1]
    none = chat(client, tool_choice="none", **options).choices[0]
    assert (none.message.content, none.message.tool_calls, none.finish_reason) == (words, None, "stop")


WORDS = [
    '<tool_call>{"name": "rm"}</tool_call>',
    '<tool_call>{"name": ["time"]}</tool_call>',
    "<tool_call>[1]</tool_call>",
    "<tool_call>{oops",
    "a <b> <tool",
]


@pytest.mark.parametrize("words", WORDS)
def test_what_is_no_call_is_text(client, words):
    options = {"tools": [TIME], "extra_body": {"structured_outputs": {"choice": [words]}}, "max_completion_tokens": 99}
    answer = chat(client, **options).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (words, None, "stop")
    assert streamed(client, **options)[0] == {0: words}


def test_the_result_of_a_call_goes_into_the_prompt(client, own):
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "now?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    as_object = call | {"function": {"name": "time", "arguments": {"zone": "UTC"}}}
    same = [
        {"role": "system", "content": "be\nbrief"},
        messages[1],
        {"role": "assistant", "content": "", "tool_calls": [as_object]},
        messages[3],
    ]
    [expected] = own.complete(same, temperature=0.0, max_tokens=30)
    assert chat(client, messages=messages).choices[0].message.content == expected.text


@pytest.mark.parametrize("cuts", [1, 3, 100])
def test_a_format_without_marks_reads_the_same_in_pieces(cuts):
    """Llama's: the whole answer is a call, or none of it."""
    for text, calls in (
        ('{"name": "time", "parameters": {"a": 1}}', 1),
        ('Sure: {"name": "time", "parameters": {}}', 0),
    ):
        reader = ToolReader(LLAMA, frozenset({"time"}))
        out = "".join(reader.push(text[at : at + cuts]) for at in range(0, len(text), cuts))
        rest, found = reader.finish()
        assert len(found) == calls
        assert out + rest == ("" if calls else text)
