"""Bits of the native CPU kernels do not depend on the batch: random schedules on every path, with tails, adapters and windows."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import make_adapter, make_tail
from helpers.native import ISAS, cpu_backend, tokens_of
from motet.export.bundle_writer import export_bundle
from motet.kernels.native.library import EMULATED
from motet.kernels.native.model import BLOCK_SIZE as BLOCK
from motet.kernels.native.model import PackedBatch
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.model.bundle import Bundle

pytestmark = pytest.mark.native
SCHEDULES = int(os.environ.get("MOTET_TEST_SCHEDULES", "120"))  # of each path; a sanitised run takes fewer


@pytest.fixture(scope="module")
def mixed_bundle(tmp_path_factory, tiny_model_dir):
    """bits → bundle with two tails, the base, and two low-rank members, over a trunk of two layers."""
    root = tmp_path_factory.mktemp("mixed")
    model_dir = tiny_model_dir("llama")
    tails = {name: make_tail(model_dir, root / name, name, seed, 0.3) for seed, name in enumerate("ab")}
    loras = {name: make_adapter(model_dir, root / name, seed, layers=2) for seed, name in enumerate("xy")}

    def make(bits):
        path = root / f"mixed-{bits}"
        if not path.exists():
            export_bundle(model_dir, path, tails={**tails, "base": None}, loras=loras, bits=bits)
        return path

    return make


class Driver:
    """Runs sequences through a native model as a random schedule says, and checks every hidden state it asks for."""

    def __init__(self, path, isa, kv):
        self.bundle = Bundle.load(path)
        backends = [cpu_backend(path, isa=isa, threads=threads, kv=kv) for threads in (1, 2)]
        self.models, self.keeps_trunk = [backend._model for backend in backends], backends[0].keeps_trunk
        self.num_blocks = 6 * 512 // BLOCK
        self.num_members = len(self.bundle.members)
        self.texts = [tokens_of(length, seed) for seed, length in enumerate((1, 33, 70, 140, 290))]
        self.expected = {}

    def run(self, model, work, tables, wanted, freed=()):
        """`work`: (text, first, last, members, whether the trunk is cached); wanted: {(index into work, row): members}. Hidden
        states in the order asked."""
        width = max(map(len, tables))
        starts = np.cumsum([0, *(last - first for _, first, last, *_ in work)])
        positions = [np.arange(first, last) for _, first, last, *_ in work]
        slots = [table[at // BLOCK].astype(np.int64) * BLOCK + at % BLOCK for table, at in zip(tables, positions)]
        outputs = sorted((member, int(starts[i] + row)) for (i, row), members in wanted.items() for member in members)
        sequences = [[i for i, (*_, own, _) in enumerate(work) if member in own] for member in range(self.num_members)]
        batch = PackedBatch(
            token_ids=np.concatenate([self.texts[t][first:last] for t, first, last, *_ in work]),
            positions=np.concatenate(positions).astype(np.int32),
            slot_mapping=np.concatenate(slots),
            cu_seqlens=starts.astype(np.int32),
            context_lens=np.array([last for _, _, last, *_ in work], np.int32),
            block_tables=np.array(
                [np.pad(table, (0, width - len(table)), constant_values=-1) for table in tables], np.int32
            ),
            trunk_cached=np.array([cached for *_, cached in work]),
            members=sequences if self.num_members > 1 else None,
            outputs=outputs,
            freed_blocks=np.array(freed, np.int32),
        )
        hidden = self.models[model].step(batch)
        return outputs, starts, hidden

    def reference(self, text):
        """Hidden states [positions, members] of a text alone, a row at a time, on one thread."""
        if text not in self.expected:
            table, members, rows = np.arange(512 // BLOCK), tuple(range(self.num_members)), []
            for at in range(len(self.texts[text])):
                rows.append(self.run(0, [(text, at, at + 1, members, False)], [table], {(0, 0): members})[2])
            self.expected[text] = np.stack(rows)
        return self.expected[text]

    def schedule(self, rng):
        """Random sequences of random members in random blocks, cut at random, in random company, on one or two threads; some
        begin after a prefix that another one computed, for the same members or for others, some lose their blocks and
        are computed again."""
        model, free, live, done = int(rng.integers(2)), rng.permutation(self.num_blocks), [], {}
        freed = free if rng.random() < 0.5 else ()
        for _ in range(rng.integers(1, 6)):
            text = int(rng.integers(len(self.texts)))
            members = tuple(sorted(rng.permutation(self.num_members)[: rng.integers(1, self.num_members + 1)].tolist()))
            own, free = np.split(free, [-(-len(self.texts[text]) // BLOCK)])
            size = len(self.texts[text])
            live.append(
                SimpleNamespace(text=text, members=members, at=0, trunk=0, missing=(), own=own, table=own, size=size)
            )
        while live:
            chosen = [s for s in live if rng.random() < 0.8] or live[:1]
            for s in chosen:
                twin = done.get(s.text)
                if s.at == 0 and twin is not None and rng.random() < 0.7:  # a cached prefix
                    self.share(rng, s, twin)
                elif s.at and rng.random() < 0.05:  # preempted: again from the start, in other blocks
                    freed = s.own
                    s.at, s.trunk, s.own = 0, 0, rng.permutation(s.own)
                    s.table = s.own
            lasts = [min(s.size, s.at + int(rng.choice([1, 1, 2, 7, 40, 300]))) for s in chosen]
            lasts = [min(last, s.trunk) if s.at < s.trunk else last for s, last in zip(chosen, lasts)]
            self.step(rng, model, chosen, lasts, freed)
            freed = ()
            for s, last in zip(chosen, lasts):
                s.at = last
                if last == s.size:
                    done[s.text] = s
            live = [s for s in live if s.at < s.size]

    def share(self, rng, s, twin):
        """Begin with some of the blocks of a sequence that has ended."""
        shared = int(rng.integers(0, (s.size - 1) // BLOCK + 1))
        missing = tuple(member for member in s.members if member not in twin.members)
        if missing and not self.keeps_trunk:
            return
        s.table, s.missing, s.trunk = np.concatenate([twin.table[:shared], s.own[shared:]]), missing, shared * BLOCK
        s.at = 0 if missing else s.trunk

    def step(self, rng, model, chosen, lasts, freed):
        """One packed batch; every state that it asks for must be the reference's, bit for bit."""
        work = [
            (s.text, s.at, last, s.missing if s.at < s.trunk else s.members, s.at < s.trunk)
            for s, last in zip(chosen, lasts)
        ]
        wanted = {}
        for i, (_, first, last, members, _) in enumerate(work):
            for row in {last - first - 1, int(rng.integers(last - first))}:
                wanted[i, row] = rng.permutation(members)[: rng.integers(1, len(members) + 1)].tolist()
        outputs, starts, hidden = self.run(model, work, [s.table for s in chosen], wanted, freed)
        for (member, row), state in zip(outputs, hidden, strict=True):
            i = int(np.searchsorted(starts, row, side="right")) - 1
            text, first, *_ = work[i]
            position = int(first + row - starts[i])
            assert np.array_equal(state, self.reference(text)[position, member]), (text, position, member)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "kv"), [(8, "int8"), (4, "int8"), (8, "bf16")])
