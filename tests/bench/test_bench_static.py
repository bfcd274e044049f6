"""The static report of the GPU kernels: reading machine code, the model, and the committed figures against arithmetic."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the benches make torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import machine_code, static  # noqa: E402
from motet.bench.gpu.compiled import Launch  # noqa: E402
from motet.bench.gpu.random_model import shape  # noqa: E402
from motet.bench.gpu.step_launches import moved_bytes  # noqa: E402
from motet.kernels.triton.launch import INTERPRETED  # noqa: E402
from motet.runtime.errors import UnavailableError  # noqa: E402

REPORT = Path(__file__).parents[2] / "bench" / "results" / "kernels-static.json"
LISTING = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/              @!P0 HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR12][R6.64], P1 ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/               @P2 BRA `(.L_x_1) ;
        /*0060*/                   FFMA R3, R3, R3, R3 ;
        /*0070*/               @P3 BRA `(.L_x_0) ;
        /*0080*/                   STL [R1], R3 ;
        /*0090*/               @P4 BRA `(.L_x_2) ;
.L_x_2:
        /*00a0*/                   EXIT ;
"""


def test_machine_code_is_read():
    names, labels, jumps = machine_code._parse(LISTING)
    assert labels == {".L_x_0": 1, ".L_x_1": 2, ".L_x_2": 10}
    assert [label for _, label in jumps] == [".L_x_1", ".L_x_0", ".L_x_2"]
    loop = machine_code._main_loop(names, labels, jumps)
    assert loop == Counter(["HGMMA", "LDGSTS", "LDGDEPBAR", "BRA"])  # the inner one, not the one around it
    code = machine_code.MachineCode(32, 0, 0, Counter(names), loop)
    expected = {"tensor": 1, "global": 1, "spill": 1, "float": 1, "integer": 2, "control": 5}
    assert code.classes() == dict(sorted(expected.items()))


def launch(kernel="weight_matmul.small", grid=(64, 4), **arguments):
    values = {"BLOCK_K": 128, "BLOCK_N": 64, "num_k": 14336, "split_k": 3584} | arguments
    compiled = SimpleNamespace(metadata=SimpleNamespace(num_warps=4))
    return Launch(kernel, grid, values, compiled)


def test_a_loop_counts_only_if_it_was_not_unrolled():
    def code(products):
        return machine_code.MachineCode(1, 0, 0, Counter(), Counter({"HGMMA": products, "IADD3": 92}))

    found = static.main_loop(launch(), code(8), (0, 0))
    assert found == static.Loop(64 * 128, 28 * 64 * 4, 100 * 4)
    assert found.per_element == 100 * 4 * 32 / (64 * 128)
    assert static.main_loop(launch(), code(16), (0, 0)) is None
    assert static.main_loop(launch("activate.activate"), code(8), (0, 0)) is None
    assert static.issue_seconds(found, launch()) == pytest.approx(28 * 256 * 400 / (132 * 4 * 1.755e9 * 0.7))
    few = static.issue_seconds(found, launch(grid=(1, 1)))
    assert few == pytest.approx(132 * static.issue_seconds(found, launch()))


def test_a_launch_takes_the_longer_of_bytes_and_instructions():
    assert static.seconds(4_300_000, 0.0) == pytest.approx(1e-6 / 0.85 + 2.5e-6)
    assert static.seconds(4_300_000, 3e-6, 2) == pytest.approx(3e-6 + 5e-6)
    assert static.seconds(4_300_000, 3e-6, 2, 989 * 7 * 10**6) == pytest.approx(1e-5 + 5e-6)


def test_bytes_of_a_launch_are_those_of_its_operands_once():
    x, cache = torch.empty(3, 8, device="meta"), torch.empty(50, 2, 16, 4, dtype=torch.bfloat16, device="meta")
    assert moved_bytes(launch(x=x, out=torch.empty(5, device="meta"), scales=x)) == 3 * 8 * 4 + 5 * 4
    assert moved_bytes(launch("paged_attention.decode", keys=cache, key_scales=cache)) == 50 * 2 * 16 * 4 * 2
    written = launch("rotary_write.rotary_write", (3, 7), keys=cache, cos=torch.empty(100, 6, device="meta"))
    assert moved_bytes(written) == 3 * 2 * 4 * 2 + 3 * 6 * 4


def test_the_committed_steps_have_the_bytes_and_launches_of_the_shape():
    config = shape("llama-8b")
    layer = config.hidden_size * (2 * config.q_size + 2 * config.kv_size + 3 * config.intermediate_size)
    weights = config.num_layers * layer + config.hidden_size * config.vocab_size
    report = json.loads(REPORT.read_bytes())
    steps = {(step["bits"], step["batch_size"]): step for step in report["steps"]}
    activations = {}
    for size in (1, 64):
        step = steps[16, size]
        cached = size * step["context"] * config.num_layers * 2 * config.kv_size * 2
        activations[size] = step["bytes"] - 2 * weights - cached
        assert step["launches_by_kernel"]["weight_matmul.small"] == 4 * config.num_layers
        assert step["launches_by_kernel"]["paged_attention.decode"] == config.num_layers
    assert 0 < activations[1] < 0.005 * steps[16, 1]["bytes"]
    assert 32 * activations[1] < activations[64] <= 64 * activations[1]
    assert steps[4, 1]["bytes"] < steps[8, 1]["bytes"] < steps[16, 1]["bytes"]
    assert all(not row["spilled_bytes"] and row["fits"] for row in report["kernels"] if row["capability"] == 90)


@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here")
def test_interpreted_kernels_are_not_reported(tmp_path):
    with pytest.raises(UnavailableError, match="unset TRITON_INTERPRET"):
        static.run(tmp_path)
    assert not list(tmp_path.iterdir())
