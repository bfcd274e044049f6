"""The small form of the fuzz: 200 requests under sanitisers. `make fuzz` runs the whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.sanitised import ROOT, sanitised_environment

CASES = 200


@pytest.mark.slow
@pytest.mark.native
def test_answers_are_the_oracles():
    """No wrong address, no undefined operation, no token or log-probability that the oracle does not give."""
    environment = sanitised_environment()
    if environment is None:
        pytest.skip("the compiler has no address sanitiser")
    half = CASES // 2
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "fuzz", "--cases", str(half), "--seed", str(seed)],
            cwd=ROOT / "tests",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in range(2)
    ]
    printed = [run.communicate()[0] for run in runs]
    for run, text in zip(runs, printed, strict=True):
        assert run.returncode == 0, text[-8000:]
        assert "Tally(requests=" in text
