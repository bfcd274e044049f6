"""Every launch of the GPU path through the real compiler, down to machine code of an sm_90 device, where none is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the kernels take torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

TENSOR_CORES = {"_small_kernel", "_large_kernel", "_head_kernel", "_prefill_kernel"}


@pytest.mark.slow
def test_all_launches_compile_for_sm90(tmp_path):
    """No spills, shared memory within a multiprocessor's, and the Hopper tensor cores where the work is products."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parent / "compile_kernels.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = json.loads(result.stdout.splitlines()[-1])
    assert {k["kernel"] for k in kernels} >= TENSOR_CORES
    assert all(k["wgmma"] for k in kernels if k["kernel"] in TENSOR_CORES)
    assert all(k["shared"] <= 227 * 1024 for k in kernels)
    assert all(k.get("local", 0) == 0 for k in kernels)
