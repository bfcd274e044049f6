"""Which rows the head computes, alone and as the three backends carry it out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.models import make_tail
from helpers.samples import sample_row
from motet.export.bundle_writer import export_bundle
from motet.kernels.native import library
from motet.kernels.oracle.truncation import RULES, Rule
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Space
from motet.runtime.backends.cpu.backend import CpuBackend
from motet.runtime.backends.onnx.backend import OnnxBackend
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.config import DecoderConfig
from motet.runtime.sampling.terms import plan_head
from motet.runtime.schedule.batch import Batch

TWO = [(4, 0.25), (9, 0.75)]


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("space", list(Space))
def test_a_member_alone_is_one_row_everywhere(space, linear):
    plan = plan_head([[(3, 1.0)]], [sample_row(space=space)], linear)
    assert (plan.rows, plan.mixes) == ([[(3, 1.0)]], [[(0, 1.0)]])


def test_a_mix_is_one_row_before_a_linear_head_and_a_row_a_member_otherwise():
    samples = [sample_row(), sample_row(members=True), sample_row(space=Space.PROBS)]
    own = [[(4, 1.0)], [(9, 1.0)]]
    linear = plan_head([TWO] * 3, samples, True)
    assert linear.rows == [TWO, *own, *own]
    assert linear.mixes == [[(0, 1.0)], [(1, 0.25), (2, 0.75)], [(3, 0.25), (4, 0.75)]]
    bent = plan_head([TWO] * 3, samples, False)
    assert bent.rows == [*own] * 3
    assert bent.mixes == [[(2 * i, 0.25), (2 * i + 1, 0.75)] for i in range(3)]


def test_only_a_greedy_draw_that_reports_nothing_needs_no_more_than_the_largest():
    plain = {"temperature": 0.0}
    others = [{}, {"logprobs": 0}, {"logit_bias": {1: 1.0}}, {"forbidden": (1,)}, {"mask": np.ones(3, np.uint32)}]
    samples = [sample_row(**plain, top_k=3), *(sample_row(**{**plain, **other} if other else {}) for other in others)]
    assert plan_head([TWO] * len(samples), samples, True).greedy == [True, *[False] * len(others)]
    assert plan_head([TWO], [sample_row(**plain)], False).greedy == [False, False]


# ---- the three backends ----------------------------------------------------------------------------------------------

MIX = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny_model_dir):
    """A tiny model with three tails, in 32 bits: heads differ by rounding alone."""
    root, model_dir = tmp_path_factory.mktemp("terms"), tiny_model_dir("llama")
    tails = {name: make_tail(model_dir, root / name, name, seed, 0.3) for seed, name in enumerate("abc")}
    export_bundle(model_dir, root / "bundle", tails=tails, bits=32)
    return Bundle.load(root / "bundle")


@pytest.fixture(params=["cpu", "onnx", "torch"])
def open_backend(request, bundle, monkeypatch):
    """linear_head → (backend, list that gets the number of head rows of each step)."""
    kind = request.param
    if kind == "cpu" and not library.is_available():
        pytest.skip("the native kernels were not built (no C++ compiler)")
    if kind == "torch":
        pytest.importorskip("torch", reason="the torch backend runs on torch")

    def make(linear_head=True):
        with monkeypatch.context() as patch:  # the backends ask when they are made
            patch.setattr(DecoderConfig, "linear_head", linear_head)
            return opened()

    def opened():
        config = EngineConfig(backend=kind, max_num_seqs=2, max_model_len=64, threads=2)
        counts = []

        def counting(compute, rows_of):
            def run(*args):
                counts.append(len(rows_of(args)))
                return compute(*args)

            return run

        if kind == "cpu":
            backend = CpuBackend(bundle, config)
            monkeypatch.setattr(backend._model, "generate", counting(backend._model.generate, lambda args: args[1]))
        elif kind == "onnx":
            backend = OnnxBackend(bundle, config)
            monkeypatch.setattr(backend, "_logits", counting(backend._logits, lambda args: args[0]))
        else:
            import torch
            from motet.runtime.backends.torch.backend import TorchBackend
            from motet.runtime.backends.torch.options import TorchOptions

            options = TorchOptions(torch.device("cpu"), torch.float32, "eager", keep_quantised=True, graphs=False)
            backend = TorchBackend(bundle, config, options)
            monkeypatch.setattr(backend._sampler, "_head", counting(backend._sampler._head, lambda args: args[0]))
        return backend, counts

    return make


def step(backend, samples):
    """Prefill three tokens, then draw from the fourth."""

    def batch(tokens, first, drawn):
        count = len(tokens)
        blocks = -(-8 // backend.block_size)
        return Batch(
            token_ids=np.array(tokens, np.int64),
            positions=np.arange(first, first + count, dtype=np.int32),
            slot_mapping=np.arange(first, first + count, dtype=np.int64),
            cu_seqlens_q=np.array([0, count], np.int32),
            context_lens=np.array([first + count], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            members=[(0, 1, 2)],
            trunk_cached=np.zeros(1, np.bool_),
            samples=drawn,
            freed_blocks=np.empty(0, np.int32),
        )

    backend.step(batch([5, 9, 200], 0, []))
    return backend.step(batch([31], 3, samples))


def samples_of(**values):
    terms = tuple((0, member, c) for member, c in enumerate(MIX))
    return [
        sample_row(terms, space, position=4, logprobs=3, **values, **more)
        for space in Space
        for more in ({}, {"members": True}, {"mask": np.full(10, 0x55555555, np.uint32)})
    ]


def test_a_head_that_is_not_linear_has_a_row_a_member_and_says_the_same(open_backend):
    """The tiny model's head is linear all the same, so both plans must draw the same tokens."""
    linear, counts = open_backend()
    expected = step(linear, samples_of())
    assert counts[-1] == 1 + 3 + 1 + 9
    bent, counts = open_backend(linear_head=False)
    found = step(bent, samples_of())
    assert counts[-1] == 6 * 3
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_allclose(found.member_logprobs[1], expected.member_logprobs[1], atol=1e-4)


