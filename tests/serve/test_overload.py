"""More than the server can take: it refuses at once, says when to come back, loses nothing, and does not grow."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from fuzz.memory import LIMIT_MB, Leak, excess
from helpers.fake_backend import FakeBackend, make_engine
from helpers.servers import is_free, serving, until
from motet.proto import inference_pb2, inference_pb2_grpc
from motet.runtime.serve.grpc.statuses import error_of


def message(max_tokens=60, **fields):
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text="hello"),
        sampling=inference_pb2.Sampling(temperature=0.0),
        stopping=inference_pb2.Stopping(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


def test_overload_three_times(tokenizer):
    """8 run and 8 wait; 64 are sent. 48 are refused at once, with a delay; 16 end as they should. No place is lost."""
    backend = FakeBackend(num_blocks=256)
    with make_engine(tokenizer, backend, max_num_seqs=8, max_waiting=8) as engine, serving(engine) as running:
        answers = set()
        for _wave in range(3):
            held, go = threading.Event(), threading.Event()

            def hold_eight(_batch, held=held, go=go):
                time.sleep(0.001)
                if engine.stats().running == 8 and not go.is_set():
                    held.set()
                    assert go.wait(20)

            backend.on_step = hold_eight
            with grpc.insecure_channel(running.address) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                calls = [stub.Complete.future(message(80)) for _ in range(8)]
                assert held.wait(10)
                started = time.monotonic()
                calls += [stub.Complete.future(message(80)) for _ in range(56)]
                until(lambda calls=calls: sum(call.done() for call in calls) == 48)
                assert time.monotonic() - started < 48 * 0.05
                refused = [call for call in calls if call.done()]
                assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
                delays = [error_of(call.exception()).retry_after_s for call in refused]
                assert min(delays) > 0
                go.set()
                answers |= {tuple(call.result().choices[0].token_ids) for call in calls if call not in refused}
            until(lambda: is_free(engine, running.service))
        assert len(answers) == 1


@pytest.mark.slow
def test_memory_does_not_grow(engine):
    assert excess(engine, 1500) < LIMIT_MB


@pytest.mark.slow
def test_a_leak_would_be_seen(engine):
    assert excess(engine, 400, sinks=[Leak(100_000)]) > LIMIT_MB
