"""What the native CPU kernels compute: every family against the torch page, packed weights against the stored ones, every
instruction set against plain C++."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.models import EXPERTS, FAMILIES
from helpers.native import ISAS, cpu_backend, model_config, tokens_of
from motet.export.bundle_writer import export_bundle
from motet.export.quantisation.groups import dequantise, quantise
from motet.kernels.native.model import ISA_VARIABLE, NativeModel, PackedBatch, Weight
from motet.kernels.native.structs import LinearKind, Vector
from motet.kernels.oracle import reference
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.cpu.backend import CpuBackend
from motet.runtime.checkpoints import decoder
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.engine.engine import Engine
from motet.runtime.engine.open import model_info
from motet.runtime.errors import UnavailableError
from motet.runtime.model.bundle import Bundle
from motet.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.native


def rounded_attention(kv):
    """`scaled_dot_product_attention` (causal, or with a mask) over keys and values as the cache rounds them, in float64. With
    bf16, queries and probabilities are rounded too; a partition of 128 positions is one softmax. With int8 they have 16 bits,
    which is exact beside the rest."""

    def bf16(x):
        return x.bfloat16().to(x.dtype)

    def int8(x):  # [batch, heads, positions, size]: a scale a position and head
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.round(x / scale) * scale

    store, rounded = (bf16, bf16) if kv == "bf16" else (int8, lambda x: x)

    def attention(q, k, v, *, enable_gqa, is_causal=False, attn_mask=None, scale=None, softcap=None):
        assert enable_gqa and is_causal == (attn_mask is None)
        k, v = (store(x).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = rounded(q * (q.shape[-1] ** -0.5 if scale is None else scale) / math.log(2)) @ k.transpose(-1, -2)
        if softcap is not None:  # scores are in powers of 2
            scores = torch.tanh(scores * math.log(2) / softcap) * softcap / math.log(2)
        count = scores.shape[-1]
        visible = torch.ones(count, count).tril().bool() if attn_mask is None else attn_mask
        scores = scores.masked_fill(~visible, -torch.inf)
        top, out, total = scores.amax(-1, keepdim=True), 0, 0
        for part, values in zip(scores.split(128, -1), v.split(128, -2)):
            peak = part.amax(-1, keepdim=True).maximum(top - 1000)
            p, weight = torch.exp2(part - peak), torch.exp2(peak - top)
            out, total = out + weight * (rounded(p) @ values), total + weight * p.sum(-1, keepdim=True)
        return out / total

    return attention


@pytest.fixture(scope="module")
def faint_model_dir(tmp_path_factory, tiny_model_dir):
    """family → model whose embeddings are so small that the epsilon of the first norm counts as much as they do."""
    from safetensors.torch import load_file, save_file

    def make(family):
        path = tmp_path_factory.mktemp("faint") / family
        shutil.copytree(tiny_model_dir(family), path)
        weights = load_file(path / "model.safetensors")
        names = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings")
        embeddings = {n: w / 100 for n, w in weights.items() if n.endswith(tuple(f"{name}.weight" for name in names))}
        assert embeddings
        save_file({**weights, **embeddings}, path / "model.safetensors", {"format": "pt"})
        return path

    return make


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_every_family_is_the_torch_page(faint_model_dir, tmp_path, monkeypatch, family, kv):
    """With weights in 32 bits, over a cache that is rounded alike: what is left is float32, and the few keys and values that
    it rounds to the other side."""
    tokens, model_dir = tokens_of(150), faint_model_dir(family)
    path = export_bundle(model_dir, tmp_path / "bundle", bits=32, graphs=family not in EXPERTS)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounded_attention(kv))
    monkeypatch.setattr(decoder, "softcapped_attention", rounded_attention(kv))
    with torch.no_grad():
        expected = Decoder.from_dir(model_dir).double()(torch.from_numpy(tokens)[None])[0]
    found = cpu_backend(path, kv=kv).score(tokens.tolist(), 0)
    assert relative_error(found, expected) < 0.07  # found 0.007; with an epsilon of 1e-5 in place of 1e-6 it is above 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_packed_weights_are_the_stored_ones(isa, bits, group):
    """A layer that reads its quantised weight out column by column: token k is unit vector k, attention is zero, gate and up
    are the identity, so the MLP's product is 256 times column k. Packing rounds scales and minima to 16 bits: up to
    127 · 2^-11 of a step. A misread value, nibble or minimum is a whole step or more."""
    size = 256  # of the vocabulary, the hidden states and the MLP
    stored = quantise(np.random.default_rng(0).standard_normal((size, size)).astype(np.float32), bits, group)
    sizes = {"vocab_size": size, "hidden_size": size, "intermediate_size": size, "max_positions": size, "num_blocks": 8}
    model, identity = NativeModel(model_config(**sizes), isa=isa), np.eye(size, dtype=np.float32)
    dense = {
        LinearKind.QKV: np.zeros((128, size), np.float32),
        LinearKind.OUT: np.zeros((size, 64), np.float32),
        LinearKind.UP: np.concatenate([identity, identity]),
        LinearKind.HEAD: identity,  # and the embedding
    }
    for which, weight in dense.items():
        model.set_linear(which, 0, Weight(*weight.shape, dense=weight), which.name)
    down = Weight(size, size, bits, group, stored.values, stored.scales, stored.minima)
    model.set_linear(LinearKind.DOWN, 0, down, "down")
    for vector in (Vector.ATTENTION_NORM, Vector.MLP_NORM, Vector.FINAL_NORM):
        model.set_vector(vector, 0, np.ones(size, np.float32), vector.name)
    for vector in (Vector.COS, Vector.SIN):
        model.set_vector(vector, 0, np.ones((size, 8), np.float32), vector.name)
    model.ready()
    rows = np.arange(size)
    hidden = model.step(
        PackedBatch(
            token_ids=rows,
            positions=rows.astype(np.int32),
            slot_mapping=rows,
            cu_seqlens=np.array([0, size], np.int32),
            context_lens=np.array([size], np.int32),
            block_tables=np.arange(8, dtype=np.int32)[None],
            trunk_cached=np.zeros(1, np.bool_),
            freed_blocks=np.empty(0, np.int32),
            members=None,
            outputs=[(0, row) for row in range(size)],
        )
    )
    expected = dequantise(stored).T.astype(np.float64)  # [columns, rows]
    scale = np.sqrt(np.square(identity + 256 * expected).mean(1, keepdims=True))  # what the final norm divides by
    found = (hidden * scale - identity) / 256
    steps = np.repeat(stored.scales[:, : size // group], group, axis=1).T
    assert (np.abs(found - expected) / steps).max() < 0.1


@pytest.mark.parametrize(("bits", "group"), [(8, 16), (8, 32), (8, 64), (4, 16), (4, 32), (4, 64)])
def test_quantised_weights_are_what_the_onnx_backend_reads(bundle_of, bits, group):
    """The same quantised weights, both with 8-bit activations, which they round in places of their own: a misread weight
    would be off by as much as the logits themselves."""
    from motet.runtime.backends.onnx.backend import OnnxBackend

    path, tokens = bundle_of("llama", bits, group), tokens_of(64)
    config = EngineConfig(max_num_seqs=1, max_model_len=128, threads=2)
    expected = OnnxBackend(Bundle.load(path), config).score(tokens.tolist(), 0)
    found = cpu_backend(path, kv="bf16").score(tokens.tolist(), 0)
    assert np.abs(found - expected).mean() < 0.06 * expected.std()


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_every_path_is_the_portable_one(bundle_of, isa, bits, kv):
    """Integer sums are equal on all paths; float sums differ in rounding (no fused multiply-add in plain C++, pairs of bf16
    in one instruction), which the next rounding to 8 bits may turn into a step. So two paths differ by a part of what
    rounding activations to 8 bits costs."""
    tokens = tokens_of(150).tolist()
    exact, eight = (cpu_backend(bundle_of("qwen3", own), isa=ISAS[-1], kv=kv).score(tokens, 0) for own in (32, 8))
    expected = cpu_backend(bundle_of("qwen3", bits), isa=ISAS[-1], kv=kv).score(tokens, 0)
    found = cpu_backend(bundle_of("qwen3", bits), isa=isa, kv=kv).score(tokens, 0)
    assert np.abs(found - expected).mean() < 0.5 * np.abs(eight - exact).mean()


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("isa", ISAS)
def test_two_views_of_the_only_member(bundle_of, isa, bits):
    """A request can mix the only member of a bundle with itself. Greedy, so before the head: the tokens that the oracle
    chooses from the logits of each view alone."""
    config = EngineConfig(max_num_seqs=4, max_model_len=96, threads=2, backend="cpu")
    bundle, mix = Bundle.load(bundle_of("llama-untied", bits)), (1.5, -0.5)
    prompts = tuple(tuple(tokens_of(length, length).tolist()) for length in (40, 7))
    ensemble = Ensemble(tuple(Member(bundle.members[0], c, view) for view, c in enumerate(mix)))
    model, tokenizer = model_info(bundle, config), Tokenizer.from_dir(bundle.path)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with Engine(CpuBackend(bundle, config, isa=isa), tokenizer, model, config) as engine:
        [[answer]] = engine.complete([Request("views", prompts, ensemble, params)])
    alone = cpu_backend(bundle.path, isa=isa)
    rows = [alone.score([*prompt, *answer.token_ids], 0)[len(prompt) - 1 :] for prompt in prompts]
    expected = [int(reference.mix(np.stack(pair), mix, "logits").argmax()) for pair in zip(*rows)]
    assert answer.token_ids == expected[:12]


def test_the_environment_chooses_the_path(bundle_of, monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, "portable")
    chosen = cpu_backend(bundle_of("llama")).score(tokens_of(40).tolist(), 0)
    assert (chosen == cpu_backend(bundle_of("llama"), isa="portable").score(tokens_of(40).tolist(), 0)).all()
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(UnavailableError, match="sse9"):
        cpu_backend(bundle_of("llama"))
