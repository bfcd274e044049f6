"""Compile every launch of the GPU path for an sm_90 device, with no device: run as a script, prints one JSON line.

The launchers run as they are, on tensors without memory of a real model's shapes; only the last step, the launch, stops after the
compiler. What the compiler says of each kernel (shared memory, registers, spilled bytes) is in the line.
"""

from __future__ import annotations

import json

import torch

SHARED_LIMIT = 227 * 1024


def launch_single(gpu, make) -> None:
    """One of everything: Triton compiles an argument that is 1 as a constant, which is another kernel."""
    bf16, one = torch.bfloat16, make.integers([1])
    cache, table = make.cache(2, 1, 16, 64, bf16), make.tables(1, 1, 1)
    tables = (torch.empty(64, 32), torch.empty(64, 32))
    query = gpu.rotary_write(torch.empty(1, 1, 3 * 64), tables, None, 1e-5, one, one, cache, 1, bf16)
    gpu.decode_attention(query, cache, make.decode_rows([1], table, 16), torch.empty_like(query))
    gpu.prefill_attention(query, cache, make.chunks([1], [1], table), torch.empty_like(query))
    x = gpu.residual_norm(None, torch.empty(1, 64), torch.empty(64), torch.empty(64), 1e-5, bf16)
    parts = gpu.matmul(x, make.weight(64, 64, 8, bias=True))
    gpu.add_adapter(x, make.adapter_weight(1, 1, 64, 64, bf16), make.adapter_tiles([0]), parts)
    gpu.activate(parts, "gelu", bf16)
    gpu.activate(parts, "gelu_erf", bf16)
    gpu.mix_head_sample(x, make.weight(64, 64, 8), make.mixture([1]), make.draw(1))
    gpu.mix_sample(torch.empty(1, 100), make.mixture([1], probs=True), make.draw(1, min_p=0.1))


def launch_gemma(gpu, make) -> None:
    """Heads of 256, a part of which rotates, with soft caps and a window."""
    from motet.kernels.oracle.operands import Scores

    bf16, index = torch.bfloat16, make.integers([0, 1, 2])
    cache, tables = make.cache(8, 1, 16, 256, bf16), make.tables(2, 4, 8)
    table = (torch.empty(64, 96), torch.empty(64, 96))
    query = gpu.rotary_write(torch.empty(2, 3, 6 * 256), table, None, 1e-5, index, index, cache, 4, bf16)
    scores = Scores(20, 0.1, 50.0)
    gpu.decode_attention(query, cache, make.decode_rows([5, 6], tables, 2048), torch.empty_like(query), scores)
    gpu.prefill_attention(query, cache, make.chunks([3], [9], tables), torch.empty_like(query), scores)
    gpu.activate(torch.empty(1, 4, 2 * 128), "geglu", bf16)


def launch_all() -> None:
    from motet.bench.gpu import problems as make
    from motet.kernels.oracle.operands import LayerCache, LinearWeight
    from motet.kernels.triton import ops as gpu

    launch_single(gpu, make)
    launch_gemma(gpu, make)
    bf16 = torch.bfloat16
    hidden, heads, kv_heads, size, inner, vocab = 4096, 32, 8, 128, 14336, 128256
    for kv in (bf16, torch.int8, torch.float8_e4m3fn):
        cache = make.cache(8, kv_heads, 16, size, kv)
        tables = make.tables(2, 4, 8)
        table = (torch.empty(64, size // 2), torch.empty(64, size // 2))
        norms = (torch.empty(size), torch.empty(size))
        qkv = torch.empty(2, 3, (heads + 2 * kv_heads) * size)
        index = make.integers([0, 1, 2])
        query = gpu.rotary_write(qkv, table, norms, 1e-5, index, index, cache, heads, bf16)
        gpu.decode_attention(query, cache, make.decode_rows([5, 6], tables, 2048), torch.empty_like(query))
        gpu.prefill_attention(query, cache, make.chunks([3], [9], tables), torch.empty_like(query))
    for bits in (0, 8, 4):
        for rows in (1, 32, 64, 256):
            x = torch.empty(rows, hidden, dtype=bf16)
            values = torch.empty(hidden, hidden, dtype=bf16)
            weight = LinearWeight(values)
            if bits:
                scales = torch.empty(hidden // 32, hidden, dtype=torch.float16)
                values = torch.empty(hidden, hidden * bits // 8, dtype=torch.uint8)
                weight = LinearWeight(values, scales, scales if bits == 4 else None)
            gpu.matmul(x, weight)
    x = torch.empty(4, hidden, dtype=bf16)
    gpu.residual_norm(torch.empty(4, 4, hidden), torch.empty(4, hidden), torch.empty(hidden), None, 1e-5, bf16)
    gpu.activate(torch.empty(1, 4, 2 * inner), "swiglu", bf16)
    adapter = make.adapter_weight(2, 8, hidden, hidden, bf16)
    gpu.add_adapter(x, adapter, make.adapter_tiles([0, 1, -1, 0]), torch.empty(2, 4, hidden))
    mixture, draw = make.mixture([2, 2]), make.draw(2)
    for bits in (0, 8):
        values = torch.empty(vocab, hidden, dtype=torch.uint8 if bits else bf16)
        scales = torch.empty(hidden // 32, vocab, dtype=torch.float16) if bits else None
        gpu.mix_head_sample(x, LinearWeight(values, scales), mixture, draw)
    gpu.mix_sample(torch.empty(4, vocab), make.mixture([2, 2], probs=True), make.draw(2, top_k=5, top_p=0.9))
    assert isinstance(cache, LayerCache)


if __name__ == "__main__":
    from motet.bench.gpu.compiled import recording
    from motet.bench.gpu.machine_code import read, tensor_instructions

    with recording(90) as found, torch.device("meta"):
        launch_all()
    lines = []
    for launch in found:
        code = read(launch.compiled)
        wgmma = any(name == "HGMMA" for name in code.instructions)
        kernel = {"kernel": launch.kernel, "registers": code.registers, "spilled": code.spilled, "shared": code.shared}
        lines.append({**kernel, "wgmma": wgmma, "tensor": tensor_instructions(code.instructions)})
    print(json.dumps(lines))
    assert lines
    assert all(line["shared"] <= SHARED_LIMIT for line in lines)
