"""Chaos: random requests to a running server, beside cancels, killed connections, aborts, deadlines, slow readers, failed
steps, faults of the engine's loop and preemptions. Every answer that ends well is the one that a solo run gives, nobody waits
for ever, and in the end nothing is held.

    python -m fuzz.soak --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import Counter
from contextlib import suppress

import grpc
from helpers.fake_backend import FakeBackend, make_engine
from helpers.models import write_tokenizer
from helpers.servers import serving
from motet.runtime import errors
from motet.runtime.api.request import FinishReason
from motet.runtime.client.client import Client
from motet.runtime.schedule.scheduler import Scheduler
from motet.runtime.trust.access import Access
from motet.runtime.trust.identity import Identity, Role

_TENANTS = 3
_CLIENTS = 12


class ByPeer(Access):
    """Callers are tenants by chance, so that queue, quotas and prefixes of several are used."""

    def __init__(self, seed):
        super().__init__(anonymous=Identity("", "anonymous", frozenset(Role)))
        self._rng = random.Random(seed)

    def identify(self, authorization):
        roles = frozenset({Role.BATCH} if self._rng.random() < 0.2 else Role)
        return Identity(f"t{self._rng.randrange(_TENANTS)}", "key:1", roles)


def soak(tokenizer, seconds, seed):
    """How often calls ended how. Raises `AssertionError`."""
    requests = [
        {
            "prompt": f"{'shared ' * (index % 4)}prompt {index}",
            "max_tokens": 5 + 7 * index % 60,
            "seed": index,
            "temperature": 0.8,
        }
        for index in range(24)
    ]
    with (
        make_engine(tokenizer, FakeBackend(num_blocks=64)) as alone,
        serving(alone) as running,
        Client(running.address) as client,
    ):
        expected = [client.complete(ignore_eos=True, **request)[0].token_ids for request in requests]
    backend = FakeBackend(num_blocks=40)  # too few for all: groups are preempted
    rng, ends, stop = random.Random(seed), Counter(), threading.Event()
    wrong: list[BaseException] = []  # what a client's thread ended with
    faults = random.Random(seed + 1)

    def on_step(_batch):
        time.sleep(0.0005)
        if faults.random() < 0.002:
            backend.fail_next = True

    backend.on_step = on_step
    schedule = Scheduler.schedule

    def sometimes_broken(self):
        if faults.random() < 0.0001:
            raise RuntimeError("a fault of ours")
        return schedule(self)

    with make_engine(tokenizer, backend, max_num_seqs=8, max_waiting=24) as engine:
        engine._restarts = _Never()  # a soak has more faults than three per minute
        options = {"service": {"send_timeout_s": 10.0}, "drain_timeout_s": 10}
        with serving(engine, ByPeer(seed), **options) as running:
            Scheduler.schedule = sometimes_broken
            try:

                def run(client_seed):
                    try:
                        _client(running.address, requests, expected, client_seed, stop, ends)
                    except BaseException as error:
                        wrong.append(error)
                        stop.set()

                clients = [threading.Thread(target=run, args=(rng.random(),)) for _ in range(_CLIENTS)]
                for client in clients:
                    client.start()
                stop.wait(seconds)
            finally:
                stop.set()
                Scheduler.schedule = schedule
                for client in clients:
                    client.join(60)
            assert not any(client.is_alive() for client in clients), "a client waits for ever"
            if wrong:
                raise wrong[0]
            deadline = time.monotonic() + 10
            while not (engine.is_idle and engine.stats().free_blocks == 40 and running.service._quotas.num_open == 0):
                assert time.monotonic() < deadline, f"something is held: {engine.stats()}"
                time.sleep(0.01)
            ends["restarts"], ends["preemptions"] = engine.stats().restarts, engine.stats().preemptions
    return ends


class _Never(list):
    """No restart is one too many."""

    def append(self, _when):
        pass


def _client(address, requests, expected, seed, stop, ends):
    rng = random.Random(seed)
    while not stop.is_set():
        with Client(address) as client:
            for _ in range(rng.randint(1, 20)):
                index = rng.randrange(len(requests))
                ends[_one(client, requests[index], expected[index], rng)] += 1
                if stop.is_set():
                    return
            # The connection goes with what is open on it: a client that is killed.
            for _ in range(rng.randrange(3)):
                _begin(client, requests[0])
            ends["connection closed"] += 1


def _begin(client, request):
    """Begin an answer and leave it."""
    with suppress(errors.MotetError):  # it may be refused, as any other
        next(client.generate(ignore_eos=True, **request))


def _one(client, request, expected, rng):
    way = rng.choice(("read", "read", "read", "leave", "abort", "deadline", "slow", "limit"))
    options = {"timeout_s": rng.uniform(0.001, 0.1)} if way == "deadline" else {"timeout_s": 60}
    if way == "limit":
        options["time_limit_s"] = rng.uniform(0.001, 0.2)
    if way == "abort":
        options["request_id"] = f"mine-{rng.random()}"
    tokens, reason = [], None
    try:
        for delta in client.generate(ignore_eos=True, **request, **options):
            tokens += delta.token_ids
            reason = delta.finish_reason
            if way == "leave" and len(tokens) > 2:
                return "left"
            if way == "slow":
                time.sleep(rng.uniform(0, 0.02))
            if way == "abort" and len(tokens) > 2:
                client.abort(options["request_id"])
    except errors.OverloadedError as error:
        time.sleep(min(error.retry_after_s, 0.05))
        return "overloaded"
    except errors.MotetError as error:
        text = str(error)
        allowed = (
            "internal error",
            "the backend failed",
            "DEADLINE_EXCEEDED",
            "shutting down",
            "out of service",
            "broke",
        )
        assert any(part in text for part in allowed), text
        return "error"
    except grpc.RpcError as error:
        return str(error.code())
    assert tokens == expected[: len(tokens)], "an answer is wrong"
    if reason is FinishReason.LENGTH:
        assert tokens == expected, "an answer is cut"
    return str(reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import logging
    import tempfile
    from pathlib import Path

    from motet.runtime.text.tokenizer import Tokenizer

    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        print(dict(soak(Tokenizer.from_dir(Path(directory)), arguments.seconds, arguments.seed)))


if __name__ == "__main__":
    main()
