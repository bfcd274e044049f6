"""`motet bench kernels`: each GPU op at the sizes of a real model, with the bytes it must move and the share of the bandwidth.

Times are medians with a cold L2 cache. The sampling cases are also timed as a composition of torch ops, eager and under
torch.compile, and as head + mix_sample. The kernels' tests check the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...kernels.oracle.operands import Draw, LayerCache, LinearWeight, Mixture
from ...pages import Table
from ...runtime.errors import UnavailableError
from ..lib.report import write
from . import problems as make

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model and its batches. The tests run the same cases with tiny sizes."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    vocab: int = 128256
    batch: int = 64
    context: int = 1024
    chunk: int = 512
    sampled: int = 256


@dataclass(frozen=True, slots=True)
class Case:
    """`run` is timed. `bytes`: the fewest that it must move. `flops`: floating-point operations that it must compute."""

    name: str
    run: Callable[[], Any]
    bytes: int
    flops: int = 0
    versus: str = ""  # name of the case that this one is compared with


def cases(sizes: Sizes) -> Iterator[Case]:
    """All cases. The operands of a case are made when it is reached, so that they need not all fit into memory at once."""
    yield from _sampling(sizes)
    yield from _fused_head(sizes)
    yield from _elementwise(sizes)
    yield from _attention(sizes)
    for rows in (1, sizes.batch, sizes.chunk):
        yield from _matmuls(sizes, rows)


def _bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device=make.DEVICE, dtype=torch.bfloat16)


def _elementwise(s: Sizes) -> Iterator[Case]:
    from ...kernels.triton import ops as gpu

    rows, splits = s.batch, 4
    branch, residual = torch.randn(splits, rows, s.hidden, device=make.DEVICE), make.normal(rows, s.hidden)
    weight = make.normal(s.hidden)
    yield Case(
        f"residual_norm, {rows} rows, {splits} parts",
        partial(gpu.residual_norm, branch, residual, weight, None, 1e-5, torch.bfloat16),
        rows * s.hidden * (4 * splits + 8 + 2),
    )
    parts = torch.randn(1, rows, 2 * s.inner, device=make.DEVICE)
    yield Case(
        f"activate, {rows} rows", partial(gpu.activate, parts, "swiglu", torch.bfloat16), rows * s.inner * (8 + 2)
    )
    adapter = make.adapter_weight(4, 8, s.hidden, s.hidden, torch.bfloat16)
    x, out = _bf16(rows, s.hidden), torch.zeros(1, rows, s.hidden, device=make.DEVICE)
    tiles = make.adapter_tiles([row % 4 for row in range(rows)])
    yield Case(
        f"add_adapter, {rows} rows, 4 adapters of rank 8",
        partial(gpu.add_adapter, x, adapter, tiles, out),
        4 * 8 * 2 * s.hidden * 2 + rows * s.hidden * (2 + 8),
    )


def _attention(s: Sizes) -> Iterator[Case]:
    from ...kernels.triton import ops as gpu

    width = -(-s.context // 16)
    for kind in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        cache = _big_cache(s.batch * width, s.kv_heads, s.head_size, kind)
        tables = make.tables(s.batch, width, s.batch * width)
        name = str(kind).removeprefix("torch.")
        qkv = torch.randn(2, s.batch, (s.heads + 2 * s.kv_heads) * s.head_size, device=make.DEVICE)
        rotary = (make.normal(s.context, s.head_size // 2), make.normal(s.context, s.head_size // 2))
        index = make.integers(range(s.batch))
        yield Case(
            f"rotary_write {name}, {s.batch} rows",
            partial(gpu.rotary_write, qkv, rotary, None, 1e-5, index, index, cache, s.heads, torch.bfloat16),
            qkv.numel() * 4 + s.batch * s.head_size * (2 * s.heads + 2 * s.kv_heads * kind.itemsize),
        )
        position = s.kv_heads * 2 * (s.head_size * kind.itemsize + (4 if cache.key_scales is not None else 0))
        for batch in (1, s.batch):
            query = _bf16(batch, s.heads, s.head_size)
            rows = make.decode_rows([s.context] * batch, tables, s.context)
            yield Case(
                f"decode_attention {name}, {batch} × {s.context}",
                partial(gpu.decode_attention, query, cache, rows, torch.empty_like(query)),
                batch * s.context * position,
            )
        query = _bf16(s.chunk, s.heads, s.head_size)
        length = s.context + s.chunk // 2  # a chunk after a prefix; its block table repeats blocks, which costs nothing
        long_tables = make.tables(1, -(-length // 16), s.batch * width)
        chunk = make.chunks([s.chunk], [length], long_tables)
        seen = s.chunk * (length - s.chunk) + s.chunk * (s.chunk + 1) // 2
        yield Case(
            f"prefill_attention {name}, {s.chunk} rows of {length}",
            partial(gpu.prefill_attention, query, cache, chunk, torch.empty_like(query)),
            2 * query.numel() * 2 + length * position,
            4 * s.heads * s.head_size * seen,
        )


def _big_cache(blocks: int, kv_heads: int, size: int, kind: torch.dtype) -> LayerCache:
    shape = (blocks, kv_heads, 16, size)
    keys, values = (torch.randn(shape, device=make.DEVICE).clamp(-3, 3).to(kind) for _ in range(2))
    if kind is torch.bfloat16:
        return LayerCache(keys, values)
    scales = torch.full(shape[:3], 0.02, device=make.DEVICE)
    return LayerCache(keys, values, scales, scales.clone())


def _matmuls(s: Sizes, rows: int) -> Iterator[Case]:
    from ...kernels.triton import ops as gpu

    for name, n, k in (("down", s.hidden, s.inner), ("gate_up", 2 * s.inner, s.hidden), ("out", s.hidden, s.hidden)):
        for bits in (0, 8, 4):
            weight, x = make.big_weight(n, k, bits), _bf16(rows, k)
            yield Case(
                f"matmul {name} {bits or 16} bits, {rows} rows",
                partial(gpu.matmul, x, weight),
                weight.num_bytes + rows * (2 * k + 4 * n),
                2 * rows * n * k,
            )


def _sampling(s: Sizes) -> Iterator[Case]:
    from ...kernels.triton import ops as gpu

    logits = torch.randn(s.sampled, s.vocab, device=make.DEVICE) * 3
    size = logits.numel() * 4
    for members, temperature in ((1, 0.0), (1, 1.0), (4, 1.0)):
        count = s.sampled // members
        mixture, draw = make.mixture([members] * count), make.draw(count, temperature=temperature)
        name = f"mix_sample {s.sampled} rows, {members} members, temperature {temperature}"
        yield Case(name, partial(gpu.mix_sample, logits, mixture, draw), size)
        coefficients = mixture.coefficients.view(count, members)
        compose = _composition(members, temperature)
        yield Case(f"{name}: eager", partial(compose, logits, coefficients), size, versus=name)
        if not make.INTERPRETED:
            fast = torch.compile(compose, dynamic=False)
            yield Case(f"{name}: compiled", partial(fast, logits, coefficients), size, versus=name)


def _fused_head(s: Sizes) -> Iterator[Case]:
    from ...kernels.triton import ops as gpu

    head = make.big_weight(s.vocab, s.hidden, 0)
    for count in sorted({1, 16, s.batch}):
        run = (_bf16(count, s.hidden), head, make.mixture([1] * count), make.draw(count))
        name = f"mix_head_sample, {count} requests"
        yield Case(name, partial(gpu.mix_head_sample, *run), head.num_bytes)
        yield Case(f"{name}: head, then mix_sample", partial(_head_then_sample, *run), head.num_bytes, versus=name)


def _composition(members: int, temperature: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mix, draw and log-probability as a composition of torch ops."""

    def compose(logits: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        mixed = (coefficients[:, :, None] * logits.view(-1, members, logits.shape[1])).sum(1)
        logprobs = mixed.log_softmax(-1)
        if temperature == 0:
            tokens = mixed.argmax(-1)
        else:
            noise = -torch.log(-torch.log(torch.rand_like(mixed).clamp_min(1e-12)))
            tokens = (mixed / temperature + noise).argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    return compose


def _head_then_sample(hidden: Tensor, head: LinearWeight, mixture: Mixture, draw: Draw) -> tuple[Tensor, Tensor]:
    from ...kernels.triton import ops as gpu

    logits = gpu.matmul(hidden, head)[0]
    return gpu.mix_sample(logits, mixture, draw)


def measure(sizes: Sizes, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Median time of each case with a cold L2 cache, and its share of the bandwidth."""
    from triton.testing import do_bench

    times: dict[str, float] = {}
    for case in cases(sizes):
        seconds = times[case.name] = do_bench(case.run, warmup=5, rep=30, return_mode="median") / 1e3
        yield {
            "case": case.name,
            "us": 1e6 * seconds,
            "gb_s": case.bytes / seconds / 1e9,
            "share_of_copy_bandwidth": case.bytes / seconds / 1e9 / limits["copy_gb_s"],
            "tflop_s": case.flops / seconds / 1e12 or None,
            "times_slower_than": [case.versus, seconds / times[case.versus]] if case.versus else None,
        }


def run(out: Path) -> dict[str, Any]:
    """Measure, write `out/kernels.json` and `.html`, print a table and one JSON line.

    Raises `UnavailableError` without a GPU: times of interpreted kernels mean nothing.
    """
    if make.DEVICE != "cuda":
        raise UnavailableError("`motet bench kernels` needs an NVIDIA GPU; the kernels' tests run without one")
    from ...runtime.backends.torch.options import TorchOptions
    from .torch_decode import limits, machine

    options = TorchOptions.of_machine()
    found = limits(options.device)
    result = {"machine": machine(options), "limits": found, "kernels": list(measure(Sizes(), found))}
    write("kernels", result, [kernel_table(result)], out)
    return result


def kernel_table(result: dict[str, Any]) -> Table:
    rows = [
        [
            row["case"],
            f"{row['us']:.1f}",
            f"{row['share_of_copy_bandwidth']:.0%}",
            f"{row['tflop_s']:.0f}" if row["tflop_s"] else "",
            f"× {row['times_slower_than'][1]:.2f}" if row["times_slower_than"] else "",
        ]
        for row in result["kernels"]
    ]
    title = f"kernels on {result['machine']['device']}; copy {result['limits']['copy_gb_s']:,.0f} GB/s"
    return Table(title, ["op", "µs", "of bandwidth", "TFLOP/s", "slower"], rows)
