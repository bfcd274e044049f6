"""OpenAI's own client, unchanged, against the HTTP door."""

from __future__ import annotations

import json
import math

import numpy as np
import openai
import pytest
from helpers.fake_backend import FakeBackend
from helpers.models import write_tokenizer
from helpers.servers import serving_http
from helpers.structures import structure_engine
from motet.runtime.client.client import Client
from motet.runtime.serve.local import serve_engine
from motet.runtime.text.tokenizer import Tokenizer
from motet.runtime.text.tools import LLAMA, ToolReader

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} answer in <tool_call>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
GREEDY = {"temperature": 0.0, "max_completion_tokens": 30}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 99}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "time", "parameters": {"type": "object", "additionalProperties": False}},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools")
    write_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.from_dir(path)


@pytest.fixture(scope="module")
def engine(tokenizer):
    with structure_engine(tokenizer) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    with serving_http(engine) as (address, _service):
        yield openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def own(engine):
    with serve_engine(engine) as address, Client(address) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(**(ASK | GREEDY | options))


def streamed(client, **options):
    """(text of each choice, finish reasons, usage) of a stream."""
    texts, reasons, usage = {}, {}, None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


def test_chat_is_the_own_clients_answer(client, own):
    [expected] = own.complete(ASK["messages"], temperature=0.0, max_tokens=30)
    answer = chat(client)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == str(expected.finish_reason)
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens > 0, "its prompt was asked before"
    texts, reasons, usage = streamed(client)
    assert texts == {0: expected.text}
    assert reasons == {0: "length"}
    assert usage.completion_tokens == 30


def test_choices_seeds_and_stops(client, own, tokenizer):
    letters = {tokenizer.token_id(letter): 50 for letter in "abcdefghij"}
    options = {"temperature": 1.0, "seed": 7, "n": 3, "logit_bias": letters}
    expected = own.complete(ASK["messages"], max_tokens=30, **options)
    options["logit_bias"] = {str(token): bias for token, bias in letters.items()}
    answer = chat(client, **options)
    assert [choice.message.content for choice in answer.choices] == [one.text for one in expected]
    assert streamed(client, **options)[0] == {one.choice: one.text for one in expected}
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in expected)
    stop = expected[0].text[4:6]
    cut = chat(client, **options, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (expected[0].text.partition(stop)[0], "stop")
    assert chat(client, seed=-5).choices[0].message.content == chat(client, seed=-5).choices[0].message.content


def test_logprobs(client, own, tokenizer):
    [expected] = own.complete(ASK["messages"], temperature=0.0, max_tokens=30, logprobs=3)
    found = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [one.logprob for one in found] == pytest.approx(expected.logprobs)
    assert [bytes(one.bytes) for one in found] == [tokenizer.token_bytes(token) for token in expected.token_ids]
    assert [len(one.top_logprobs) for one in found] == [3] * 30
    together = [
        one
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        for one in chunk.choices[0].logprobs.content
    ]
    assert together == found


def test_penalties_and_biases_arrive(client, own, tokenizer):
    token = tokenizer.token_id("x")
    answer = chat(client, logit_bias={str(token): 100}, max_completion_tokens=5)
    assert answer.choices[0].message.content == "xxxxx"
    options = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "top_p": 0.7, "temperature": 0.8, "seed": 3}
    [expected] = own.complete(ASK["messages"], max_tokens=30, top_k=9, **options)
    assert chat(client, extra_body={"top_k": 9}, **options).choices[0].message.content == expected.text


def test_json_schema_and_json_object(client):
    schema = WEATHER["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": schema}}
    found = json.loads(chat(client, response_format=form, max_completion_tokens=200).choices[0].message.content)
    assert set(found) == {"city", "days"}
    text, _, _ = streamed(client, response_format=form, max_completion_tokens=200)
    assert json.loads(text[0]) == found
    assert chat(client, response_format={"type": "json_object"}).choices[0].message.content.startswith("{")
    regex = {"structured_outputs": {"regex": "[ab]{4}"}}
    assert len(chat(client, extra_body=regex).choices[0].message.content) == 4


