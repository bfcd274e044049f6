"""Faults of the torch backend: one bad request ends alone, and a missing package is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the torch backend runs on torch")

from helpers.torch_backend import MIX, PROMPTS, ask, complete_with, ensemble, options, run  # noqa: E402
from motet.runtime.errors import NumericalError  # noqa: E402


@pytest.mark.parametrize("fault", ["block", "slot"])
def test_an_out_of_range_block_table_ends_its_request_alone(torch_bundles, fault):
    requests = ask(PROMPTS, [ensemble(**MIX)] * 3, 6)
    expected = run(torch_bundles / "tails-32", options(), requests)

    def spoil(backend, batch):
        for seq in range(batch.num_seqs):
            if batch.block_tables[seq, 0] == 0 and batch.samples:  # the first request's
                if fault == "block":
                    batch.block_tables[seq, 0] = backend.num_blocks + 5
                else:
                    batch.slot_mapping[batch.cu_seqlens_q[seq]] = -3

    ends = complete_with(torch_bundles / "tails-32", spoil, requests)
    tokens, error = ends["0"]
    assert tokens == []
    assert isinstance(error, NumericalError)
    assert ("not in 0…" if fault == "block" else "out of range") in str(error)
    assert [ends[name][0] for name in ("1", "2")] == [tokens for tokens, _ in expected[1:]]


def test_nan_ends_its_request_alone(torch_bundles):
    requests = ask(PROMPTS, [ensemble(**MIX)] * 3, 6)
    expected = run(torch_bundles / "tails-32", options(), requests)

    def spoil(backend, batch):
        with torch.inference_mode():
            if batch.samples:
                backend._cache.trunk[1].keys[0] = float("nan")  # block 0 is the first request's

    ends = complete_with(torch_bundles / "tails-32", spoil, requests)
    assert ends["0"][0] == []
    assert "NaN" in str(ends["0"][1])
    assert [ends[name][0] for name in ("1", "2")] == [tokens for tokens, _ in expected[1:]]


@pytest.mark.slow
def test_without_torch_or_triton_it_says_what_to_install(torch_bundles):
    code = """
import sys
sys.modules[sys.argv[2]] = None
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.open import open_backend
from motet.runtime.model.bundle import Bundle
from motet.runtime.errors import MissingPackageError
try:
    if sys.argv[2] == "torch":
        open_backend(Bundle.load(sys.argv[1]), EngineConfig(backend="torch"))
    else:
        from motet.runtime.backends.torch.options import load_ops
        load_ops("triton")
except MissingPackageError as error:
    print(error)
"""
    for package in ("torch", "triton"):
        command = [sys.executable, "-c", code, str(torch_bundles / "base"), package]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"needs {package}" in result.stdout
        assert "pip install 'motet[gpu]'" in result.stdout
