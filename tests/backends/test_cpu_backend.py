"""The native CPU kernels: every family against the torch page, every instruction set, bit-exact batch invariance over random
schedules, tails and low-rank members, and a boundary that bad input does not cross."""

from __future__ import annotations

import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.models import FAMILIES, make_tail
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.export.bundle_writer import export_bundle
from motet.export.quantise import dequantise, quantise
from motet.kernels.native import library
from motet.kernels.native.model import BLOCK_SIZE, ISA_VARIABLE, NativeModel, PackedBatch, Weight
from motet.kernels.native.sampling import Sample, Sampling
from motet.kernels.native.structs import LinearKind, ModelConfig, Vector
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.cpu.backend import CpuBackend
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import checkpoint_digest
from motet.runtime.checkpoints.members.adapter import random_adapter, write_adapter
from motet.runtime.errors import BundleError, ConfigError, MotetError, UnavailableError
from motet.runtime.model.bundle import Bundle

pytestmark = pytest.mark.native
ISAS = library.isa_names() if library.is_available() else ()
SCHEDULES = int(os.environ.get("MOTET_TEST_SCHEDULES", "120"))  # of each path; a sanitised run takes fewer
BLOCK = BLOCK_SIZE


def backend(path, *, isa=None, threads=2, kv="int8", length=512, seqs=6):
    config = EngineConfig(max_num_seqs=seqs, max_model_len=length, threads=threads, kv_dtype=kv, backend="cpu")
    return CpuBackend(Bundle.load(path), config, isa=isa)


def tokens_of(length, seed=0, vocab=320):
    return np.random.default_rng(seed).integers(0, vocab, length)


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory, tiny_model_dir):
    """(family, bits, group) → bundle of the base alone."""
    root = tmp_path_factory.mktemp("cpu")

    def make(family, bits=8, group=32):
        path = root / f"{family}-{bits}-{group}"
        if not path.exists():
            export_bundle(tiny_model_dir(family), path, bits=bits, group_size=group)
        return path

    return make


@pytest.fixture(scope="module")
def mixed_bundle(tmp_path_factory, tiny_model_dir):
    """bits → bundle with two tails, the base, and two low-rank members."""
    root = tmp_path_factory.mktemp("mixed")
    model_dir = tiny_model_dir("llama")
    tails = {name: make_tail(model_dir, root / name, name, seed, 0.3) for seed, name in enumerate("ab")}
    loras = {name: make_adapter(model_dir, root / name, seed) for seed, name in enumerate("xy")}

    def make(bits):
        path = root / f"mixed-{bits}"
        if not path.exists():
            export_bundle(model_dir, path, tails={**tails, "base": None}, loras=loras, bits=bits)
        return path

    return make


def make_adapter(model_dir, out, seed):
    adapter = random_adapter(Decoder.from_dir(model_dir), None, 4, seed=seed, scale=0.05)
    write_adapter(out, {"base": {"name": "tiny", "digest": checkpoint_digest(model_dir)}, "rank": 4}, adapter)
    return out


