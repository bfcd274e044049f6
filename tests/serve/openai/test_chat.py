"""`/v1/chat/completions` and `/v1/models`."""

from __future__ import annotations

import json
import math

import openai
import pytest
from helpers.fake_backend import FakeBackend
from helpers.openai_door import ASK, WEATHER, chat, streamed
from helpers.servers import serving_http
from helpers.structures import structure_engine
from motet.runtime.api.request import Ensemble, Member


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
    members[0]["temperature"] = 0.05
    tempered = Ensemble((Member("a", 0.25, temperature=0.05), Member("c", 0.75)))
    [other] = own.complete(ASK["messages"], mix=tempered, temperature=0.0, max_tokens=30)
    field = chat(client, extra_body={"ensemble": {"members": members}}).choices[0].message.content
    assert field == other.text != expected.text
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


def test_messages_as_harnesses_send_them(client):
    plain = chat(client).choices[0].message.content
    typed = chat(client, messages=[{"role": "user", "content": "hello", "type": "text"}])
    assert typed.choices[0].message.content == plain


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
