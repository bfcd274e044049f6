"""The stages of `h200.py`, each of which runs in a process of its own: what they measure, in the order of their
worth."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.runtime.errors import UnavailableError

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


@dataclass(frozen=True, slots=True)
class Task:
    """What a stage has. `limits`: of the device, as the first stage measured them."""

    root: Path
    limits: dict[str, float]


@dataclass(frozen=True, slots=True)
class Stage:
    """`run` yields its result so far, whenever there is more of it. `seconds`: at most; the figures that matter most
    come first."""

    name: str
    seconds: float
    run: Callable[[Task], Iterator[Any]]


def _machine(task: Task) -> Iterator[Any]:
    from motet.bench.gpu import torch_decode
    from motet.runtime.backends.torch.options import TorchOptions

    options = TorchOptions.of_machine()
    yield {"machine": torch_decode.machine(options), "limits": torch_decode.limits(options.device)}


def _decode(shape: str, bits: int, members: int = 1, tail_layers: int = 0) -> Callable[[Task], Iterator[Any]]:
    def run(task: Task) -> Iterator[Any]:
        from motet.bench.gpu import torch_decode
        from motet.bench.gpu.random_model import SHAPES
        from motet.runtime.backends.torch.options import TorchOptions

        rows: list[dict[str, Any]] = []
        for size in (1, 64) if members == 1 else (1,):
            rows += torch_decode.measure(
                SHAPES[shape],
                TorchOptions.of_machine(),
                task.limits["copy_gb_s"],
                bits=bits,
                batch_sizes=(size,),
                members=members,
                tail_layers=tail_layers,
                context=CONTEXT,
                repeats=30,
            )
            yield rows

    return run


def _kernels(task: Task) -> Iterator[Any]:
    from motet.bench.gpu import kernels

    rows: list[dict[str, Any]] = []
    for row in kernels.measure(kernels.Sizes(), task.limits):
        rows.append(row)
        yield rows


def _slices(task: Task) -> Iterator[Any]:
    """Bits → relative error of a slice of the 8B shape against the eager oracle in float32."""
    from motet.bench.gpu import torch_decode
    from motet.bench.gpu.random_model import SHAPES
    from motet.runtime.backends.torch.options import TorchOptions

    found: dict[str, float] = {}
    for bits in (16, 8, 4):
        found[str(bits)] = torch_decode.check_slice(SHAPES["llama-8b"], bits, TorchOptions.of_machine())
        yield found


def _tests(task: Task) -> Iterator[Any]:
    """The tests of the GPU path, compiled, 4 at a time: most of their time is spent compiling. Their output is this
    stage's."""
    options = ("-n", "4", "-p", "no:cacheprovider", "-rfE", "-k", NOT_THERE)
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{name}.py" for name in TESTS)]
    yield {"exit_code": subprocess.run(command, cwd=task.root).returncode}


def _generate_seconds(model: Any, prompt: Any, tokens: int) -> float:
    import torch

    start = time.perf_counter()
    mask = torch.ones_like(prompt)
    lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _transformers(task: Task) -> Iterator[Any]:
    """Batch size → decode tok/s of transformers' `generate`, in bfloat16 on random weights of the 8B shape.

    It is the time of 33 new tokens less the time of 1, after a prompt of `CONTEXT` - 32 tokens.
    """
    import torch
    import transformers
    from motet.bench.gpu.random_model import SHAPES

    c = SHAPES["llama-8b"]
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
    rates: dict[str, float] = {}
    for size in (1, 64):
        prompt = torch.randint(0, c.vocab_size, (size, CONTEXT - 32), device="cuda")
        _generate_seconds(model, prompt, 2)
        rates[str(size)] = 32 * size / (_generate_seconds(model, prompt, 33) - _generate_seconds(model, prompt, 1))
        yield rates


STAGES = (
    Stage("machine", 40, _machine),
    Stage("8B bf16", 90, _decode("llama-8b", 16)),
    Stage("8B 8 bits", 80, _decode("llama-8b", 8)),
    Stage("8B 4 bits", 80, _decode("llama-8b", 4)),
    Stage("8B bf16, 4 members", 60, _decode("llama-8b", 16, 4, 2)),
    Stage("kernels", 110, _kernels),
    Stage("slices", 40, _slices),
    Stage("tests", 200, _tests),
    Stage("1B bf16", 40, _decode("llama-1b", 16)),
    Stage("135M bf16", 40, _decode("smollm2-135m", 16)),
    Stage("transformers", 60, _transformers),
)
DECODE = tuple(stage.name for stage in STAGES if " bf16" in stage.name or " bits" in stage.name)


def run_here(name: str, task: Task, write: Callable[[Any, bool], None]) -> None:
    """Run a stage in this process. `write(result, is_complete)` is called whenever there is more of its result, and at
    its end."""
    stage = next(stage for stage in STAGES if stage.name == name)
    if name != "machine" and not task.limits:
        raise UnavailableError("the limits of this GPU are not measured: stage 'machine' failed; see its log")
    result: Any = None
    for result in stage.run(task):
        write(json.loads(json.dumps(result)), False)
    write(result, True)