# ---- what is computed -----------------------------------------------------------------------------------------------


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

    def attention(q, k, v, *, enable_gqa, is_causal=False, attn_mask=None):
        assert enable_gqa and is_causal == (attn_mask is None)
        k, v = (store(x).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = rounded(q * q.shape[-1] ** -0.5 / math.log(2)) @ k.transpose(-1, -2)  # powers of 2
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
        embeddings = {
            n: w / 100 for n, w in weights.items() if n.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight"))
        }
        save_file({**weights, **embeddings}, path / "model.safetensors", {"format": "pt"})
        return path

    return make


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_torch_page(faint_model_dir, tmp_path, monkeypatch, family, kv):
    """With weights in 32 bits, over a cache that is rounded alike: what is left is float32, and the few keys and values that
    it rounds to the other side."""
    tokens, model_dir = tokens_of(150), faint_model_dir(family)
    path = export_bundle(model_dir, tmp_path / "bundle", bits=32)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounded_attention(kv))
    with torch.no_grad():
        expected = Decoder.from_dir(model_dir).double()(torch.from_numpy(tokens)[None])[0]
    found = backend(path, kv=kv).score(tokens.tolist(), 0)
    assert relative_error(found, expected) < 0.07  # found 0.007; with an epsilon of 1e-5 in place of 1e-6 it is above 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_packed_weights_are_the_stored_ones(isa, bits, group):
    """A layer that reads its quantised weight out column by column: token k is unit vector k, attention is zero, gate and up
    are the identity, so the MLP's product is 256 times column k. Packing rounds scales and minima to 16 bits: up to
    127 · 2^-11 of a step. A misread value, nibble or zero point is a whole step or more."""
    size = 256  # of the vocabulary, the hidden states and the MLP
    stored = quantise(np.random.default_rng(0).standard_normal((size, size)).astype(np.float32), bits, group)
    sizes = {"vocab_size": size, "hidden_size": size, "intermediate_size": size, "max_positions": size, "num_blocks": 8}
    model, identity = NativeModel(model_config(**sizes), isa), np.eye(size, dtype=np.float32)
    dense = {
        LinearKind.QKV: np.zeros((128, size), np.float32),
        LinearKind.OUT: np.zeros((size, 64), np.float32),
        LinearKind.UP: np.concatenate([identity, identity]),
        LinearKind.HEAD: identity,  # and the embedding
    }
    for which, weight in dense.items():
        model.set_linear(which, 0, Weight(*weight.shape, dense=weight), which.name)
    down = Weight(size, size, bits, group, stored.values, stored.scales, stored.zero_points)
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
            adapters=np.array([-1], np.int32),
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
    found = backend(path, kv="bf16").score(tokens.tolist(), 0)
    assert np.abs(found - expected).mean() < 0.06 * expected.std()


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_every_path_is_the_portable_one(bundle_of, isa, bits, kv):
    """Integer sums are equal on all paths; float sums differ in rounding (no fused multiply-add in plain C++, pairs of bf16
    in one instruction), which the next rounding to 8 bits may turn into a step."""
    tokens = tokens_of(150).tolist()
    expected = backend(bundle_of("qwen3", bits), isa=ISAS[-1], kv=kv).score(tokens, 0)
    found = backend(bundle_of("qwen3", bits), isa=isa, kv=kv).score(tokens, 0)
    assert np.abs(found - expected).mean() < 0.01 * expected.std()


def test_the_environment_chooses_the_path(bundle_of, monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, "portable")
    chosen = backend(bundle_of("llama")).score(tokens_of(40).tolist(), 0)
    assert (chosen == backend(bundle_of("llama"), isa="portable").score(tokens_of(40).tolist(), 0)).all()
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(UnavailableError, match="sse9"):
        backend(bundle_of("llama"))


# ---- batch invariance -----------------------------------------------------------------------------------------------


