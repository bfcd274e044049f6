"""One runtime in its own process, driven by JSON lines on stdin and stdout.

It runs as a script, possibly under an interpreter that has the peers but not Motet. So it imports only `runtimes.py` from its
own folder, and `motet` only to measure Motet.

The first line in is {"runtime", "variant", "threads", "lengths": {number of sequences: most tokens of each}, "paths": {…}};
the answer is {"version"} or {"error"}. Then come calls. Each generates greedily for all its prompts at once:

    in   {"prompts": [[token id, …], …], "steps", "chunks"}
    out  {"seconds"}            until every sequence has its first token
    in   {"go"}                                 } `chunks` times: one unmeasured step, because other runtimes ran
    out  {"seconds", "tokens", "cpu_seconds"}   } meanwhile and took the caches; then `steps` measured steps
    out  {"sequence": [token id, …]}            the tokens of the first sequence, at the end

With "score" in the first line a call is {"token_ids", "out"}; the answer is {"scored"}, and the .npy file `out` then has
the logits [tokens, vocab].

Between its chunks a generation waits for the next line. So runtimes can take turns without computing their prompts again.
`Pacer` does the waiting: every runtime notes each token there as it comes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

Answer = Callable[[dict[str, Any]], None]
UNMEASURED = 1  # steps at the start of a chunk

# As a script, this file is in no package, and its folder is on sys.path.
runtimes = import_module(".runtimes" if __package__ else "runtimes", __package__)


class Pacer:
    """Measures a generation of `sequences` sequences, and makes it wait between chunks.

    The sequence that starts last sets the pace. When it has its first token, all others run, and they must run until it
    has `last_token` tokens. They are ahead of it, so a runtime generates `new_tokens` for each sequence, which is more.
    """

    def __init__(self, sequences: int, steps: int, chunks: int, answer: Answer, wait: Callable[[], object]) -> None:
        self.last_token = 1 + chunks * (UNMEASURED + steps)
        self.new_tokens = self.last_token + (2 * sequences if chunks and sequences > 1 else 0)
        self._counts = [0] * sequences
        self._missing = set(range(sequences))
        self._pace = 0
        self._steps = steps
        self._answer = answer
        self._wait = wait
        self._noted = 0
        self._start = time.perf_counter()
        self._cpu_start = time.process_time()

    @property
    def sequences(self) -> int:
        return len(self._counts)

    def step(self) -> None:
        """Note one more token of every sequence."""
        for sequence in range(self.sequences):
            self.note(sequence)

    def note(self, sequence: int) -> None:
        """Note one more token of a sequence. May wait."""
        self._counts[sequence] += 1
        self._noted += 1
        if self._missing:
            self._missing.discard(sequence)
            if not self._missing:
                self._pace = sequence
                self._counts[sequence] = 1
                self._answer({"seconds": time.perf_counter() - self._start})
                self._hold()
        elif sequence == self._pace and self._counts[sequence] <= self.last_token:
            self._advance((self._counts[sequence] - 1) % (UNMEASURED + self._steps))

    def _advance(self, place: int) -> None:
        if place == UNMEASURED:
            self._noted = 0
            self._start, self._cpu_start = time.perf_counter(), time.process_time()
        elif place == 0:
            seconds, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu_start
            self._answer({"seconds": seconds, "tokens": self._noted, "cpu_seconds": cpu})
            self._hold()

    def _hold(self) -> None:
        if self._counts[self._pace] < self.last_token:
            self._wait()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # a runtime's own prints must not mix with the answers
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])  # a hard limit
    try:
        serve = _scorer(job, answer) if job.get("score") else _generator(job, answer)
    except ModuleNotFoundError as error:
        answer({"error": f"not installed ({error.name})"})
        return
    except Exception as error:  # reported, so that the other runtimes can be measured
        answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        return
    for line in iter(sys.stdin.readline, ""):
        try:
            serve(json.loads(line))
        except Exception as error:  # as above
            answer({"error": f"{type(error).__name__}: {error}"})


def _generator(job: dict[str, Any], answer: Answer) -> Callable[[dict[str, Any]], None]:
    version, generate = runtimes.RUNTIMES[job["runtime"]](job)
    answer({"version": version})

    def serve(call: dict[str, Any]) -> None:
        pacer = Pacer(len(call["prompts"]), call["steps"], call["chunks"], answer, sys.stdin.readline)
        tokens = generate(call["prompts"], pacer)[: pacer.last_token]
        answer({"sequence": [int(token) for token in tokens]})

    return serve


def _scorer(job: dict[str, Any], answer: Answer) -> Callable[[dict[str, Any]], None]:
    import numpy as np

    version, score = runtimes.SCORERS[job["runtime"]](job)
    answer({"version": version})

    def serve(call: dict[str, Any]) -> None:
        np.save(call["out"], score(call["token_ids"]))
        answer({"scored": len(call["token_ids"])})

    return serve


if __name__ == "__main__":
    main()
