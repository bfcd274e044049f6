"""More than the server can take: it refuses at once, says when to come back, loses nothing, and does not grow."""

from __future__ import annotations

import resource
import threading
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
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


class Leak:
    """Keeps something of each call, as a fault of ours would."""

    def __init__(self):
        self.kept = []

    def check(self):
        """It takes everything."""

    def on_call(self, call):
        self.kept.append(bytearray(40_000))

    def on_refusal(self, method, peer, error):
        self.kept.append(bytearray(40_000))


def growth(engine, rounds, **service):
    """Megabytes by which the peak of the second half of many calls, refused ones and cancelled ones exceeds the first's."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    with serving(engine, service=service) as running, grpc.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        def half():
            peak = 0.0
            for index in range(rounds):
                peak = max(peak, resident()) if index % 20 == 0 else peak
                stub.Complete(message(2))
                with suppress(grpc.RpcError):
                    stub.Complete(message(drafts=1))
                if index % 5 == 0:
                    call = stub.Generate(message(60))
                    next(iter(call))
                    call.cancel()
            return peak

        first, second = half(), half()
        until(lambda: is_free(engine, running.service))
        return second - first


@pytest.mark.slow
def test_memory_does_not_grow(engine):
    assert growth(engine, 1500) < 10


@pytest.mark.slow
def test_a_leak_would_be_seen(engine):
    assert growth(engine, 400, sinks=[Leak()]) > 10