class Driver:
    """Runs sequences through a native model as a random schedule says, and checks every hidden state it asks for."""

    def __init__(self, path, isa, kv):
        self.bundle = Bundle.load(path)
        self.models = [backend(path, isa=isa, threads=threads, kv=kv)._model for threads in (1, 2)]
        self.num_blocks = 6 * 512 // BLOCK
        self.num_members = len(self.bundle.members)
        self.texts = [tokens_of(length, seed) for seed, length in enumerate((1, 33, 70, 140, 290))]
        self.expected = {}

    def run(self, model, work, tables, wanted):
        """`work`: (text, adapter, first, last); wanted: {(index into work, row): members}. Hidden states in the order asked."""
        width = max(map(len, tables))
        starts = np.cumsum([0, *(last - first for _, _, first, last in work)])
        positions = [np.arange(first, last) for _, _, first, last in work]
        slots = [table[at // BLOCK].astype(np.int64) * BLOCK + at % BLOCK for table, at in zip(tables, positions)]
        outputs = sorted((member, int(starts[i] + row)) for (i, row), members in wanted.items() for member in members)
        batch = PackedBatch(
            token_ids=np.concatenate([self.texts[t][first:last] for t, _, first, last in work]),
            positions=np.concatenate(positions).astype(np.int32),
            slot_mapping=np.concatenate(slots),
            cu_seqlens=starts.astype(np.int32),
            context_lens=np.array([last for *_, last in work], np.int32),
            block_tables=np.array(
                [np.pad(table, (0, width - len(table)), constant_values=-1) for table in tables], np.int32
            ),
            adapters=np.array([adapter for _, adapter, *_ in work], np.int32),
            members=[list(range(len(work))) for _ in range(self.num_members)] if self.num_members > 1 else None,
            outputs=outputs,
        )
        hidden = self.models[model].step(batch)
        return outputs, starts, hidden

    def reference(self, text, adapter):
        """Hidden states [positions, members] of a text alone, a row at a time, on one thread."""
        if (text, adapter) not in self.expected:
            table, rows = np.arange(512 // BLOCK), []
            for at in range(len(self.texts[text])):
                members = range(self.num_members)
                rows.append(self.run(0, [(text, adapter, at, at + 1)], [table], {(0, 0): members})[2])
            self.expected[text, adapter] = np.stack(rows)
        return self.expected[text, adapter]

    def schedule(self, rng):
        """Random sequences in random blocks, cut at random, in random company, on one or two threads; some begin after a
        prefix that another one computed, some lose their blocks and are computed again."""
        model, free, live, done = int(rng.integers(2)), rng.permutation(self.num_blocks), [], {}
        for _ in range(rng.integers(1, 6)):
            text, adapter = int(rng.integers(len(self.texts))), int(rng.choice([-1, *self.bundle.adapters]))
            own, free = np.split(free, [-(-len(self.texts[text]) // BLOCK)])
            live.append(
                SimpleNamespace(text=text, adapter=adapter, at=0, own=own, table=own, size=len(self.texts[text]))
            )
        while live:
            chosen = [s for s in live if rng.random() < 0.8] or live[:1]
            for s in chosen:
                twin = done.get((s.text, s.adapter))
                if s.at == 0 and twin is not None and rng.random() < 0.7:  # a cached prefix
                    shared = int(rng.integers(0, (s.size - 1) // BLOCK + 1))
                    s.table, s.at = np.concatenate([twin[:shared], s.own[shared:]]), shared * BLOCK
                elif s.at and rng.random() < 0.05:  # preempted: again from the start, in other blocks
                    s.at, s.own = 0, rng.permutation(s.own)
                    s.table = s.own
            lasts = [min(s.size, s.at + int(rng.choice([1, 1, 2, 7, 40, 300]))) for s in chosen]
            self.step(rng, model, chosen, lasts)
            for s, last in zip(chosen, lasts):
                s.at = last
                if last == s.size:
                    done[s.text, s.adapter] = s.table
            live = [s for s in live if s.at < s.size]

    def step(self, rng, model, chosen, lasts):
        """One packed batch; every state that it asks for must be the reference's, bit for bit."""
        work = [(s.text, s.adapter, s.at, last) for s, last in zip(chosen, lasts)]
        wanted = {}
        for i, (_, _, first, last) in enumerate(work):
            for row in {last - first - 1, int(rng.integers(last - first))}:
                wanted[i, row] = rng.permutation(self.num_members)[: rng.integers(1, self.num_members + 1)].tolist()
        outputs, starts, hidden = self.run(model, work, [s.table for s in chosen], wanted)
        for (member, row), state in zip(outputs, hidden, strict=True):
            i = int(np.searchsorted(starts, row, side="right")) - 1
            text, adapter, first, _ = work[i]
            position = int(first + row - starts[i])
            assert np.array_equal(state, self.reference(text, adapter)[position, member]), (
                text,
                adapter,
                position,
                member,
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "kv"), [(8, "int8"), (4, "int8"), (8, "bf16")])
def test_bits_do_not_depend_on_the_batch(mixed_bundle, isa, bits, kv):
    """Every hidden state has the same bits alone, one row at a time on one thread, and in any schedule: other sequences
    beside it, other chunks, other blocks, shared prefixes, recomputed, one or two threads."""
    driver = Driver(mixed_bundle(bits), isa, kv)
    for text, adapter in [(t, d) for t in range(len(driver.texts)) for d in (-1, *driver.bundle.adapters)]:
        driver.reference(text, adapter)
    count = SCHEDULES if isa != "portable" else SCHEDULES // 8  # plain C++ is slower by an order of magnitude
    for seed in range(count):
        driver.schedule(np.random.default_rng(seed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("family", "kv"), [("mistral", "int8"), ("mistral", "bf16"), ("qwen2-window", "int8")])
def test_bits_over_a_window_do_not_depend_on_the_batch(bundle_of, isa, family, kv):
    """As above where rows see a window only; in qwen2's first layers they see everything."""
    driver = Driver(bundle_of(family), isa, kv)
    for text in range(len(driver.texts)):
        driver.reference(text, -1)
    for seed in range(SCHEDULES // 8):
        driver.schedule(np.random.default_rng(seed))


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 127, 128, 129, 150, 200, 511, 2**31 - 1])
def test_a_window_of_any_size(tiny_model_dir, tmp_path, window):
    """Decoded row by row and as one prompt, over more than two partitions of the cache: the torch page."""
    shutil.copytree(tiny_model_dir("mistral"), tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(values | {"sliding_window": window}))
    export_bundle(tmp_path / "m", tmp_path / "b", bits=32)
    tokens = tokens_of(290)
    with torch.no_grad():
        decoder = Decoder.from_dir(tmp_path / "m")
        expected = decoder.norm(decoder.run_layers(decoder.embed(torch.from_numpy(tokens)[None]), 0, 4))[0].numpy()
    driver = Driver(tmp_path / "b", ISAS[0], "bf16")
    driver.texts = [tokens]
    error = np.abs(driver.reference(0, -1)[:, 0] - expected)
    assert error.mean() < 0.015 * expected.std()
    driver.step(np.random.default_rng(0), 1, [SimpleNamespace(text=0, adapter=-1, at=0, table=np.arange(16))], [290])


def test_a_window_of_nothing_is_refused(bundle_of):
    with pytest.raises(BundleError, match="the window is 0"):
        backend(bundle_of("llama"))._model.set_window(0, 0)


def test_logits_of_a_row_do_not_depend_on_the_others(bundle_of):
    model = backend(bundle_of("llama"))._model
    hidden = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    together = model.head(hidden).copy()
    for count in (1, 2, 3, 5, 6, 7, 12, 13, 31):
        assert (model.head(hidden[:count]) == together[:count]).all()


# ---- the boundary ---------------------------------------------------------------------------------------------------


def valid_step():
    """Two sequences of a one-member model: a chunk of 20 rows and a decode row at position 0."""
    tables = np.array([[0], [1]], np.int32)
    return {
        "token_ids": np.arange(21),
        "positions": np.array([*range(20), 0], np.int32),
        "slot_mapping": np.array([*range(20), BLOCK]),
        "cu_seqlens": np.array([0, 20, 21], np.int32),
        "context_lens": np.array([20, 1], np.int32),
        "block_tables": tables,
        "adapters": np.array([-1, -1], np.int32),
        "members": None,
        "outputs": [(0, 19), (0, 20)],
    }


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("token_ids", 3, 320, "token id 320 is not in"),
        ("token_ids", 3, -1, "token id -1"),
        ("positions", 3, 7, "row 3 is not at position 3"),
        ("slot_mapping", 5, 10**12, "row 5 has a slot outside"),
        ("slot_mapping", 5, -1, "row 5 has a slot outside"),
        ("cu_seqlens", 1, 0, "sequence 0 has no rows"),
        ("cu_seqlens", 1, 2**30, "sequence 0 has no rows"),
        ("cu_seqlens", 2, 20, "do not span"),
        ("context_lens", 0, 19, "allowed are 20 to"),
        ("context_lens", 0, 2**30, "allowed are 20 to"),
        ("block_tables", (0, 0), -1, "block -1"),
        ("block_tables", (0, 0), 2**30, "is not in the cache"),
        ("adapters", 0, 1, "adapter of no member"),
    ],
)
def test_a_bad_batch_is_refused_and_nothing_else_happens(bundle_of, field, index, value, message):
    model = backend(bundle_of("llama"))._model
    expected = model.step(PackedBatch(**valid_step()))
    bad = valid_step()
    bad[field][index] = value
    with pytest.raises(MotetError, match=message):
        model.step(PackedBatch(**bad))
    for outputs in ([(0, 21)], [(0, -1)], [(1, 0)], [(-1, 0)], [(0, 5), (0, 5)], [(0, 6), (0, 5)]):
        with pytest.raises(MotetError, match="output"):
            model.step(PackedBatch(**{**valid_step(), "outputs": outputs}))
    assert (model.step(PackedBatch(**valid_step())) == expected).all()


@pytest.mark.parametrize(
    ("terms", "sample_terms", "message"),
    [
        ([[(1, 1.0)]], [(0, 1.0)], "a hidden state that is not there"),
        ([[(-1, 1.0)]], [(0, 1.0)], "a hidden state that is not there"),
        ([[]], [(0, 1.0)], "row 0 has no terms"),
        ([[(0, 1.0)]], [(1, 1.0)], "term 0 has row 1 of 1"),
        ([[(0, 1.0)]], [(0, float("nan"))], "not finite"),
    ],
)
def test_a_bad_mix_is_refused_before_anything_is_computed(bundle_of, terms, sample_terms, message):
    model = cached_model(bundle_of("llama"))
    batch = PackedBatch(**{**valid_step(), "outputs": [(0, 5)]})
    sampling = Sampling([Sample(sample_terms, temperature=0.0)], model.vocab_size)
    sampling.result.token_ids[:] = 7
    with pytest.raises(MotetError, match=message):
        model.generate(batch, terms, [True], sampling.struct)
    assert sampling.result.token_ids.tolist() == [7]
    sampling = Sampling([Sample([(0, 1.0)], temperature=0.0)], model.vocab_size)
    for written in (1, -1):
        with pytest.raises(MotetError, match=f"written row {written} is not in 0…0"):
            model.generate(batch, [[(0, 1.0)]], [True], sampling.struct, [written])
    logits = model.generate(batch, [[(0, 1.0)]], [False], sampling.struct, [0])
    assert (logits == model.head(model.step(batch))).all()
    assert sampling.result.token_ids.tolist() == [logits[0].argmax()]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_batches_do_not_crash(bundle_of, data):
    """Any integers in the arrays: a result or a typed error."""
    model = cached_model(bundle_of("llama"))
    batch = valid_step()
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from([name for name in batch if isinstance(batch[name], np.ndarray)]))
        flat = batch[field].reshape(-1)
        limit = np.iinfo(flat.dtype)
        value = data.draw(st.one_of(st.integers(-2, 40), st.integers(int(limit.min), int(limit.max))))
        flat[data.draw(st.integers(0, flat.size - 1))] = value
    batch["outputs"] = data.draw(st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 25)), max_size=4))
    try:
        hidden = model.step(PackedBatch(**batch))
    except MotetError:
        return
    assert hidden.shape == (len(batch["outputs"]), 64)


_models = {}


def cached_model(path):
    if path not in _models:
        _models[path] = backend(path)._model
    return _models[path]


def test_a_nan_stays_in_its_row(bundle_of):
    model = backend(bundle_of("llama"))._model
    hidden = np.ones((3, 64), np.float32)
    hidden[1, 7] = np.nan
    logits = model.head(hidden)
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[[0, 2]]).all()


