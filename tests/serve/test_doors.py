"""Whatever can be asked arrives in the engine, through every door: the service itself, the client over gRPC, the CLI.

Values are made from the table of sampling fields, so a new field is sent through every door without a change here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import math
from collections.abc import Mapping

import pytest
from helpers.callers import CALLER
from helpers.fake_backend import FakeBackend, make_engine
from helpers.servers import serving_http
from motet.cli import app
from motet.proto import inference_pb2
from motet.runtime.api.output import Output
from motet.runtime.api.request import Ensemble, FinishReason, GenerateRequest, Member, Request, Space
from motet.runtime.api.rules import Biases, Flag, Integer, Number, Strings, TokenIds
from motet.runtime.api.sampling import DEFAULTS, RULES, SamplingParams
from motet.runtime.api.structure import Structure
from motet.runtime.client.client import AsyncClient, Client
from motet.runtime.schedule.admission import choice_seed
from motet.runtime.serve.grpc.answers import model_from_proto, model_to_proto
from motet.runtime.serve.local import serve_engine
from motet.runtime.serve.service import Service
from typer.testing import CliRunner


def value_of(name):
    """A lawful value that is not the default. Numbers differ from field to field, so that a swap is seen."""
    rule, index = RULES[name], list(RULES).index(name)
    match rule:
        case Integer():
            return min(rule.high, max(rule.low, 40 - index))
        case Number():
            return (rule.low if math.isfinite(rule.low) else 0.0) + 1 / (2 + index)
        case Flag():
            return not DEFAULTS[name]
        case Strings():
            return ("first stop", "two\nlines, ünd=")
        case TokenIds():
            return (3, 5, 8)
        case Biases():
            return {7: -1.5, 11: 0.25}


VALUES = {name: value_of(name) for name in RULES}

# As context-aware decoding asks: the CLI can say it too.
VIEWS = GenerateRequest(
    prompt="a document\n\nhello",
    ensemble=Ensemble((Member("b", 1.25), Member("b", -0.25, view=1))),
    views=("hello",),
    sampling=SamplingParams(**VALUES),
    request_id="mine",
    time_limit_s=2.5,
    return_member_logprobs=True,
    allow_negative=True,
    return_confidence=True,
    abstain_below=0.25,
    priority=-3,
    cache_salt="pepper",
)
PROBS = GenerateRequest("hello", Ensemble((Member("a", 0.25, temperature=1.5), Member("c", 0.75)), Space.PROBS))
PLAIN = GenerateRequest("hello")
DRAFTED = GenerateRequest("hello", sampling=SamplingParams(seed=7, temperature=0.5, max_tokens=9), drafts=3)
STRUCTURES = [
    Structure.json_schema({"type": "object"}),
    Structure.json_object(),
    Structure.regex("[a-c]+"),
    Structure.grammar('start: "a"+'),
    Structure.choice(["yes", "nö\n"]),
]
ALONE = {
    "drafts",
    "structure",
    "embedded",
}  # others exclude them: see DRAFTED, STRUCTURES; of images: encoders/test_served.py
MADE_BY_THE_SERVICE = {"request_id", "owner"}  # no caller of a door sets them


def test_every_field_is_set():
    for name, value in VALUES.items():
        assert value != DEFAULTS[name], f"{name} has its default: nothing would be seen"
    for field in dataclasses.fields(GenerateRequest):
        if field.name in ALONE:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert getattr(VIEWS, field.name) != default, f"GenerateRequest.{field.name} has its default"


def test_no_field_of_the_wire_is_ignored():
    parts = (inference_pb2.Sampling, inference_pb2.Stopping)
    names = [field.name for part in parts for field in part.DESCRIPTOR.fields]
    assert sorted(names) == sorted(RULES)


@pytest.fixture(scope="module")
def engine(tokenizer):
    with make_engine(tokenizer, FakeBackend(vocab_size=259), max_num_seqs=64) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    with serve_engine(engine) as address:
        yield address


@pytest.fixture
def seen(engine, monkeypatch):
    """The requests that reach the engine; each is answered at once."""
    requests = []

    def submit(request, on_output, on_sent):
        requests.append(request)
        for choice in range(request.sampling.n):
            on_output(Output(request.request_id, choice, 1, text="done", finish_reason=FinishReason.STOP))
        on_sent()

    monkeypatch.setattr(engine, "submit", submit)
    return requests


def by_service(request, engine, _address, _path):
    async def run():
        return [output async for output in Service(engine).generate(request, CALLER)]

    return {output.request_id for output in asyncio.run(run())}


def options_of(request):
    """As keywords of the client: sampling fields one by one."""
    sampling = {name: getattr(request.sampling, name) for name in RULES}
    names = (
        "views",
        "request_id",
        "time_limit_s",
        "return_member_logprobs",
        "return_confidence",
        "abstain_below",
        "drafts",
        "priority",
        "cache_salt",
        "structure",
    )
    return {"mix": request.ensemble} | {name: getattr(request, name) for name in names} | sampling


def by_client(request, _engine, address, _path):
    with Client(address) as client:
        return {output.request_id for output in client.generate(request.prompt, **options_of(request))}


def by_client_complete(request, _engine, address, _path):
    with Client(address) as client:
        return {output.request_id for output in client.complete(request.prompt, **options_of(request))}


def by_async_client(request, _engine, address, _path):
    async def run():
        async with AsyncClient(address) as client:
            return [output async for output in client.generate(request.prompt, **options_of(request))]

    return {output.request_id for output in asyncio.run(run())}


def by_cli(request, _engine, address, path):
    arguments = ["generate", "hello", "--raw", "--address", address]
    if request.views:
        (path / "doc.txt").write_text("a document")
        member, without = request.ensemble.members
        arguments += ["--context", str(path / "doc.txt"), "--member", member.name, "--alpha", str(-without.mix)]
    elif request.ensemble is not None:
        mix = ",".join(f"{one.name}={one.mix!r}@{one.temperature!r}" for one in request.ensemble.members)
        arguments += ["--mix", mix, "--space", str(request.ensemble.space)]
    if request.request_id:
        arguments += ["--request-id", request.request_id]
    if request.time_limit_s is not None:
        arguments += ["--time-limit-s", repr(request.time_limit_s)]
    if request.return_member_logprobs:
        arguments += ["--member-logprobs"]
    if request.return_confidence:
        arguments += ["--confidence"]
    if request.abstain_below is not None:
        arguments += ["--abstain-below", repr(request.abstain_below)]
    for name in ("drafts", "priority", "cache_salt"):
        value = getattr(request, name)
        arguments += [f"--{name.replace('_', '-')}", str(value)] if value else []
    if request.structure is not None:
        arguments += cli_structure(request.structure, path)
    for name in RULES:
        arguments += cli_option(name, getattr(request.sampling, name))
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("done") == request.sampling.n, "every choice is printed"
    return {line[1:].split(":")[0] for line in result.stderr.splitlines()}


def cli_structure(structure, path):
    option = f"--{structure.kind.replace('_', '-')}"
    match structure.kind:
        case "json_object":
            return [option]
        case "choice":
            return [text for choice in json.loads(structure.spec) for text in (option, choice)]
        case "regex":
            return [option, structure.spec]
    (path / "structure").write_text(structure.spec)
    return [option, str(path / "structure")]


def cli_option(name, value):
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, Mapping):
        return [text for key, number in value.items() for text in (option, f"{key}={number!r}")]
    if isinstance(value, tuple):
        return [text for item in value for text in (option, str(item))]
    return [] if value is None else [option, repr(value)]


def by_http(request, engine, _address, _path):
    """As a completion, whose prompt is sent as it is."""
    body = {"prompt": request.prompt, "stream": True, "model": "fake"}
    for name in RULES:
        value = getattr(request.sampling, name)
        body[name] = {str(key): bias for key, bias in value.items()} if isinstance(value, Mapping) else value
    for field in dataclasses.fields(GenerateRequest):
        if field.name not in ("prompt", "ensemble", "views", "sampling", "allow_negative", "structure"):
            body[field.name] = getattr(request, field.name)
    if request.ensemble is not None:
        members = [
            {"name": member.name, "mix": member.mix, "temperature": member.temperature}
            | {"view": request.views[member.view - 1] if member.view else None}
            for member in request.ensemble.members
        ]
        space, is_negative = str(request.ensemble.space), request.allow_negative
        body["ensemble"] = {"members": members, "space": space, "allow_negative": is_negative}
    if request.structure is not None:
        kind, spec = str(request.structure.kind), request.structure.spec
        name = "json" if kind == "json_schema" else kind
        values = {"json_object": True, "choice": json.loads(spec) if kind == "choice" else None}
        body["structured_outputs"] = {name: values.get(kind) or spec}
    with serving_http(engine) as (http_address, _service):
        host, _, port = http_address.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        connection.close()
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    assert {choice["index"] for event in events for choice in event["choices"]} == set(range(request.sampling.n))
    return {event["id"].removeprefix("cmpl-") for event in events}


DOORS = [by_service, by_client, by_client_complete, by_async_client, by_cli, by_http]


@pytest.mark.parametrize("door", DOORS)
def test_every_field_arrives(door, engine, tokenizer, address, tmp_path, seen):
    ids = door(VIEWS, engine, address, tmp_path)
    expected = Request(
        request_id=seen[0].request_id,
        prompts=(tuple(tokenizer.encode(VIEWS.prompt)), tuple(tokenizer.encode("hello"))),
        ensemble=VIEWS.ensemble,
        sampling=VIEWS.sampling,
        time_limit_s=2.5,
        return_member_logprobs=True,
        return_confidence=True,
        abstain_below=0.25,
        priority=-3,
        cache_salt=seen[0].cache_salt,
    )
    for field in dataclasses.fields(Request):
        if field.name not in MADE_BY_THE_SERVICE | ALONE and field.default is not dataclasses.MISSING:
            assert getattr(expected, field.name) != field.default, f"Request.{field.name} crosses no door"
    assert seen == [expected]
    assert len(seen[0].cache_salt) == 16
    assert ids == {"mine"}
    assert seen[0].request_id != "mine"


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.kind)
@pytest.mark.parametrize("door", DOORS)
def test_a_structure_arrives(door, structure, engine, address, tmp_path, seen):
    door(GenerateRequest("hello", structure=structure), engine, address, tmp_path)
    assert [request.structure for request in seen] == [structure]


@pytest.mark.parametrize("door", DOORS)
def test_drafts_arrive(door, engine, address, tmp_path, seen):
    """One request per draft reaches the engine, each with a seed of its own; the client gets one answer."""
    ids = door(DRAFTED, engine, address, tmp_path)
    assert len(seen) == 3 and len(ids) == 1
    assert sorted(request.sampling.seed for request in seen) == sorted(choice_seed(7, index) for index in range(3))
    assert all(dataclasses.replace(r.sampling, seed=7) == DRAFTED.sampling and r.drafts == 0 for r in seen)


@pytest.mark.parametrize("door", DOORS)
def test_space_and_temperatures_arrive(door, engine, address, tmp_path, seen):
    door(PROBS, engine, address, tmp_path)
    assert [request.ensemble for request in seen] == [PROBS.ensemble]


def test_the_default_ensemble_is_told_with_its_temperatures(engine):
    model = dataclasses.replace(engine.model, default_ensemble=PROBS.ensemble)
    assert model_from_proto(model_to_proto(model)) == model


@pytest.mark.parametrize("door", [by_service, by_client, by_client_complete, by_async_client])
def test_what_is_not_asked_has_the_default(door, engine, address, tmp_path, seen):
    door(PLAIN, engine, address, tmp_path)
    assert [request.sampling for request in seen] == [SamplingParams()]
    assert [request.ensemble for request in seen] == [engine.model.default_ensemble]
    assert [request.time_limit_s for request in seen] == [None]


def test_what_the_cli_is_not_asked_has_the_default_or_its_own(address, seen):
    result = CliRunner().invoke(app, ["generate", "hello", "--raw", "--address", address], catch_exceptions=False)
    assert result.exit_code == 0
    own = {"max_tokens": 256, "temperature": 0.7, "top_p": 0.95}
    assert [request.sampling for request in seen] == [SamplingParams(**own)]


def test_the_chat_command_has_the_fields_of_one_answer(address, seen, tokenizer):
    arguments = [text for name in RULES if name not in ("n", "logprobs") for text in cli_option(name, VALUES[name])]
    result = CliRunner().invoke(app, ["chat", "--address", address, *arguments], input="hi\n\n", catch_exceptions=False)
    assert result.exit_code == 0, result.output
    expected = SamplingParams(**{name: value for name, value in VALUES.items() if name not in ("n", "logprobs")})
    assert [request.sampling for request in seen] == [expected]
    assert seen[0].prompts == (tuple(tokenizer.encode_chat([{"role": "user", "content": "hi"}])),)
