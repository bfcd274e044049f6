"""Which rows the head computes, alone and as the three backends carry it out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.models import make_tail
from helpers.samples import sample_row
from motet.export.bundle_writer import export_bundle
from motet.kernels.native import library
from motet.kernels.oracle.reference import log_softmax
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
    assert (plan.rows, plan.mixes, plan.temperatures) == ([[(3, 1.0)]], [[(0, 1.0)]], [1.0])


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


def test_temperatures_divide_coefficients_before_a_linear_head_and_logits_after_any_other_row():
    terms = [(0, 0, 0.25), (0, 1, 0.75)]
    samples = [
        sample_row(terms, temperatures=(2.0, 0.5), **more) for more in ({}, {"members": True}, {"space": Space.PROBS})
    ]
    plan = plan_head([TWO] * 3, samples, True)
    own = [[(4, 1.0)], [(9, 1.0)]]
    assert plan.rows == [[(4, 0.125), (9, 1.5)], *own, *own]
    assert plan.temperatures == [1.0, 2.0, 0.5, 2.0, 0.5]
    assert plan.mixes[1] == [(1, 0.25), (2, 0.75)]
    bent = plan_head([TWO] * 3, samples, False)
    assert (bent.rows, bent.temperatures) == ([*own] * 3, [2.0, 0.5] * 3)
    alone = sample_row([(0, 0, 1.0), (0, 1, 0.0)], temperatures=(2.0, 0.5))  # the second has no part
    for linear in (True, False):
        plan = plan_head([[(4, 1.0)]], [alone], linear)
        assert (plan.rows, plan.temperatures, plan.mixes) == ([[(4, 1.0)]], [2.0], [[(0, 1.0)]])


# ---- the three backends ----------------------------------------------------------------------------------------------

MIX = (0.5, 0.3, 0.2)
TOLERANCE = 2e-4  # nats: a mix before the head is rounded otherwise than a mix of logits


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


TEMPERATURES = (0.6, 1.0, 1.8)


@pytest.mark.parametrize("linear_head", [True, False])
def test_a_temperature_divides_a_members_logits_before_they_are_mixed(open_backend, linear_head):
    """Against the definition, in double precision, on the members' own logits."""
    backend, _ = open_backend(linear_head=linear_head)
    terms = tuple((0, member, c) for member, c in enumerate(MIX))
    wanted = list(range(0, 259, 7))
    samples = [
        sample_row(terms, space, position=4, logprobs=3, logprob_token_ids=wanted, temperatures=TEMPERATURES, **more)
        for space in Space
        for more in ({}, {"members": True}, {"mask": np.full(10, 0x55555555, np.uint32)}, {"temperature": 0.0})
    ]
    found = step(backend, samples)
    logits = np.stack([backend.score([5, 9, 200, 31], member)[-1] for member in range(3)]).astype(np.float64)
    members = log_softmax(logits / np.array(TEMPERATURES)[:, None])
    mixed = {
        Space.LOGITS: log_softmax(np.tensordot(MIX, logits / np.array(TEMPERATURES)[:, None], 1)),
        Space.PROBS: np.log(np.tensordot(MIX, np.exp(members), 1)),
    }
    for index, sample in enumerate(samples):
        expected = mixed[sample.space]
        np.testing.assert_allclose(found.candidate_logprobs[index], expected[wanted], atol=TOLERANCE)
        assert found.logprobs[index] == pytest.approx(expected[found.token_ids[index]], abs=TOLERANCE)
        if sample.sampling.member_logprobs:
            assert found.member_logprobs[index] == pytest.approx(members[:, found.token_ids[index]], abs=TOLERANCE)
        if sample.sampling.temperature == 0:
            assert found.token_ids[index] == expected.argmax()
    shortest = [
        sample_row(terms, space, position=4, temperature=0.0, temperatures=TEMPERATURES) for space in Space
    ]  # what is read is the token alone
    assert step(backend, shortest).token_ids.tolist() == [int(mixed[space].argmax()) for space in Space]
    plain = [replace(sample, temperatures=()) for sample in samples]
    assert np.abs(np.array(step(backend, plain).logprobs) - found.logprobs).max() > 0.01


def test_temperatures_of_1_change_no_bit(open_backend):
    backend, _ = open_backend()
    plain = samples_of()
    found, same = step(backend, plain), step(backend, [replace(one, temperatures=(1.0, 1.0, 1.0)) for one in plain])
    assert found.token_ids.tolist() == same.token_ids.tolist()
    assert found.logprobs.tolist() == same.logprobs.tolist()
    assert found.member_logprobs == same.member_logprobs


@pytest.mark.parametrize("space", list(Space))
def test_a_member_alone_at_a_temperature_is_the_member(open_backend, space):
    """Its most probable token is its own, and its distribution that of a request at this temperature."""
    backend, _ = open_backend()
    greedy = {"position": 4, "temperature": 0.0, "logprobs": 4, "space": space}
    plain, tempered = step(
        backend, [sample_row([(0, 1, 1.0)], **greedy), sample_row([(0, 1, 1.0)], temperatures=(1.8,), **greedy)]
    ).top_logprobs
    assert [token for token, _ in plain] == [token for token, _ in tempered]
    gaps = [np.diff([value for _, value in top]) for top in (plain, tempered)]
    np.testing.assert_allclose(gaps[1] * 1.8, gaps[0], atol=TOLERANCE)
    draws = [
        step(backend, [sample_row([(0, 1, 1.0)], space, position=4, **how)]).token_ids.tolist()
        for seed in range(8)
        for how in ({"seed": seed, "temperature": 1.8}, {"seed": seed, "temperature": 1.0, "temperatures": (1.8,)})
    ]
    assert draws[::2] == draws[1::2]
