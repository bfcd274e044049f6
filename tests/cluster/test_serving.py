"""Replicas on a Ray cluster of this machine behind one server: what clients see, also when a replica ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import pytest
from helpers.fake_backend import ask
from helpers.servers import until
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import FinishReason
from motet.runtime.client.client import Client
from motet.runtime.cluster.engine import ClusterEngine
from motet.runtime.cluster.replica import Replica, replicas_for
from motet.runtime.cluster.settings import ClusterSettings
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ContextLengthError, InvalidRequestError, UnavailableError
from motet.runtime.serve.local import serve_engine

pytestmark = pytest.mark.slow
CONFIG = EngineConfig(threads=1, max_num_seqs=4)
LONG = {"max_tokens": 200, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    tails = {"a": None, "b": None}
    return export_bundle(
        tiny_model_dir("llama"), tmp_path_factory.mktemp("ray") / "tiny", tails=tails, num_tail_layers=1
    )


@pytest.fixture(scope="module")
def served(bundle):
    """(engine, address)"""
    with ClusterEngine(bundle, CONFIG, ClusterSettings("local", 2)) as engine, serve_engine(engine) as address:
        yield engine, address


@pytest.fixture
def client(served):
    with Client(served[1]) as client:
        yield client


def replicas():
    found = subprocess.run(["pgrep", "-f", "ray::ServeReplica"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def tokens(outputs):
    return [token for output in outputs for token in output.token_ids]


def test_answers_are_those_of_an_engine_here(bundle, client):
    asked = {"max_tokens": 12, "temperature": 0.8, "seed": 3, "n": 2, "logprobs": 1, "mix": {"a": 0.25, "b": 0.75}}
    with Engine.from_bundle(bundle, CONFIG) as engine, serve_engine(engine) as address, Client(address) as alone:
        for prompt in ("one", "two and three", "four " * 30):
            expected = alone.complete(prompt, **asked)
            found = client.complete(prompt, **asked)
            assert [o.token_ids for o in found] == [o.token_ids for o in expected]
            assert [o.logprobs for o in found] == [o.logprobs for o in expected]
            streamed = list(client.generate(prompt, **asked))
            for choice in range(2):
                own = [o for o in streamed if o.choice == choice]
                assert tokens(own) == expected[choice].token_ids
                assert own[-1].usage.completion_tokens == expected[choice].usage.completion_tokens
        [vector], [other] = client.embed(["some text"]), alone.embed(["some text"])
        assert vector.tolist() == other.tolist() if hasattr(vector, "tolist") else vector == other


def test_refusals_have_their_class(client):
    with pytest.raises(InvalidRequestError, match="token id"):
        client.complete([1, 10**6], max_tokens=2)
    with pytest.raises(ContextLengthError):
        client.complete([1] * 5000, max_tokens=2)


def test_a_cancelled_stream_ends_at_its_replica(served, client):
    engine, _ = served
    stream = client.generate("x", **LONG)
    next(stream)
    stream.close()
    until(lambda: engine.is_idle)
    until(lambda: engine.stats().running == 0)


def test_what_is_aborted_before_it_begins_ends(served):
    engine, _ = served
    ended = []
    request = ask("early", (1, 2, 3), max_tokens=200)
    engine.submit(request, lambda output: ended.append(output) if output.finish_reason is not None else None)
    engine.abort("early")
    until(lambda: ended)
    assert ended[0].finish_reason is FinishReason.CANCELLED and len(ended) == 1
    engine.submit(request, lambda _output: None)
    with pytest.raises(InvalidRequestError, match="open already"):
        engine.submit(request, lambda _output: None)
    engine.abort("early")
    until(lambda: engine.is_idle)


def test_prompts_go_where_their_beginning_is(served, client):
    """Turns of several conversations: each finds all blocks of its earlier turns."""
    texts = {name: [ord(name)] * 80 for name in "abcdef"}
    cached = total = 0
    for turn in range(4):
        for name, text in texts.items():
            [answer] = client.complete(text, max_tokens=2, temperature=0.0, ignore_eos=True)
            if turn:
                cached += answer.usage.cached_tokens
                total += (len(text) - 40) // 32 * 32  # the earlier turn's full blocks
            texts[name] = [*text, *answer.token_ids, *[ord(name)] * 38]
    assert cached >= 0.95 * total


def test_a_replica_that_ends_breaks_its_streams_and_no_others(served, client):
    _, address = served
    until(lambda: len(replicas()) == 2)
    outcomes = []

    def open_stream(number):
        with Client(address) as own:
            try:
                outcomes.append(len(tokens(own.generate(f"text {number}", **LONG))))
            except UnavailableError as error:
                outcomes.append(error)

    threads = [threading.Thread(target=open_stream, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.15)
    os.kill(replicas()[0], signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    broken = [outcome for outcome in outcomes if isinstance(outcome, UnavailableError)]
    assert len(outcomes) == 8
    assert all("send the request again" in str(error) for error in broken)
    assert [outcome for outcome in outcomes if outcome not in broken] == [200] * (8 - len(broken))
    assert len(client.complete("again", **LONG)[0].token_ids) == 200
    until(lambda: len(replicas()) == 2, seconds=60)


def test_replicas_without_a_server_end(served, bundle):
    """As after a server that was killed."""
    from ray import serve

    name = "orphan"
    deployment = serve.deployment(Replica, name="engine", ray_actor_options={"num_cpus": 0})
    serve.run(deployment.bind(str(bundle), CONFIG, 2.0), name=name, route_prefix=None)
    assert name in serve.status().applications
    until(lambda: name not in serve.status().applications, seconds=40)


def test_how_many_replicas():
    assert replicas_for(0, 0, 4096, 16) == 1
    assert replicas_for(4097, 3, 4096, 16) == 2
    assert replicas_for(0, 33, 4096, 16) == 3