def test_members_with_coefficient_0_have_log_probabilities_of_their_own(open_backend):
    """One per member of the ensemble, in its order: each is the member's when it is asked alone."""
    backend, _ = open_backend()
    mixes = [(0.0, 1.0, 0.0), (0.4, 0.0, 0.6)]
    samples = [
        sample_row([(0, member, c) for member, c in enumerate(mix)], space, position=4, members=True, temperature=0.0)
        for mix in mixes
        for space in Space
    ]
    found = step(backend, samples)
    alone = step(open_backend()[0], [sample_row([(0, m, 1.0)], position=4, logprobs=64) for m in range(len(MIX))])
    for token_id, values in zip(found.token_ids.tolist(), found.member_logprobs, strict=True):
        assert len(values) == len(MIX)
        for value, top in zip(values, alone.top_logprobs, strict=True):
            if token_id in dict(top):
                assert value == pytest.approx(dict(top)[token_id], abs=1e-4)


def test_a_plain_draw_is_not_mixed_before_a_head_that_is_not_linear(open_backend):
    """What needs neither log-probabilities nor edits takes the shortest way a backend has."""
    terms = tuple((0, member, c) for member, c in enumerate(MIX))
    for values in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 11}):
        (linear, _), (bent, counts) = open_backend(), open_backend(linear_head=False)
        found = step(bent, [sample_row(terms, position=4, **values)])
        assert counts[-1] == 3
        assert found.token_ids == step(linear, [sample_row(terms, position=4, **values)]).token_ids


def test_a_rule_that_is_not_fused_is_applied_and_its_neighbours_are_as_without(open_backend, monkeypatch):
    """The rule keeps the second most probable token alone; every backend computes it from the row of logits."""
    plain = samples_of(top_k=5)
    monkeypatch.setitem(RULES, "second", Rule(0.0, lambda tempered, _value: tempered == np.sort(tempered)[-2]))
    ruled = [replace(one, sampling=replace(one.sampling, truncation={"second": 1.0})) for one in plain]
    together = [one for pair in zip(plain, ruled, strict=True) for one in pair]
    backend, _ = open_backend()
    found, alone = step(backend, together), step(open_backend()[0], plain)
    assert found.token_ids[::2].tolist() == alone.token_ids.tolist()
    np.testing.assert_allclose(found.logprobs[::2], alone.logprobs, atol=1e-5)
    for index in (1, 3, 7, 9):  # the others have a mask
        assert found.token_ids[index] == found.top_logprobs[index][1][0]
        assert found.logprobs[index] == pytest.approx(found.top_logprobs[index][1][1])
    assert all(token % 2 == 0 for token in found.token_ids[[5, 11]])
    assert len(found.member_logprobs[3]) == 3
