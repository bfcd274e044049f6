"""The client: errors come back as they were raised, and an option that would have no effect is refused."""

from __future__ import annotations

import asyncio
import inspect
import time

import grpc
import numpy as np
import pytest
from helpers.fake_backend import hold_first_step
from motet.proto import inference_pb2, inference_pb2_grpc
from motet.runtime import errors
from motet.runtime.api.prompt import Conversation
from motet.runtime.api.request import Ensemble, Member, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import AsyncClient, Client
from motet.runtime.serve.grpc.statuses import _CODES, error_of
from motet.runtime.serve.grpc.wire import prompt_from_proto, prompt_to_proto, request_to_proto

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.MotetError)]
SHORT = {"max_tokens": 4, "temperature": 0.0}


@pytest.fixture
def client(address):
    with Client(address) as client:
        yield client


@pytest.mark.parametrize("call", ["generate", "complete"])
def test_every_class_crosses_with_its_details(client, engine, monkeypatch, call):
    for cls in CLASSES:
        details = {}
        if issubclass(cls, errors.InvalidRequestError):
            details["field"] = "ensemble.members.mix"
        if issubclass(cls, errors.OverloadedError):
            details["retry_after_s"] = 2.5

        def refuse(_request, *_told, cls=cls, details=details):
            raise cls("what, limit, value", **details)

        monkeypatch.setattr(engine, "submit", refuse)
        with pytest.raises(errors.MotetError, match="what, limit, value") as caught:
            list(getattr(client, call)("x", **SHORT))
        assert type(caught.value) is cls
        assert str(caught.value) == "what, limit, value"
        for name, value in details.items():
            assert getattr(caught.value, name) == value


def test_classes_with_a_status_of_their_own():
    """What a caller would do differently has another status."""
    assert _CODES[errors.UnimplementedError] is grpc.StatusCode.UNIMPLEMENTED
    assert sum(code is grpc.StatusCode.UNIMPLEMENTED for code in _CODES.values()) == 1
    assert sum(code is grpc.StatusCode.UNAVAILABLE for code in _CODES.values()) == 1


def test_a_field_is_named_to_the_client(client):
    with pytest.raises(errors.InvalidEnsembleError) as caught:
        client.complete("x", mix={"nobody": 1.0})
    assert caught.value.field == "ensemble.members.name"


def test_a_method_that_is_not_offered(address):
    with grpc.insecure_channel(address) as channel:
        unknown = channel.unary_unary("/motet.v1.Inference/Nothing")
        with pytest.raises(grpc.RpcError) as caught:
            unknown(b"")
        assert type(error_of(caught.value)) is errors.UnimplementedError


@pytest.mark.parametrize(
    ("options", "message", "field"),
    [
        ({"temprature": 0.5}, "unknown option 'temprature'; known are .*'temperature'", "temprature"),
        ({"sampling": SamplingParams(), "top_k": 3}, r"\['top_k'\] beside it", "sampling"),
        ({"space": Space.PROBS}, "space is of a mix", "ensemble.space"),
        ({"space": "probs", "mix": Ensemble((Member("a", 1.0),))}, "space of the Ensemble", "ensemble.space"),
        ({"space": "sums", "mix": {"a": 1.0}}, r"one of \['logits', 'probs'\], got 'sums'", "ensemble.space"),
        ({"mix": [("a", 1.0)]}, "a mapping of member names", "ensemble"),
        ({"mix": {"a": "1"}}, "the mix of member 'a' must be a number in .*, got '1'", "ensemble.members.mix"),
        ({"mix": {3: 1.0}}, "name must be text of 1 to 256 bytes of UTF-8, got 3", "ensemble.members.name"),
        ({"views": ["x"]}, "no member sees view 1", "ensemble.members.view"),
        ({"views": "x"}, "a list with one prompt per view", "views"),
        ({"mix": Ensemble((Member("a", 1.0, view=1),))}, "asks for view 1; the request has 1", "ensemble.members.view"),
        ({"time_limit_s": 0}, "time_limit_s must be a finite number above 0, got 0", "time_limit_s"),
        ({"request_id": None}, "request_id must be text", "request_id"),
        ({"return_member_logprobs": 1}, "return_member_logprobs must be true or false", "return_member_logprobs"),
        ({"n": None}, "n must be an integer in 1…64, got None", "n"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["generate", "complete"])
def test_refused_before_anything_is_sent(call, options, message, field):
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequestError, match=message) as caught:
        getattr(client, call)("x", **options)
    assert caught.value.field == field


@pytest.mark.parametrize("prompt", [None, 3, b"text", ["text"], [1, {"role": "user", "content": "x"}], [2**40], [-1]])
def test_prompts_that_are_none(prompt):
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequestError):
        client.generate(prompt)


