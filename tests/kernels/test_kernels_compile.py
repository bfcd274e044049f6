"""The launches of the GPU path through the real compiler, down to machine code, where no GPU is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
TENSOR_CORES = {
    "weight_matmul.small",
    "weight_matmul.large",
    "mix_head_sample.head",
    "prefill_attention.prefill",
}
# A few kernels of each kind; all are in the committed report.
REPRESENTATIVE = [
    "residual_norm, 64 rows, 4 parts",
    "add_adapter, 64 rows, 4 adapters of rank 8",
    "decode_attention int8, 64 × 1024",
    "matmul down 16 bits, 64 rows",
    "matmul down 4 bits, 1 rows",
]
WORSE = 1.05  # times the committed figure


def compiled(tmp_path, *arguments):
    """What a script says in its last line, in a process whose Triton compiles and has an empty cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_launches_compile_for_sm90(tmp_path):
    """No spills, shared memory within a multiprocessor's, and the Hopper tensor cores where the work is products. Only
    the search for a cut keeps four scalars in memory, outside its loops."""
    kernels = compiled(tmp_path, str(Path(__file__).parent / "compile_kernels.py"))
    assert {k["kernel"] for k in kernels} >= TENSOR_CORES
    assert all(k["wgmma"] for k in kernels if k["kernel"] in TENSOR_CORES)
    assert all(k["tensor"] for k in kernels if k["kernel"] == "paged_attention.decode")
    assert all(k["shared"] <= 227 * 1024 for k in kernels)
    assert [k for k in kernels if k["spilled"] > (16 if k["kernel"] == "mix_sample.cut" else 0)] == []


@pytest.mark.slow
def test_kernels_are_as_good_as_the_committed_report_says(tmp_path):
    """Registers, shared memory, instructions and spills of a few kernels. After a change that is worth it:
    `motet bench kernels --static`."""
    report = json.loads((ROOT / "bench" / "results" / "kernels-static.json").read_bytes())
    code = "import json, sys; from motet.bench.gpu import kernels, static\n"
    code += "names = sys.argv[1:]\n"
    code += "print(json.dumps(static.describe(90, kernels.Sizes(), names) if names else static.compiler()))"
    versions = compiled(tmp_path, "-c", code)
    if versions != {name: report["machine"].get(name) for name in versions}:
        pytest.skip(f"the committed figures are of another compiler than {versions}")
    found = compiled(tmp_path, "-c", code, *REPRESENTATIVE)
    kept = {(case, row["kernel"]): row for row in report["kernels"] if row["capability"] == 90 for case in row["cases"]}
    rows = [(case, row) for row in found for case in row["cases"]]
    assert {case for case, _ in rows} == set(REPRESENTATIVE)
    for case, row in rows:
        old = kept[case, row["kernel"]]
        for name in ("registers", "shared_bytes", "instructions", "spilled_bytes"):
            assert row[name] <= WORSE * old[name], (case, row["kernel"], name)