def test_an_ensemble_by_field_and_by_name(client, own):
    mix = {"a": 0.25, "c": 0.75}
    [expected] = own.complete(ASK["messages"], mix=mix, temperature=0.0, max_tokens=30)
    named = chat(client, model="fake:a=0.25,c=0.75").choices[0].message.content
    members = [{"name": name, "mix": value} for name, value in mix.items()]
    field = chat(client, extra_body={"ensemble": {"members": members}}).choices[0].message.content
    assert named == field == expected.text
    [alone] = own.complete(ASK["messages"], mix={"b": 1.0}, temperature=0.0, max_tokens=30)
    assert chat(client, model="fake:b").choices[0].message.content == alone.text
    ids = [model.id for model in client.models.list()]
    assert ids == ["fake", "fake:a", "fake:b", "fake:c", "fake:d"]
    assert client.models.retrieve("fake:b").ensemble["members"] == [{"name": "b", "mix": 1.0}]
    with pytest.raises(openai.BadRequestError, match="sums to"):
        chat(client, model="fake:a=0.5")
    with pytest.raises(openai.NotFoundError, match="not a member"):
        client.models.retrieve("fake:z")
    with pytest.raises(openai.NotFoundError, match="serves 'fake'"):
        chat(client, model="gpt-4")


# ---- tools -----------------------------------------------------------------------------------------------------------

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


def test_messages_as_harnesses_send_them(client):
    plain = chat(client).choices[0].message.content
    typed = chat(client, messages=[{"role": "user", "content": "hello", "type": "text"}])
    assert typed.choices[0].message.content == plain


def test_documents(client, own):
    """Routes that OpenAI's API has not: by its client's own means."""
    body = {"text": "fine", "labels": ["yes", "no"], "model": "fake:a"}
    found = client.post("/classify", body=body, cast_to=object)
    assert sum(one["probability"] for one in found["labels"]) == pytest.approx(1)
    assert found["label"] == max(found["labels"], key=lambda one: one["logprob"])["label"]
    negative = {"members": [{"name": "a", "mix": 1.5}, {"name": "b", "mix": -0.5}]}
    for path, more in (("/classify", {}), ("/summarise", {"labels": None})):
        asked = {key: value for key, value in (body | more | {"model": "fake", "ensemble": negative}).items() if value}
        with pytest.raises(openai.BadRequestError, match="allow_negative"):
            client.post(path, body=asked, cast_to=object)
        asked["ensemble"] = negative | {"allow_negative": True}
        if path == "/summarise":
            asked |= {"max_summary_tokens": 5, "instruction": "short: ", "title": True}
        assert client.post(path, body=asked, cast_to=object)
    text = "many words that go on. " * 40
    for method in ("map_reduce", "refine"):
        options = {"method": method, "max_summary_tokens": 20, "chunk_tokens": 400, "instruction": "short: "}
        found = client.post("/summarise", body={"text": text, **options}, cast_to=object)
        assert found["chunks"] >= 3
        assert found["usage"]["completion_tokens"] <= 20 * found["chunks"]


# ---- completions, embeddings, responses ------------------------------------------------------------------------------


