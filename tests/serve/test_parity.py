"""Every door is a translation of one service: the same requests have the same tokens, log-probabilities, ends and usage."""

from __future__ import annotations

import http.client
import json
import random
import re

import grpc
import pytest
from helpers.fake_backend import FakeBackend
from helpers.servers import serving
from helpers.structures import structure_engine
from motet.proto import grpc_predict_v2_pb2 as v2
from motet.proto import grpc_predict_v2_pb2_grpc
from motet.runtime.api.structure import Structure
from motet.runtime.client.client import Client
from motet.runtime.errors import InvalidRequestError
from motet.runtime.serve.grpc.vllm import vllm_engine_pb2, vllm_engine_pb2_grpc
from motet.runtime.serve.http.app import App
from motet.runtime.serve.http.server import HttpServer
from motet.runtime.trust.access import Access

COUNT = 60
WORDS = ("hello", "once upon a time", "{", "def f(x):", "the end.\n\n", "größe")
STRUCTURES = [None, None, Structure.regex("[a-f]{3,9}"), Structure.choice(["yes", "no"]), Structure.json_object()]
SAME = ("token_ids", "logprobs", "candidate_logprobs", "finish_reason", "prompt_tokens", "completion_tokens", "text")


def requests():
    """Request i: (prompt, sampling options, mix or None, structure or None)."""
    for index in range(COUNT):
        rng = random.Random(index)
        structure = rng.choice(STRUCTURES)
        options = {
            "max_tokens": rng.randint(1, 24),
            "temperature": rng.choice([0.0, 0.7, 1.3]),
            "seed": rng.randrange(2**31),
            "logprobs": rng.randint(0, 3),
            "logprob_token_ids": rng.choice([(), (258, 97, 0)]),
            "top_k": rng.choice([0, 5]),
            "top_p": rng.choice([1.0, 0.8]),
            "min_p": rng.choice([0.0, 0.05]),
            "frequency_penalty": rng.choice([0.0, 0.5]),
            "presence_penalty": rng.choice([0.0, -0.25]),
            "repetition_penalty": rng.choice([1.0, 1.125]),
            "n": rng.choice([1, 1, 2]),
            "ignore_eos": structure is None and rng.random() < 0.5,
            "logit_bias": rng.choice([{}, {70: 2.5, 90: -1.0}]),
            "skip_special_tokens": True,
        }
        mix = rng.choice([None, {"a": 1.0}, {"a": 0.25, "d": 0.75}])
        yield rng.choice(WORDS) * rng.randint(1, 3), options, mix, structure


@pytest.fixture(scope="module")
def doors(tokenizer):
    """(gRPC's address, HTTP's address, the tokenizer) of one server."""

    def prepare(server):
        server.http = HttpServer(App(server.service, Access.open_to_all()))

    backend = FakeBackend(600, vocab_size=259, num_members=4)
    with (
        structure_engine(tokenizer, backend, max_model_len=128) as engine,
        serving(engine, with_gateways=True, prepare=prepare) as running,
    ):
        running.start(running.server.http.start()).result(30)
        yield running.address, f"127.0.0.1:{running.server.http.port}", tokenizer
        running.start(running.server.http.stop()).result(30)


def name_of(mix):
    return "fake" if mix is None else "fake:" + ",".join(f"{member}={value}" for member, value in mix.items())


class Refused(Exception):
    """(HTTP status, message)"""


def by_own(doors, prompt, options, mix, structure):
    with Client(doors[0]) as client:
        answers = client.complete(prompt, mix=mix, structure=structure, **options)
    return [
        {
            "token_ids": one.token_ids,
            "logprobs": one.logprobs,
            "candidate_logprobs": [value for values in one.candidate_logprobs for value in values],
            "finish_reason": str(one.finish_reason),
            "prompt_tokens": one.usage.prompt_tokens,
            "completion_tokens": sum(other.usage.completion_tokens for other in answers),
            "text": one.text,
        }
        for one in answers
    ]


def options_but(options, *names):
    return {name: value for name, value in options.items() if name not in names}


def by_vllm(doors, prompt, options, mix, structure):
    options, constraint = options_but(options, "logprob_token_ids"), {}  # it has no field for them
    if structure is not None:
        values = {"choice": {"choices": json.loads(structure.spec)} if structure.kind == "choice" else None}
        constraint = {str(structure.kind): values.get(structure.kind) or structure.spec or True}
    params = vllm_engine_pb2.SamplingParams(**options, **constraint)
    with grpc.insecure_channel(doors[0]) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        asked = vllm_engine_pb2.GenerateRequest(text=prompt, sampling_params=params)
        found = [one.complete for one in stub.Generate(asked, metadata=[("motet-model", name_of(mix))])]
    found.sort(key=lambda one: one.index)
    return [
        {
            "token_ids": list(one.output_ids),
            "logprobs": list(one.output_logprobs.token_logprobs),
            "finish_reason": one.finish_reason,
            "prompt_tokens": one.prompt_tokens,
            "completion_tokens": sum(other.completion_tokens for other in found),
        }
        for one in found
    ]


