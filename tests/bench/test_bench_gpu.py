"""The GPU benches where there is no GPU: the same code at tiny sizes, and what they say when they cannot measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import motet
import pytest

torch = pytest.importorskip("torch", reason="the benches make torch tensors")
pytest.importorskip("triton", reason="triton is not installed")

from motet.bench.gpu import h200, h200_stages, kernels, torch_decode  # noqa: E402
from motet.bench.gpu.problems import DEVICE  # noqa: E402
from motet.bench.gpu.random_model import RandomModel, shape  # noqa: E402
from motet.runtime.backends.torch.options import TorchOptions  # noqa: E402
from motet.runtime.errors import ConfigError, UnavailableError  # noqa: E402
from motet.runtime.model.config import DecoderConfig  # noqa: E402

ROOT = Path(__file__).parents[2]
TINY = DecoderConfig.from_dict(
    {
        "family": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 16,
        "max_position_embeddings": 128,
        "tied_head": False,
    }
)
EAGER = TorchOptions(torch.device("cpu"), torch.float32, "eager", keep_quantised=True, graphs=True)


# What a case must move at the tiny sizes below, counted by hand.
BYTES = {
    "mix_sample 4 rows, 1 members, temperature 0.0": 4 * 300 * 4,
    "mix_head_sample, 1 requests": 300 * 64 * 2,
    "residual_norm, 2 rows, 4 parts": 4 * 2 * 64 * 4
    + 2 * (2 * 64 * 4)
    + 2 * 64 * 2,  # parts, stream in and out, normed
    "activate, 2 rows": 2 * 256 * 4 + 2 * 128 * 2,
    "add_adapter, 2 rows, 4 adapters of rank 8": 4 * (8 * 64 + 64 * 8) * 2 + 2 * 64 * 2 + 2 * (2 * 64 * 4),
    "rotary_write bfloat16, 2 rows": 2 * 2 * 128 * 4
    + 2 * 64 * 2
    + 2 * 2 * 32 * 2,  # qkv in two parts, queries, K and V
    "rotary_write int8, 2 rows": 2 * 2 * 128 * 4 + 2 * 64 * 2 + 2 * 2 * 32,
    "decode_attention bfloat16, 2 × 48": 2 * 48 * 2 * 32 * 2,
    "decode_attention int8, 2 × 48": 2 * 48 * 2 * (32 + 2 * 4),  # a float32 scale a head
    "prefill_attention bfloat16, 66 rows of 81": 2 * 66 * 64 * 2 + 81 * 2 * 32 * 2,  # queries in, results out, K and V
    "matmul down 16 bits, 1 rows": 64 * 128 * 2 + 128 * 2 + 64 * 4,
    "matmul down 8 bits, 1 rows": 64 * 128 + 64 * 4 * 2 + 128 * 2 + 64 * 4,  # 4 groups a row
    "matmul gate_up 4 bits, 66 rows": 256 * 64 // 2 + 256 * 2 * (2 + 2) + 66 * (64 * 2 + 256 * 4),  # scales and minima
}


@pytest.mark.slow
def test_every_kernel_case_runs_and_counts_its_bytes():
    """Each case of the kernel bench, once, through the interpreter (or compiled, on a GPU)."""
    tiny = kernels.Sizes(
        hidden=64, inner=128, heads=4, kv_heads=2, head_size=16, vocab=300, batch=2, context=48, chunk=66, sampled=4
    )
    found, flops = {}, {}
    for case in kernels.cases(tiny):
        case.run()
        assert case.name not in found
        found[case.name], flops[case.name] = case.bytes, case.flops
    assert len(found) > 30
    assert all(count > 0 for count in found.values())
    assert {name: found.get(name) for name in BYTES} == BYTES
    assert flops["matmul down 8 bits, 66 rows"] == 2 * 66 * 64 * 128
    seen = sum(range(16, 82))  # positions that the rows of a chunk after 15 see
    assert flops["prefill_attention bfloat16, 66 rows of 81"] == 2 * 2 * 4 * 16 * seen


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "weight", "head"), [(16, 4.0, 4.0), (8, 1.125, 1.125), (4, 0.75, 1.125)])
def test_decode_is_measured_on_random_weights(bits, weight, head):
    """`weight`, `head`: bytes a value; scales and minima are float32, one for 32 values, and the head has 8 bits at
    least."""
    rows = torch_decode.measure(
        TINY, EAGER, 10.0, bits=bits, batch_sizes=(1, 3), members=2, tail_layers=1, context=20, repeats=2
    )
    layer = (64 + 2 * 32) * 64 + 64 * 64 + 2 * 96 * 64 + 64 * 96
    position = 5 * 2 * 32 * 4  # three shared layers and two tails of one; keys and values in float32
    for row, size in zip(rows, (1, 3), strict=True):
        moved = 5 * layer * weight + 128 * 64 * head + size * 20 * position
        seconds = row["step_ms"] / 1e3
        assert (row["batch_size"], row["ensemble_size"], row["bytes"]) == (size, 2, moved)
        assert row["tok_s"] * seconds == pytest.approx(size)
        assert row["share_of_copy_bandwidth"] * seconds == pytest.approx(moved / 10e9)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_random_weights_keep_the_scale_of_activations(bits):
    weights = RandomModel(TINY, bits, torch.device("cpu"), torch.float32).weights(2, 1)
    from motet.kernels.oracle.eager import dequantise

    assert dequantise(weights.trunk[0].mlps[0].up.weight).std() == pytest.approx(64**-0.5, rel=0.05)


@pytest.mark.slow
def test_the_slice_is_checked_against_the_oracle():
    assert torch_decode.check_slice(TINY, 8, EAGER) < 1e-5


def test_unknown_shapes_and_bits_are_said():
    with pytest.raises(ConfigError, match="known are"):
        shape("llama-9t")
    with pytest.raises(ConfigError, match="bits must be"):
        RandomModel(TINY, 5, torch.device("cpu"), torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU: the bench runs")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(UnavailableError, match="needs an NVIDIA GPU"):
        kernels.run(tmp_path)
    result = subprocess.run([sys.executable, str(ROOT / "bench" / "gpu" / "h200.py")], capture_output=True, text=True)
    assert result.returncode == 2
    assert "no GPU" in result.stderr


def test_goals_are_judged_by_what_was_measured():
    result = {
        "decode": {
            "8B bf16": [
                {"batch_size": 1, "tok_s": 260.0, "share_of_copy_bandwidth": 0.85, "step_ms": 4.0},
                {"batch_size": 64, "tok_s": 7000.0, "share_of_copy_bandwidth": 0.5, "step_ms": 9.0},
            ],
            "8B bf16, 4 members": [{"batch_size": 1, "tok_s": 220.0, "share_of_copy_bandwidth": 0.8, "step_ms": 4.7}],
            "8B 4 bits": {"error": "…"},
        },
        "transformers": {"1": 30.0},
    }
    figures = h200.figures(result)
    met = {row["goal"]: row["met"] for row in h200.verdicts(figures, "NVIDIA H200")}
    assert met["8B bf16, batch 1, tok/s"] is True
    assert met["8B bf16, batch 64, tok/s"] is False
    assert met["8B 4 bits, batch 1, tok/s"] is None
    assert met["4 members × 2-layer tails, batch 1, times one model"] is True
    assert met["times transformers, batch 1"] is True
    other = {row["goal"]: row["met"] for row in h200.verdicts(figures, "NVIDIA A100 80GB PCIe")}
    assert other["8B bf16, batch 64, tok/s"] is None
    assert other["8B bf16, batch 1, share of bandwidth"] is True


CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600 if sys.argv[1] == "hang" else 0)
sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang", "end"])
def test_a_stage_ends_with_all_that_it_started(tmp_path, how):
    log = tmp_path / "stage.log"

    def wait(process):
        if how == "end":
            return process.wait()
        while not log.read_bytes().endswith(b"\n"):
            assert process.poll() is None
        raise subprocess.TimeoutExpired(process.args, 0)

    assert h200.run_limited([sys.executable, "-c", CHILD, how], log, wait) == (None if how == "hang" else 3)
    child = Path(f"/proc/{int(log.read_text())}/stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] not in "ZX":
        pass  # a killed process is there until the kernel is done with it


def test_a_run_goes_on_where_one_of_the_same_sources_stopped(tmp_path, monkeypatch):
    """Complete stages are left, others are run anew; a failed one keeps what it found, and the result says why it
    ended."""
    ran, fails = [], {"8B 8 bits"}

    def run_limited(command, log, wait):
        name, key = command[command.index("--stage") + 1], command[command.index("--key") + 1]
        ran.append(name)
        log.write_text("what it said")
        result = {"machine": {"device": "H200"}, "limits": {"copy_gb_s": 4.0}} if name == "machine" else {}
        h200._store(log.with_suffix(".json"), {"key": key, "result": result, "complete": name not in fails})
        return None if name in fails else 0

    monkeypatch.setattr(h200, "run_limited", run_limited)
    names = [stage.name for stage in h200_stages.STAGES]
    h200.run_stages(tmp_path, "one", "H200", float("inf"))
    assert ran == names
    result = json.loads((tmp_path / "h200.json").read_bytes())
    assert set(result["errors"]) == fails
    assert "what it said" in result["errors"]["8B 8 bits"]
    assert "8B 8 bits" in result["decode"]
    fails.clear()
    h200.run_stages(tmp_path, "one", "H200", float("inf"))
    assert ran == [*names, "8B 8 bits"]
    assert not json.loads((tmp_path / "h200.json").read_bytes())["errors"]
    h200.run_stages(tmp_path, "two", "H200", float("inf"))
    assert ran == [*names, "8B 8 bits", *names]
    h200.run_stages(tmp_path, "three", "H200", float("-inf"))
    assert all("time was up" in e for e in json.loads((tmp_path / "h200.json").read_bytes())["errors"].values())
    assert len(ran) == 2 * len(names) + 1


def test_a_stage_writes_what_it_has_so_far(monkeypatch):
    def run(task):
        yield [1]
        yield [1, task.limits["x"]]

    monkeypatch.setattr(h200_stages, "STAGES", (h200_stages.Stage("decode", 1, run),))
    written = []
    task = h200_stages.Task(ROOT, {"x": 2})
    h200_stages.run_here("decode", task, lambda result, is_complete: written.append((result, is_complete)))
    assert written == [([1], False), ([1, 2], False), ([1, 2], True)]
    with pytest.raises(UnavailableError, match="stage 'machine' failed"):
        h200_stages.run_here("decode", h200_stages.Task(ROOT, {}), written.append)


@pytest.mark.slow
def test_the_tree_runs_without_an_installation():
    """What a GPU machine does: motet is not installed, the folders are found where they lie."""
    code = "import sys; sys.path.insert(0, 'bench/gpu'); import source_tree; source_tree.use()\n"
    code += "import motet; import motet.bench.gpu.torch_decode as found; print(found.__file__, motet.__version__)"
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    environment = {**os.environ, "PYTHONPATH": packages}
    # -S: no .pth files, which is how an editable installation is found
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    expected = f"{ROOT / 'bench' / 'gpu' / 'torch_decode.py'} {motet.__version__}"
    assert result.stdout.strip() == expected, result.stderr