def test_completions(client, own):
    [expected] = own.complete("one two", temperature=0.0, max_tokens=12, logprobs=2)
    options = {"model": "fake", "temperature": 0.0, "max_tokens": 12}
    answer = client.completions.create(prompt=["one two", "other"], logprobs=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(expected.logprobs)
    ids = own.tokenize("one two")
    assert client.completions.create(prompt=ids, **options).choices[0].text == expected.text
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(prompt=["one two", ids], stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: expected.text, 1: expected.text}


def test_echo_scores_the_prompt(client, own):
    """As evaluation harnesses ask."""
    [expected] = own.complete("some words", temperature=0.0, max_tokens=1, prompt_logprobs=1, logprobs=1)
    options = {"model": "fake", "prompt": "some words", "temperature": 0.0, "echo": True, "logprobs": 1}
    for max_tokens, more in ((1, expected.logprobs), (0, [])):
        choice = client.completions.create(max_tokens=max_tokens, **options).choices[0]
        found = choice.logprobs
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx([*expected.prompt_logprobs, *more])
        assert choice.text == "some words" + (expected.text if max_tokens else "")
        assert found.top_logprobs[0] is None
        assert "".join(found.tokens).startswith("some words")
        assert len(found.text_offset) == len(found.tokens)


def test_embeddings(client, own):
    texts = ["a text", "another, longer text"]
    answer = client.embeddings.create(model="fake", input=texts)
    expected = np.array(own.embed(texts))
    np.testing.assert_allclose([one.embedding for one in answer.data], expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    assert answer.usage.prompt_tokens == sum(len(own.tokenize(text)) for text in texts)
    as_floats = client.embeddings.create(model="fake", input=texts[0], encoding_format="float").data[0].embedding
    np.testing.assert_allclose(as_floats, expected[0], atol=1e-6)
    alone = client.embeddings.create(model="fake:b", input=own.tokenize(texts[0])).data[0].embedding
    np.testing.assert_allclose(alone, own.embed(texts[:1], mix={"b": 1.0})[0], atol=1e-6)
    assert not np.allclose(alone, expected[0])
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="fake", input="x", dimensions=7)
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.embeddings.create(model="fake", input=[])


def test_responses(client, own):
    [expected] = own.complete(
        [{"role": "system", "content": "be brief"}, *ASK["messages"]], temperature=0.0, max_tokens=30
    )
    options = {"model": "fake", "instructions": "be brief", "input": "hello", "temperature": 0.0}
    answer = client.responses.create(max_output_tokens=30, **options)
    assert answer.output_text == expected.text
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 30
    events = list(client.responses.create(max_output_tokens=30, stream=True, **options))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected.text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == expected.text
    schema = WEATHER["function"]["parameters"]
    form = {"format": {"type": "json_schema", "name": "w", "schema": schema, "strict": True}}
    found = client.responses.create(text=form, max_output_tokens=300, **options)
    assert (set(json.loads(found.output_text)), found.status) == ({"city", "days"}, "completed")


def test_responses_call_tools(client):
    tool = {"type": "function", **WEATHER["function"], "strict": True}
    options = {"model": "fake", "tools": [tool], "tool_choice": "required", "max_output_tokens": 300}
    history = [{"role": "user", "content": [{"type": "input_text", "text": "weather?"}]}]
    answer = client.responses.create(input=history, temperature=1.0, extra_body={"seed": 4}, **options)
    [call] = answer.output
    assert (call.type, call.name, set(json.loads(call.arguments))) == ("function_call", "weather", {"city", "days"})
    events = list(
        client.responses.create(input=history, temperature=1.0, extra_body={"seed": 4}, stream=True, **options)
    )
    assert [event.arguments for event in events if event.type == "response.function_call_arguments.done"] == [
        call.arguments
    ]
    history += [*answer.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    assert client.responses.create(input=history, model="fake", max_output_tokens=5).output_text


# ---- refusals --------------------------------------------------------------------------------------------------------

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
        "unknown",
        None,
    ),
    "tool_choice without tools": ({"tool_choice": "required"}, "there are none", "tool_choice"),
    "an unknown tool": ({"tools": [TIME], "tool_choice": FORCED[1][0]}, "no tool here", "tool_choice"),
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


def test_an_error_in_a_stream_ends_it(tokenizer):
    backend = FakeBackend(1200, vocab_size=259, num_members=4)
    with structure_engine(tokenizer, backend) as engine, serving_http(engine) as (address, _service):
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        stream = chat(client, stream=True, max_completion_tokens=500)
        next(iter(stream))
        backend.fail_next = True
        with pytest.raises(openai.APIError, match="backend failed"):
            list(stream)
        assert chat(client).choices[0].finish_reason == "length"


def test_no_number_is_infinite(client):
    """JSON has no infinity, and a forbidden token's log-probability is one."""
    found = chat(client, logprobs=True, top_logprobs=20).choices[0].logprobs.content
    assert all(math.isfinite(one.logprob) for token in found for one in token.top_logprobs)
