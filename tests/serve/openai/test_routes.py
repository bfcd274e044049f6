"""Completions, embeddings, responses, documents."""

from __future__ import annotations

import json

import numpy as np
import openai
import pytest
from helpers.openai_door import ASK, WEATHER


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
    assert len(client.embeddings.create(model="fake", input="x", dimensions=4).data[0].embedding) == 4
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
    asked = {"extra_body": {"logprob_token_ids": [97, 98], "return_member_logprobs": True}, "max_output_tokens": 30}
    whole = client.responses.create(**asked, **options)
    *_, last = client.responses.create(stream=True, **asked, **options)
    for name in ("candidate_logprobs", "member_logprobs"):
        assert getattr(last.response, name) == getattr(whole, name)
        assert len(getattr(whole, name)) == 30
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
