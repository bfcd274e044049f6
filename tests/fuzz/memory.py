"""Memory of a server under many short calls, refused ones and cancelled ones: it must not grow.

    python -m fuzz.memory --rounds 10000

A round is a call and a refusal; every fifth has a stream that is cancelled. In the second half of the rounds, the largest
resident size may be at most 10 MB above the mean. Then the same with a planted leak of 4 kB per call, which must be found.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import grpc
from helpers.fake_backend import make_engine
from helpers.models import write_tokenizer
from helpers.servers import is_free, serving, until
from motet.proto import inference_pb2, inference_pb2_grpc
from motet.runtime.serve.audited import AuditSink
from motet.runtime.serve.calls import CallLog
from motet.runtime.serve.metrics import CallMetrics, engine_registry
from motet.runtime.text.tokenizer import Tokenizer
from motet.runtime.trust.audit.writer import AuditLog

LIMIT_MB = 10
_CANCEL_EVERY = 5
_SAMPLE_EVERY = 20


class Leak:
    """Keeps so many bytes of each call, as a fault of ours would."""

    def __init__(self, size):
        self.kept, self._size = [], size

    def check(self):
        """It takes everything."""

    def on_begin(self, call):
        """It keeps what has ended."""

    def on_call(self, call):
        self.kept.append(bytearray(self._size))

    def on_refusal(self, method, peer, error, who):
        self.kept.append(bytearray(self._size))


def message(max_tokens=2, text="hello", n=1):
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text=text),
        sampling=inference_pb2.Sampling(temperature=0.0, n=n),
        stopping=inference_pb2.Stopping(max_tokens=max_tokens, ignore_eos=True),
    )


REFUSED = (message(n=1 << 20), message(text="x" * 5000), message(max_tokens=-1))


def excess(engine, rounds, **service):
    """Megabytes by which the largest resident size in the second half exceeds the mean there. `service`: options of `Service`."""
    sizes, backend = [], engine._backend
    backend.on_step = lambda _batch: backend.batches.clear()  # which the fake one keeps for tests
    with serving(engine, service=service) as running, grpc.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for index in range(rounds):
            if index % _SAMPLE_EVERY == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                sizes.append(pages * resource.getpagesize() / 1e6)
            stub.Complete(message())
            with suppress(grpc.RpcError):
                stub.Complete(REFUSED[index % len(REFUSED)])
                raise AssertionError("it was not refused")
            if index % _CANCEL_EVERY == 0:
                call = stub.Generate(message(60))
                next(iter(call))
                call.cancel()
        until(lambda: is_free(engine, running.service))
    half = sizes[len(sizes) // 2 :]
    return max(half) - sum(half) / len(half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_dir(Path(folder))
        for leak, what in ((None, "no leak"), (Leak(4096), "a planted leak")):
            with make_engine(tokenizer) as engine, AuditLog(Path(folder) / f"audit-{what}") as audit:
                sinks = [CallLog(), CallMetrics(engine_registry(engine)), AuditSink(audit, "")]
                started = time.monotonic()
                found = excess(engine, rounds, sinks=[*sinks, *([leak] if leak is not None else [])])
            calls = f"{rounds} calls, {rounds} refused, {-(-rounds // _CANCEL_EVERY)} cancelled"
            print(f"{what}: {calls}: {found:.1f} MB above the mean, {time.monotonic() - started:.0f} s", flush=True)
            assert (found > LIMIT_MB) == (leak is not None), f"{what}: the limit is {LIMIT_MB} MB"


if __name__ == "__main__":
    main()
