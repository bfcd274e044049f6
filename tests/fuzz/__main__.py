"""The fuzz as a program: prints what it did, and ends with 1 at the first answer that is wrong."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback

from helpers.sanitised import sanitised_environment

from .answers import Wrong
from .rounds import CASES, Tally, run_round

STRIDE = 10_000_000  # between the first rounds of two seeds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="A fuzz of the whole generate call.")
    parser.add_argument("--cases", type=int, default=2000, help=f"Requests, {CASES} of each random bundle.")
    parser.add_argument("--seed", type=int, default=0, help="Of the first round; each seed has rounds of its own.")
    parser.add_argument("--round", type=int, help="Run this round only: the number that a failure names.")
    parser.add_argument("--sanitised", action="store_true", help="Run on kernels built with sanitisers.")
    options = parser.parse_args()
    if options.sanitised:
        environment = sanitised_environment()
        if environment is None:
            parser.error("the compiler has no address sanitiser")
        rest = [argument for argument in sys.argv[1:] if argument != "--sanitised"]
        os.execve(sys.executable, [sys.executable, "-m", "fuzz", *rest], environment)
    first = options.seed * STRIDE
    rounds = range(first, first + -(-options.cases // CASES)) if options.round is None else [options.round]
    tally, start = Tally(), time.monotonic()
    for seed in rounds:
        print(f"round {seed}", end="\r", file=sys.stderr, flush=True)  # the last line, if the process dies
        try:
            run_round(seed, tally)
        except Wrong:
            traceback.print_exc()
            return 1
    seconds = time.monotonic() - start
    print(f"{tally} in {seconds:.1f} s, {tally.requests / seconds:.0f} requests/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
