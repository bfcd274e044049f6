"""One command for a GPU machine: runs all checks and compares all figures with the goals, in nine minutes at most.

    python3 bench/gpu/h200.py [--out bench/results] [--minutes 9]

It runs from the source tree, installed or not. The stages are the tests of kernels and backend, with compiled kernels; a slice
of a model against the oracle; the decode figures; every kernel; transformers' `generate` on the same shape. A stage gets the
time that is left. If it fails, its error is recorded and the next one runs. `out/h200.json` is written after each stage. It
has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = (
    "kernels/test_residual_norm",
    "kernels/test_activate",
    "kernels/test_rotary_write",
    "kernels/test_attention",
    "kernels/test_weight_matmul",
    "kernels/test_lora_adapter",
    "kernels/test_mix_sample",
    "kernels/test_mix_head_sample",
    "backends/test_row_plan",
    "backends/test_torch_sampler",
    "backends/test_torch_backend",
    "backends/test_torch_invariance",
    "backends/test_torch_faults",
)
NOT_THERE = "not real_model and not without_torch"  # these tests need a pulled model or an installed package
CONTEXT = 1024

# name of one of the `figures` → (at least or at most, limit)
GOALS: dict[str, tuple[str, float]] = {
    "8B bf16, batch 1, tok/s": (">=", 250),
    "8B bf16, batch 1, share of bandwidth": (">=", 0.8),
    "8B 8 bits, batch 1, tok/s": (">=", 420),
    "8B 4 bits, batch 1, tok/s": (">=", 650),
    "8B bf16, batch 64, tok/s": (">=", 8000),
    "1B bf16, batch 1, tok/s": (">=", 1100),
    "4 members × 2-layer tails, batch 1, times one model": ("<=", 1.2),
    "mix_sample, greedy, share of bandwidth": (">=", 0.8),
    "mix_sample, drawn, share of bandwidth": (">=", 0.8),
    "mix_sample, drawn, times faster than eager": (">=", 4),
    "mix_sample, drawn, times faster than torch.compile": (">=", 1.5),
    "fused head, batch 64, times faster than head + mix_sample": (">=", 1),
    "times transformers, batch 1": (">=", 4),
    "times transformers, batch 64": (">=", 10),
}


class Clock:
    """The seconds that are left of a number of minutes."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self._end - time.monotonic()


def run_tests(root: Path, seconds: float) -> dict[str, Any]:
    """Run the tests of the GPU path in their own process, 8 at a time: most of their time is spent compiling."""
    files = [f"tests/{name}.py" for name in TESTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "8",
        "-p",
        "no:cacheprovider",
        "-rfE",
        "-k",
        NOT_THERE,
        *files,
    ]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds)
    return {"exit_code": result.returncode, "tail": result.stdout[-3000:], "stderr": result.stderr[-1000:]}


def decode(limits: dict[str, float], clock: Clock) -> dict[str, Any]:
    """The decode figures. Each model is made, measured and freed before the next one."""
    import torch
    from motet.bench.gpu import torch_decode
    from motet.bench.gpu.random_model import SHAPES
    from motet.runtime.backends.torch.backend import TorchOptions

    options = TorchOptions.of_machine()
    plan = [
        ("8B bf16", "llama-8b", 16, (1, 64), 1, 0),
        ("8B bf16, 4 members", "llama-8b", 16, (1,), 4, 2),
        ("8B 8 bits", "llama-8b", 8, (1, 64), 1, 0),
        ("8B 4 bits", "llama-8b", 4, (1, 64), 1, 0),
        ("1B bf16", "llama-1b", 16, (1, 64), 1, 0),
        ("135M bf16", "smollm2-135m", 16, (1, 64), 1, 0),
    ]
    found: dict[str, Any] = {}
    for name, shape, bits, batch_sizes, members, tail_layers in plan:
        if clock.left() < 90:
            found[name] = {"error": f"not run: {clock.left():.0f} s were left"}
            continue
        try:
            found[name] = torch_decode.measure(
                SHAPES[shape],
                options,
                limits["copy_gb_s"],
                bits=bits,
                batch_sizes=batch_sizes,
                members=members,
                tail_layers=tail_layers,
                context=CONTEXT,
                repeats=30,
            )
        except Exception:
            found[name] = {"error": traceback.format_exc()[-1500:]}
        gc.collect()  # frees what a failure left
        torch.cuda.empty_cache()
    return found


def slices() -> dict[str, float]:
    """Bits → relative error of a slice of the 8B shape against the eager oracle in float32.

    Raises `MotetError` if an error is too large.
    """
    from motet.bench.gpu import torch_decode
    from motet.bench.gpu.random_model import SHAPES
    from motet.runtime.backends.torch.backend import TorchOptions

    options = TorchOptions.of_machine()
    return {str(bits): torch_decode.check_slice(SHAPES["llama-8b"], bits, options) for bits in (16, 8, 4)}