def test_numpy_values(client):
    numbers = {"max_tokens": np.int32(4), "temperature": np.float32(0.0), "seed": np.uint64(2**63)}
    result = client.complete(list(np.array([65, 66, 67])), mix={"a": np.float64(1.0)}, **numbers)[0]
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.seed) == (3, 4, 2**63)


def test_one_stop_string(client, engine, monkeypatch):
    seen, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda request, *told: (seen.append(request), submit(request, *told)))
    client.complete("x", stop="ab", **SHORT)
    assert seen[0].sampling.stop == ("ab",)


def test_an_ensemble_without_members_is_refused(address):
    """The message of another client: a space, and nothing to mix there."""
    message = request_to_proto("x", sampling=SamplingParams(max_tokens=4))
    message.ensemble.space = inference_pb2.PROBS
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceStub(channel).Complete(message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "1 to 64 members, got 0" in caught.value.details()


def test_a_space_that_the_server_does_not_know_is_refused(address):
    message = request_to_proto("x", ensemble=Ensemble((Member("a", 1.0),)))
    message.ensemble.space = 9
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceStub(channel).Complete(message)
    assert "space must be one of" in caught.value.details()


def test_models_are_whole(client, engine):
    assert client.models() == [engine.model]


def test_drain(client, engine, backend):
    """Health turns NOT_SERVING, new requests are refused, and what is here runs to its end."""
    held, go = hold_first_step(backend)
    deltas = client.generate("abc", max_tokens=20, temperature=0.0, ignore_eos=True)
    assert held.wait(timeout=10)
    client.drain()
    deadline = time.monotonic() + 10
    while client.is_serving():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(errors.UnavailableError, match="shutting down"):
        client.complete("x", **SHORT)
    go.set()
    assert sum(len(delta.token_ids) for delta in deltas) == 20


def test_the_async_client_has_the_same_methods():
    def methods(cls):
        return {name: str(inspect.signature(f)).split(" -> ")[0] for name, f in vars(cls).items() if name[0] != "_"}

    assert methods(AsyncClient) == methods(Client)


def test_the_async_client_answers_the_same(address, client, engine):
    async def ask():
        async with AsyncClient(address) as other:
            assert await other.is_serving()
            assert await other.models() == [engine.model]
            assert await other.tokenize("abc") == client.tokenize("abc")
            with pytest.raises(errors.InvalidEnsembleError):
                await other.complete("x", mix={"nobody": 1.0})
            with pytest.raises(errors.InvalidRequestError):
                await other.tokenize("")
            choices = await other.complete("abc", n=3, max_tokens=4, seed=7)
            await other.drain()
            while await other.is_serving():
                await asyncio.sleep(0.01)
            return choices

    expected = client.complete("abc", n=3, max_tokens=4, seed=7)
    choices = asyncio.run(ask())
    assert [(c.choice, c.token_ids, c.text, c.seed) for c in choices] == [
        (c.choice, c.token_ids, c.text, c.seed) for c in expected
    ]


def test_the_async_client_without_a_server():
    async def ask():
        async with AsyncClient("127.0.0.1:1") as other:
            with pytest.raises(errors.UnavailableError):
                await other.models()
            return await other.is_serving(timeout_s=0.1)

    assert asyncio.run(ask()) is False


TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(
    "prompt",
    [
        Conversation([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], (), True),
        Conversation(
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "é", "function": {"arguments": {"x": [1, None]}}}],
                },
                {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "é"},
            ],
            TOOLS,
        ),
    ],
)
def test_conversations_cross_the_wire_whole(prompt):
    found = prompt_from_proto(prompt_to_proto(prompt))
    assert found == prompt


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, r"got \['content', 'mood', 'role'\]"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": "f"}]},
            "tool_calls must be a list of JSON objects",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"f": {1, 2}}]}]}, "tool_calls must be a list"),
        ({"messages": [{"role": "tool", "content": "x", "name": 3}]}, "a message's name must be text, got 3"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [], "tools": [3]}, "a tool is a JSON object, got 3"),
        ({"messages": [], "tools": [{"x": float("nan")}]}, "a tool is a JSON object"),
        ({"messages": [], "continue_final_message": 1}, "continue_final_message must be true or false, got 1"),
    ],
)
def test_conversations_that_are_none(values, words):
    with pytest.raises(errors.InvalidRequestError, match=words):
        Conversation(**values)


@pytest.mark.parametrize("field", ["tools", "tool_calls"])
def test_a_field_that_is_not_json(field):
    message = prompt_to_proto([{"role": "user", "content": "x"}])
    for text, words in (
        ("{", f"{field} is not JSON"),
        ("{}", f"{field} must be a JSON array"),
        ("[" * 99999, "is not JSON"),
    ):
        setattr(message.messages if field == "tools" else message.messages.messages[0], field, text)
        with pytest.raises(errors.InvalidRequestError, match=words):
            prompt_from_proto(message)
