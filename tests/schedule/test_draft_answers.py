"""No answer depends on drafts: over the fake backend and on the native kernels."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import fake_backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.model_info import ModelInfo
from motet.runtime.api.request import Ensemble, FinishReason, Member, Request, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, InvalidRequestError


def make_engine(tokenizer, *, num_blocks=60, order=1, **config) -> Engine:
    values = {"max_num_seqs": 8, "max_model_len": 96, "max_num_batched_tokens": 24, "prefill_chunk": 8} | config
    ensemble = Ensemble((Member("a", 1.0),))
    model = ModelInfo("fake", ("a", "b", "c"), ensemble, (255,), 256, values["max_model_len"])
    return Engine(fake_backend.FakeBackend(num_blocks, 4, order=order), tokenizer, model, EngineConfig(**values))


@st.composite
def requests(draw):
    """Texts that repeat themselves (a Markov chain of order 1), ended by everything that can end them."""
    result = []
    for index in range(draw(st.integers(1, 4))):
        text = np.random.default_rng(draw(st.integers(0, 3))).integers(0, 9, draw(st.integers(1, 12)))
        prompts = [tuple(text.tolist()) * draw(st.integers(1, 3)), *([(7, 8)] if draw(st.booleans()) else [])]
        members = [Member("a", 0.6), Member(draw(st.sampled_from("bc")), 0.4, len(prompts) - 1)]
        params = SamplingParams(
            max_tokens=draw(st.integers(1, 50)),
            min_tokens=draw(st.integers(0, 1)) * draw(st.integers(0, 1)),
            temperature=draw(st.sampled_from([0.0, 0.3, 0.7])),
            seed=draw(st.integers(0, 2**64 - 1)),
            ignore_eos=draw(st.booleans()),
            stop=draw(st.sampled_from([(), ("e", "th"), ("1",)])),
            stop_token_ids=draw(st.sampled_from([(), (3, 100, 200)])),
            n=draw(st.integers(1, 2)),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.2])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.3])),
            logit_bias=draw(st.sampled_from([{}, dict.fromkeys(range(9), 4.0)])),
            logprobs=draw(st.sampled_from([None, 2])),
            speculative_tokens=draw(st.sampled_from([None, 0, 3, 16])),
        )
        ensemble = Ensemble(tuple(members), draw(st.sampled_from(list(Space))))
        member_logprobs = draw(st.booleans())
        result.append(Request(f"r{index}", tuple(prompts), ensemble, params, return_member_logprobs=member_logprobs))
    return result


def told(choices):
    """Everything that a client is told, but for times."""
    return [
        (c.token_ids, c.text, c.finish_reason, c.stop_matched, c.top_logprobs, c.member_logprobs, c.usage)
        for c in choices
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests(), st.sampled_from([1, 2, None]), st.integers(40, 80), st.integers(1, 24))
@pytest.mark.slow
def test_no_answer_depends_on_drafts(tokenizer, batch, order, num_blocks, max_rows):
    """Greedy and sampled, with penalties, stops and several views, while blocks and rows are short."""
    with make_engine(tokenizer, order=order, num_blocks=300, prefix_cache=False) as engine:
        plain = [engine.complete([request])[0] for request in batch]
    config = {"speculative_tokens": 6, "prefix_cache": False, "max_num_batched_tokens": max_rows}
    with make_engine(tokenizer, order=order, num_blocks=num_blocks, **config) as engine:
        speculative = engine.complete(batch)
        engine._scheduler.check_integrity()
        assert engine.stats().free_blocks == num_blocks
    assert [told(choices) for choices in speculative] == [told(choices) for choices in plain]
    with make_engine(tokenizer, order=order, num_blocks=num_blocks, **config | {"prefix_cache": True}) as engine:
        for _ in range(2):
            shared = engine.complete(batch)
            assert [[c.token_ids for c in choices] for choices in shared] == [
                [c.token_ids for c in choices] for choices in plain
            ]


def test_a_text_that_repeats_itself_takes_fewer_steps(tokenizer):
    request = Request(
        "x", ((1, 2),), Ensemble((Member("a", 1.0),)), SamplingParams(80, temperature=0.0, ignore_eos=True)
    )
    found = []
    for tokens in (0, 8):
        deltas = []
        with make_engine(tokenizer, speculative_tokens=tokens) as engine:
            whole = engine.complete([request], on_output=deltas.append)[0][0]
            stats = engine.stats()
        assert [t for delta in deltas for t in delta.token_ids] == whole.token_ids
        assert len(whole.token_ids) == 80 == stats.tokens
        found.append((stats.steps, stats.accepted_tokens, whole.token_ids, max(len(d.token_ids) for d in deltas)))
    assert found[0][:2] == (81, 0)
    assert found[1][0] == 81 - found[1][1] < 60
    assert found[0][2] == found[1][2]
    assert found[1][3] > 1


def test_a_stop_string_inside_a_draft(tokenizer):
    """The text ends where it does without drafts, and usage counts the tokens up to there."""
    bias = dict.fromkeys(range(64, 90), 50.0)
    plain = Request("x", ((65,),), Ensemble((Member("a", 1.0),)), SamplingParams(80, temperature=0.0, logit_bias=bias))
    with make_engine(tokenizer) as engine:
        text = engine.complete([plain])[0][0].text
    for at in range(30, 60):
        params = SamplingParams(80, min_tokens=at, temperature=0.0, logit_bias=bias, stop=(text[at : at + 2],))
        with make_engine(tokenizer, speculative_tokens=16) as engine:
            found = engine.complete([Request("y", plain.prompts, plain.ensemble, params)])[0][0]
            assert engine.stats().accepted_tokens > 10
        assert found.finish_reason is FinishReason.STOP
        assert found.usage.completion_tokens == len(found.token_ids) == len(found.text) + 2


def test_only_where_the_backend_can_verify(tokenizer, monkeypatch):
    monkeypatch.setattr(fake_backend.FakeBackend, "can_verify", False)
    with make_engine(tokenizer, speculative_tokens=8) as engine:
        request = Request("x", ((1, 2),), Ensemble((Member("a", 1.0),)), SamplingParams(60, temperature=0.0))
        engine.complete([request])
        assert engine.stats().drafted_tokens == 0


@pytest.mark.parametrize("value", [-1, 65])
def test_bad_sizes_are_refused(value):
    with pytest.raises(ConfigError, match="speculative_tokens"):
        EngineConfig(speculative_tokens=value)
    with pytest.raises(InvalidRequestError, match="speculative_tokens"):
        SamplingParams(speculative_tokens=value)


@pytest.mark.native
def test_native_answers_do_not_depend_on_drafts_or_cached_prefixes(tiny_model_dir, tmp_path):
    """A mix of two tails and two views on the native kernels: their rows have the same bits alone and together."""
    export_bundle(tiny_model_dir("llama"), tmp_path / "b", tails={"a": None, "b": None}, num_tail_layers=2)
    ensemble = Ensemble((Member("a", 0.9), Member("b", 0.4), Member("a", -0.3, 1)))
    prompts = ((*range(60), 5, 6, 7) * 2, (5, 6, 7))
    few = dict.fromkeys(range(3), 30.0)  # a text of three tokens repeats itself
    batch = [
        Request(
            f"{i}", prompts, ensemble, SamplingParams(60, temperature=t, seed=i, repetition_penalty=p, logit_bias=few)
        )
        for i, (t, p) in enumerate([(0.0, 1.0), (0.5, 1.0), (0.2, 1.1), (0.0, 1.1)])
    ]
    found = []
    for config in ({"prefix_cache": False}, {}, {"speculative_tokens": 8}):
        config = EngineConfig(backend="cpu", max_model_len=256, threads=2, **config)
        with Engine.from_bundle(tmp_path / "b", config) as engine:
            found += [[told(choices)[0][:4] for choices in engine.complete(batch)] for _ in range(2)]
            stats = engine.stats()
    assert all(answers == found[0] for answers in found)
    assert stats.cached_tokens > 0
    assert stats.accepted_tokens > 20