def _generate_seconds(model: Any, prompt: Any, tokens: int) -> float:
    import torch

    start = time.perf_counter()
    mask = torch.ones_like(prompt)
    lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def transformers_rates(shape: str, batch_sizes: tuple[int, ...]) -> dict[str, float]:
    """Batch size → decode tok/s of transformers' `generate`, in bfloat16 on random weights of a shape.

    It is the time of 33 new tokens less the time of 1, after a prompt of `CONTEXT` - 32 tokens.
    """
    import torch
    import transformers
    from motet.bench.gpu.random_model import SHAPES

    c = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_size,
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tied_head,
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rates = {}
    for size in batch_sizes:
        prompt = torch.randint(0, c.vocab_size, (size, CONTEXT - 32), device="cuda")
        _generate_seconds(model, prompt, 2)
        rates[str(size)] = 32 * size / (_generate_seconds(model, prompt, 33) - _generate_seconds(model, prompt, 1))
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return rates


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Name → figure, for the goals whose figures were measured."""
    found: dict[str, float] = {}
    rows = {
        (name, row["batch_size"]): row
        for name, measured in result.get("decode", {}).items()
        if isinstance(measured, list)
        for row in measured
    }
    for (name, size), row in rows.items():
        found[f"{name}, batch {size}, tok/s"] = row["tok_s"]
        found[f"{name}, batch {size}, share of bandwidth"] = row["share_of_copy_bandwidth"]
    if ("8B bf16, 4 members", 1) in rows and ("8B bf16", 1) in rows:
        ratio = rows["8B bf16, 4 members", 1]["step_ms"] / rows["8B bf16", 1]["step_ms"]
        found["4 members × 2-layer tails, batch 1, times one model"] = ratio
    kernels = result.get("kernels", [])
    by_name = {row["case"]: row for row in kernels} if isinstance(kernels, list) else {}
    for kind, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        name = f"mix_sample 256 rows, 1 members, temperature {temperature}"
        if name in by_name:
            found[f"mix_sample, {kind}, share of bandwidth"] = by_name[name]["share_of_copy_bandwidth"]
        for other, label in (("eager", "eager"), ("compiled", "torch.compile")):
            if f"{name}: {other}" in by_name:
                found[f"mix_sample, {kind}, times faster than {label}"] = by_name[f"{name}: {other}"][
                    "times_slower_than"
                ][1]
    two = by_name.get("mix_head_sample, 64 requests: head, then mix_sample")
    if two:
        found["fused head, batch 64, times faster than head + mix_sample"] = two["times_slower_than"][1]
    for size, rate in result.get("transformers", {}).items():
        if ("8B bf16", int(size)) in rows:
            found[f"times transformers, batch {size}"] = rows["8B bf16", int(size)]["tok_s"] / rate
    return found


def verdicts(found: dict[str, float]) -> list[dict[str, Any]]:
    """Each goal with its figure and whether it is met; both are None if there is no figure."""
    rows = []
    for name, (sense, limit) in GOALS.items():
        value = found.get(name)
        met = None if value is None else value >= limit if sense == ">=" else value <= limit
        rows.append({"goal": name, "wanted": f"{sense} {limit:g}", "found": value, "met": met})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and measure Motet's GPU path on this machine.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--minutes", type=float, default=9.0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    root = importlib.import_module("source_tree").use()
    import torch

    if not torch.cuda.is_available():
        print(
            "bench/gpu/h200.py: torch finds no GPU here; it measures one, and has nothing to do without",
            file=sys.stderr,
        )
        return 2
    from motet.bench.gpu import kernels, torch_decode
    from motet.runtime.backends.torch.backend import TorchOptions

    clock, options = Clock(arguments.minutes), TorchOptions.of_machine()
    limits = torch_decode.limits(options.device)
    result: dict[str, Any] = {"machine": torch_decode.machine(options), "limits": limits, "context": CONTEXT}
    stages: list[tuple[str, float, Callable[[], Any]]] = [
        ("tests", 0, lambda: run_tests(root, min(200, clock.left()))),
        ("slices", 60, slices),
        ("decode", 60, lambda: decode(limits, clock)),
        ("kernels", 60, lambda: kernels.measure(kernels.Sizes(), limits, lambda: clock.left() > 60)),
        ("transformers", 30, lambda: transformers_rates("llama-8b", (1, 64))),
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, needs, stage in stages:
        start = time.monotonic()
        if clock.left() < needs:
            result[name] = {}
            result.setdefault("errors", {})[name] = f"not run: {clock.left():.0f} s were left, it needs {needs:.0f}"
            continue
        try:
            result[name] = stage()
        except Exception:
            result[name] = {}
            result.setdefault("errors", {})[name] = traceback.format_exc()[-2000:]
        result.setdefault("seconds", {})[name] = time.monotonic() - start
        result["figures"] = figures(result)
        result["goals"] = verdicts(result["figures"])
        (arguments.out / "h200.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in result["goals"]:
        print(f"{row['goal']:60} {row['wanted']:>8} {row['found'] if row['found'] is None else round(row['found'], 3)}")
    print(
        json.dumps(
            {"errors": result.get("errors", {}), "tests": result["tests"].get("exit_code"), "goals": result["goals"]}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