def model_config(**changes):
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 16,
        "max_positions": 64,
        "tied_head": 1,
        "split_layer": 1,
        "num_members": 1,
        "kv_int8": 1,
        "num_blocks": 4,
        "threads": 1,
        "norm_eps": 1e-5,
    }
    return ModelConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"head_size": 17}, "head_size is 17"),
        ({"head_size": 512}, "head_size is 512"),
        ({"hidden_size": 65}, "hidden_size is 65"),
        ({"intermediate_size": 100}, "intermediate_size is 100"),
        ({"num_kv_heads": 3}, "no multiple"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"split_layer": 2}, "split_layer"),
        ({"threads": 10_000}, "threads"),
    ],
)
def test_sizes_that_the_kernels_do_not_have(changes, message):
    with pytest.raises(UnavailableError, match=message):
        NativeModel(model_config(**changes))


def test_weights_that_do_not_fit():
    model = NativeModel(model_config())

    def weight(rows=128, columns=64, bits=8, group=32, groups=2, **changes):
        values = np.zeros((rows, groups, group * bits // 8), np.uint8)
        fields = {"values": values, "scales": np.ones((rows, groups), np.float32)} | changes
        return Weight(rows, columns, bits, group, **fields)

    bad = {
        "the model needs": weight(rows=100),
        "bits must be": weight(bits=2),
        "group_size must be": weight(group=48),
        "does not divide": weight(group=128, groups=1),
        "another number of groups": weight(groups=3),
        "are missing": weight(bits=4, groups=3),
        "needs values or dense": weight(values=None, scales=None),
    }
    for message, tensor in bad.items():
        with pytest.raises(BundleError, match=f"qkv.*{message}"):
            model.set_linear(LinearKind.QKV, 0, tensor, "qkv")
    for layer in (-1, 1):
        with pytest.raises(BundleError, match="no layer"):
            model.set_linear(LinearKind.QKV, layer, weight(), "qkv")
    with pytest.raises(BundleError, match="needs 64"):
        model.set_vector(Vector.ATTENTION_NORM, 0, np.ones(63, np.float32), "norm")
    with pytest.raises(BundleError, match="an adapter comes after"):
        model.set_adapter(LinearKind.QKV, 0, 0, np.ones((2, 64)), np.ones((128, 2)), "adapter")
    model.set_linear(LinearKind.QKV, 0, weight(), "qkv")
    for a, b in (
        (np.ones((2, 63)), np.ones((128, 2))),
        (np.ones((2, 64)), np.ones((127, 2))),
        (np.ones((2, 64)), np.ones((128, 3))),
    ):
        with pytest.raises(BundleError, match="adapter"):
            model.set_adapter(LinearKind.QKV, 0, 0, a, b, "adapter")
    with pytest.raises(BundleError, match="is missing"):
        model.ready()
    with pytest.raises(MotetError, match="not ready"):
        model.head(np.ones((1, 64), np.float32))


def test_scales_that_do_not_match_their_values(bundle_of):
    """A bundle whose arrays disagree is refused before a byte of it is read."""
    scales = np.ones((128, 1), np.float32)
    weight = Weight(128, 64, 8, 32, values=np.zeros((128, 2, 32), np.uint8), scales=scales)
    with pytest.raises(BundleError, match="scales"):
        NativeModel(model_config()).set_linear(LinearKind.QKV, 0, weight, "qkv")


def test_a_score_longer_than_the_cache(bundle_of):
    with pytest.raises(ConfigError, match="blocks of KV cache"):
        backend(bundle_of("llama"), seqs=1, length=64).score(list(range(65)), 0)