def test_bits_do_not_depend_on_the_batch(mixed_bundle, isa, bits, kv):
    """Every hidden state has the same bits alone, one row at a time on one thread, and in any schedule: other sequences
    beside it, other chunks, other blocks, shared prefixes, recomputed, one or two threads."""
    driver = Driver(mixed_bundle(bits), isa, kv)
    assert driver.keeps_trunk
    for text in range(len(driver.texts)):
        driver.reference(text)
    slow = isa in ("portable", EMULATED)  # plain C++ is slower by an order of magnitude
    count = SCHEDULES // 8 if slow else SCHEDULES
    for seed in range(count):
        driver.schedule(np.random.default_rng(seed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("family", "kv"),
    [
        *(("mistral", "int8"), ("mistral", "bf16"), ("qwen2-window", "int8"), ("gemma2", "int8"), ("gemma2", "bf16")),
        *(("gemma3_text", "int8"), ("granite", "int8"), ("olmo2", "int8"), ("phi3-long", "int8")),
        *(("olmoe", "int8"), ("qwen3_moe", "bf16"), ("gpt_neox", "int8"), ("falcon", "int8"), ("falcon-new", "bf16")),
    ],
)
def test_bits_of_a_family_do_not_depend_on_the_batch(bundle_of, isa, family, kv):
    """As above where rows see a window only; in qwen2's first layers they see everything."""
    driver = Driver(bundle_of(family), isa, kv)
    for text in range(len(driver.texts)):
        driver.reference(text)
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
    error = np.abs(driver.reference(0)[:, 0] - expected)
    assert error.mean() < 0.015 * expected.std()
    whole = SimpleNamespace(text=0, members=(0,), at=0, trunk=0, table=np.arange(16))
    driver.step(np.random.default_rng(0), 1, [whole], [290], ())


def test_logits_of_a_row_do_not_depend_on_the_others(bundle_of):
    model = cpu_backend(bundle_of("llama"))._model
    hidden = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    together = model.head(hidden).copy()
    for count in (1, 2, 3, 5, 6, 7, 12, 13, 31):
        assert (model.head(hidden[:count]) == together[:count]).all()