def as_body(options, structure):
    body = options | {"logit_bias": {str(token): bias for token, bias in options["logit_bias"].items()}}
    if structure is not None:
        value = json.loads(structure.spec) if structure.kind == "choice" else structure.spec or True
        body["structured_outputs"] = {str(structure.kind): value}
    return body


def by_kserve(doors, prompt, options, mix, structure):
    options = options_but(options, "logprobs", "logprob_token_ids")  # there is no output for them
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [text.encode()]}}
        for name, text in (("text_input", prompt), ("sampling_parameters", json.dumps(as_body(options, structure))))
    ]
    with grpc.insecure_channel(doors[0]) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        found = stub.ModelInfer(v2.ModelInferRequest(model_name=name_of(mix), inputs=inputs))
    texts, reasons = (_strings(found.raw_output_contents[index]) for index in (0, 1))
    return [{"text": text, "finish_reason": reason} for text, reason in zip(texts, reasons, strict=True)]


def _strings(data):
    found = []
    while data:
        size = int.from_bytes(data[:4], "little")
        found.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    return found


def by_http(doors, prompt, options, mix, structure):
    host, _, port = doors[1].partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    body = as_body(options, structure) | {"prompt": prompt, "model": name_of(mix)}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise Refused(response.status, found["error"]["message"])
    return [
        {
            "logprobs": one["logprobs"]["token_logprobs"],
            "candidate_logprobs": [value for values in one.get("candidate_logprobs", ()) for value in values],
            "finish_reason": one["finish_reason"],
            "text": one["text"],
            "prompt_tokens": found["usage"]["prompt_tokens"],
            "completion_tokens": found["usage"]["completion_tokens"],
        }
        for one in found["choices"]
    ]


@pytest.mark.parametrize("door", [by_vllm, by_kserve, by_http])
def test_doors_agree(doors, door):
    reasons = set()
    for prompt, options, mix, structure in requests():
        expected = by_own(doors, prompt, options, mix, structure)
        found = door(doors, prompt, options, mix, structure)
        assert len(found) == len(expected)
        for one, other in zip(expected, found, strict=True):
            reasons.add(one["finish_reason"])
            for name in SAME:
                if name.endswith("logprobs") and name in other:
                    assert other[name] == pytest.approx(one[name], rel=1e-5)
                elif name in other:
                    assert other[name] == one[name], (name, prompt, options)
    assert reasons == {"stop", "length"}


# What is wrong → (prompt, options, mix, structure) of a request that has no other fault.
REFUSED = {
    "temperature": ("x", {"temperature": -0.5}, None, None),
    "temperature that is no number": ("x", {"temperature": float("nan")}, None, None),
    "top_p": ("x", {"top_p": 1.5}, None, None),
    "min_p": ("x", {"min_p": 2.0}, None, None),
    "frequency_penalty": ("x", {"frequency_penalty": float("inf")}, None, None),
    "presence_penalty": ("x", {"presence_penalty": float("-inf")}, None, None),
    "repetition_penalty": ("x", {"repetition_penalty": -1.0}, None, None),
    "max_tokens": ("x", {"max_tokens": 0}, None, None),
    "n": ("x", {"n": 10_000}, None, None),
    "logit_bias of a token that is none": ("x", {"logit_bias": {10_000: 1.0}}, None, None),
    "an empty prompt": ("", {}, None, None),
    "a prompt that is too long": ("hello " * 200, {}, None, None),
    "a member that is none": ("x", {}, {"z": 1.0}, None),
    "a mix that sums to two": ("x", {}, {"a": 1.0, "d": 1.0}, None),
    "a structure that cannot be read": ("x", {}, None, Structure.regex("(")),
    "a structure and ignore_eos": ("x", {"ignore_eos": True}, None, Structure.choice(["yes"])),
}
PLAIN = {"max_tokens": 4, "seed": 1, "logit_bias": {}, "temperature": 0.5}


def refusal(door, doors, case):
    """(is it the caller's fault, the message) of a door's refusal."""
    prompt, options, mix, structure = case
    try:
        door(doors, prompt, PLAIN | options, mix, structure)
    except Refused as refused:
        return refused.args[0] == 400, refused.args[1]
    except InvalidRequestError as error:
        return True, str(error)
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    return pytest.fail(f"{door.__name__} takes it")


@pytest.mark.parametrize("name", REFUSED)
def test_every_door_refuses_what_the_others_refuse(doors, name):
    found = {door.__name__: refusal(door, doors, REFUSED[name]) for door in (by_own, by_vllm, by_kserve, by_http)}
    assert all(is_fault for is_fault, _ in found.values()), found
    messages = [message for _, message in found.values() if "JSON" not in message]  # which has no NaN and no infinity
    words = [set(re.sub(r"\W+", " ", message).lower().split()) for message in messages]
    assert len(set.intersection(*words)) >= 2, f"they say something else: {found}"
