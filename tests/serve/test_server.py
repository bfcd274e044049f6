"""The gRPC server over a real bundle of a tiny model: streams, cancellation, deadlines, typed errors, health."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from grpc_status import rpc_status
from helpers.servers import serving
from motet.export.bundle_writer import export_bundle
from motet.proto import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from motet.runtime import errors
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, FinishReason, Member, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.client.client import Client
from motet.runtime.engine.engine import Engine
from motet.runtime.serve.grpc.server import Server
from motet.runtime.serve.grpc.statuses import error_of
from motet.runtime.serve.grpc.wire import request_to_proto
from motet.runtime.serve.local import serve_engine
from motet.runtime.serve.service import Service
from motet.runtime.trust.access import Access

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "tiny"
    export_bundle(tiny_model_dir("llama"), path, tails={"a": None, "b": None}, num_tail_layers=1)
    with Engine.from_bundle(path, EngineConfig(max_num_seqs=4, max_model_len=480, threads=2)) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    with serve_engine(engine) as address:
        yield address


@pytest.fixture
def client(address):
    with Client(address) as client:
        yield client


def wait_until_free(engine):
    deadline = time.monotonic() + 10
    while engine.stats().free_blocks < engine.stats().num_blocks:
        assert time.monotonic() < deadline, "blocks were not freed"
        time.sleep(0.01)


def test_stream_is_the_whole(client):
    deltas = list(client.generate("Once upon", max_tokens=20, logprobs=2, seed=3, **GREEDY))
    whole = client.complete("Once upon", max_tokens=20, logprobs=2, seed=3, **GREEDY)[0]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [t for delta in deltas for t in delta.token_ids] == whole.token_ids
    assert (whole.finish_reason, whole.seed, len(whole.logprobs)) == (FinishReason.LENGTH, 3, 20)
    assert whole.usage.completion_tokens == 20
    assert whole.top_logprobs[0][0][0] == whole.token_ids[0]
    assert whole.timings.decode_s > 0


def test_concurrent_requests_with_different_mixes(client):
    mixes = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 0.2, "b": 0.8}]
    results = {}

    def run(index):
        results[index] = client.complete("x" * (index + 3), mix=mixes[index], max_tokens=24, **GREEDY)[0].token_ids

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, mix in enumerate(mixes):  # the members are identical here, so every mix is the plain model
        assert (
            results[index] == client.complete("x" * (index + 3), mix={"a": 1.0}, max_tokens=24, **GREEDY)[0].token_ids
        ), mix


def test_leaving_a_stream_frees_its_blocks(client, engine):
    for delta in client.generate("abc", max_tokens=400, **GREEDY):
        assert delta.token_ids
        break
    wait_until_free(engine)


def test_equal_request_ids_do_not_meet(address, engine):
    """Two clients that chose one id: cancelling the first leaves the second alone."""
    message = request_to_proto("abc", sampling=SamplingParams(max_tokens=200, **GREEDY), request_id="same")
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        first, second = stub.Generate(message), stub.Generate(message)
        next(iter(first))
        first.cancel()
        responses = list(second)
    assert sum(len(response.token_ids) for response in responses) == 200
    assert {response.request_id for response in responses} == {"same"}
    wait_until_free(engine)


def test_deadline_and_time_limit(client, engine):
    with pytest.raises(errors.MotetError, match="DEADLINE_EXCEEDED"):
        list(client.generate("abc", max_tokens=470, timeout_s=0.05, **GREEDY))
    wait_until_free(engine)
    limited = client.complete("abc", max_tokens=470, time_limit_s=0.05, **GREEDY)[0]
    assert limited.finish_reason is FinishReason.TIME_LIMIT
    assert limited.token_ids


def test_member_logprobs_and_views(client):
    ensemble = Ensemble((Member("a", 1.5), Member("a", -0.5, view=1)))
    result = client.complete(
        "with context", mix=ensemble, views=["without"], max_tokens=4, return_member_logprobs=True, **GREEDY
    )[0]
    assert [len(values) for values in result.member_logprobs] == [2] * 4


def test_chat_and_tokenize(client):
    ids = client.tokenize([{"role": "user", "content": "hi"}])
    result = client.complete([{"role": "user", "content": "hi"}], max_tokens=3, **GREEDY)[0]
    assert result.usage.prompt_tokens == len(ids)
    assert client.detokenize(ids) == "user\nhi\nassistant\n"
    assert (
        client.detokenize(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(errors.InvalidRequestError, match=r"every id in token_ids must be an integer in 0…319, got 320"):
        client.detokenize([5, 320])
    with pytest.raises(errors.InvalidRequestError, match="481 token ids; at most 480"):
        client.detokenize([5] * 481)
    with pytest.raises(errors.InvalidRequestError, match="token_ids must be a list of integers"):
        client.detokenize("text")


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "message"),
    [
        ("x", {"mix": {"nobody": 1.0}}, errors.InvalidEnsembleError, "its members are"),
        ("x" * 500, {}, errors.ContextLengthError, "500 tokens"),
        ("", {}, errors.InvalidRequestError, "prompt is empty"),
        ([9999], {}, errors.InvalidRequestError, "token id 9999"),
    ],
)
def test_the_server_refuses(client, prompt, arguments, error, message):
    with pytest.raises(error, match=message):
        client.complete(prompt, max_tokens=4, **arguments)


def raw(address, change):
    """Send a message that the client class would refuse itself; the status code and details that come back."""
    message = request_to_proto("x", sampling=SamplingParams(max_tokens=4))
    change(message)
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            inference_pb2_grpc.InferenceStub(channel).Complete(message)
        return caught.value.code(), caught.value.details()


def negative_in_probs(message):
    message.ensemble.space = inference_pb2.PROBS
    message.ensemble.allow_negative = True
    message.ensemble.members.add(name="a", mix=1.5)
    message.ensemble.members.add(name="b", mix=-0.5)


def negative_not_allowed(message):
    negative_in_probs(message)
    message.ensemble.space = inference_pb2.LOGITS
    message.ensemble.allow_negative = False


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (lambda m: m.ensemble.members.add(name="a", mix=0.9), grpc.StatusCode.INVALID_ARGUMENT, "sums to 0.9"),
        (negative_in_probs, grpc.StatusCode.INVALID_ARGUMENT, "need space LOGITS"),
        (negative_not_allowed, grpc.StatusCode.INVALID_ARGUMENT, "allow_negative"),
        (lambda m: setattr(m.sampling, "temperature", float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (lambda m: m.stopping.stop.extend(["x"] * 100_000), grpc.StatusCode.INVALID_ARGUMENT, "100000 stop strings"),
        (lambda m: m.prompt.Clear(), grpc.StatusCode.INVALID_ARGUMENT, "prompt is empty"),
    ],
)
def test_statuses_of_bad_messages(address, client, change, code, text):
    found, details = raw(address, change)
    assert found is code
    assert text in details
    assert len(client.complete("still here", max_tokens=2, **GREEDY)[0].token_ids) == 2


def test_overload_comes_with_a_delay(address, client, engine):
    """256 choices may wait; five times 64 are too many."""
    message = request_to_proto("x", sampling=SamplingParams(max_tokens=400, n=64, **GREEDY))
    with grpc.insecure_channel(address) as channel:
        calls = [inference_pb2_grpc.InferenceStub(channel).Complete.future(message) for _ in range(6)]
        until = time.monotonic() + 20
        while not (failed := [call for call in calls if call.done() and call.exception()]):
            assert time.monotonic() < until, "none of the calls is refused"
            time.sleep(0.01)  # any of them may be the one that comes too late
        refused = failed[0]
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error_of(refused), errors.OverloadedError)
        assert "RetryInfo" in str(rpc_status.from_call(refused).details)
        for call in calls:
            call.cancel()
    wait_until_free(engine)


def test_health_and_models(client):
    assert client.is_serving()
    assert client.models()[0].members == ("a", "b")


def test_port_in_use(engine, address):
    import asyncio

    with pytest.raises(errors.UnavailableError, match="cannot listen"):
        asyncio.run(Server(Service(engine), Access.open_to_all(), port=int(address.rsplit(":", 1)[1])).start())


def test_nobody_there():
    with Client("127.0.0.1:1") as client, pytest.raises(errors.UnavailableError, match="motet serve"):
        client.complete("x")


def test_client_checks_before_it_sends(client):
    with pytest.raises(errors.InvalidRequestError, match="stop strings"):
        client.complete("x", stop=("x",) * 100_000)
    with pytest.raises(errors.InvalidEnsembleError, match="sums to"):
        client.complete("x", mix={"a": 0.4}, space=Space.PROBS)


def test_the_load_of_a_server(engine):
    with (
        serving(engine) as running,
        Client(running.address) as client,
        grpc.insecure_channel(running.address) as channel,
    ):
        before = engine.stats()
        client.complete("hello", max_tokens=5, temperature=0.0, ignore_eos=True)
        found = admin_pb2_grpc.AdminStub(channel).GetLoad(admin_pb2.GetLoadRequest())
        assert (found.running, found.max_running, found.is_leaving) == (0, engine.config.max_num_seqs, False)
        assert (found.num_blocks, found.tokens - before.tokens) == (before.num_blocks, 5)
