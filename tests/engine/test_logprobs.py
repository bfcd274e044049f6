"""Log-probabilities of a prompt, and of chosen tokens: those of the mixed distribution, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.fake_backend import FakeBackend, ask, gather, make_engine
from motet.kernels.oracle.reference import log_softmax, mix
from motet.runtime.api.request import Ensemble, Member, Space
from motet.runtime.errors import InvalidRequestError

PROMPT = tuple(np.random.default_rng(0).integers(0, 255, 40).tolist())
MIX = Ensemble((Member("a", 0.25), Member("c", 0.75)), Space.PROBS)


class OneAtATime(FakeBackend):
    can_verify = False


def expected(prompt, ensemble=MIX):
    """From the members' logits at every position."""
    backend = FakeBackend()
    rows = []
    for position in range(len(prompt) - 1):
        logits = [backend.score(prompt[: position + 1], "abc".index(m.name))[-1] for m in ensemble.members]
        mixed = mix(np.stack(logits), [m.mix for m in ensemble.members], ensemble.space)
        rows.append(log_softmax(mixed))
    return np.array(rows)


@pytest.mark.parametrize("kind", [FakeBackend, OneAtATime])
def test_they_are_those_of_the_mix(tokenizer, kind):
    with make_engine(tokenizer, kind()) as engine:
        plain = engine.complete([ask("p", PROMPT, ensemble=MIX, temperature=0.9, seed=3)])[0][0]
        answer = engine.complete([ask("q", PROMPT, ensemble=MIX, temperature=0.9, seed=3, prompt_logprobs=3)])[0][0]
    rows = expected(PROMPT)
    np.testing.assert_allclose(answer.prompt_logprobs, rows[np.arange(39), PROMPT[1:]], atol=1e-5)
    for found, row in zip(answer.prompt_top_logprobs, rows, strict=True):
        assert [token for token, _ in found] == np.argsort(-row)[:3].tolist()
    assert (answer.text, answer.token_ids) == (plain.text, plain.token_ids)
    assert answer.usage.prompt_tokens == 40
    assert answer.logprobs == []


def test_in_a_batch_and_preempted(tokenizer):
    """With others, drafts, choices, and so few blocks that groups are preempted, also in the middle of a prompt."""
    requests = [
        ask(f"r{i}", PROMPT[i : i + 30], ensemble=MIX, prompt_logprobs=i % 3, seed=i, temperature=0.8, n=1 + i % 2)
        for i in range(6)
    ]
    with make_engine(tokenizer, FakeBackend(200)) as engine:
        alone = [engine.complete([request])[0] for request in requests]
    with make_engine(tokenizer, FakeBackend(14), speculative_tokens=4) as engine:
        together = gather(engine, requests)
        assert engine.stats().preemptions > 0
    for request, answers in zip(requests, alone):
        for choice, answer in enumerate(answers):
            other = together[request.request_id, choice]
            assert other.token_ids == answer.token_ids
            assert other.prompt_logprobs == answer.prompt_logprobs
            assert other.prompt_top_logprobs == answer.prompt_top_logprobs
            assert len(answer.prompt_logprobs) == (29 if choice == 0 else 0)


def test_one_token_has_none(tokenizer):
    with make_engine(tokenizer) as engine:
        answer = engine.complete([ask("p", (5,), prompt_logprobs=1)])[0][0]
        assert (answer.prompt_logprobs, len(answer.token_ids)) == ([], 12)


def test_penalties_see_no_prompt_as_answer(tokenizer):
    options = {"frequency_penalty": 1.5, "repetition_penalty": 1.3, "temperature": 0.0}
    with make_engine(tokenizer, FakeBackend(order=1)) as engine:
        answers = [
            engine.complete([ask("p", PROMPT, **options, **more)])[0][0] for more in ({}, {"prompt_logprobs": 0})
        ]
        assert answers[0].token_ids == answers[1].token_ids


def test_of_views_they_are_refused(tokenizer):
    mix = Ensemble((Member("a", 0.5), Member("a", 0.5, 1)))
    with make_engine(tokenizer) as engine, pytest.raises(InvalidRequestError, match="see different ones"):
        engine.complete([ask("p", views=[(4, 5)], ensemble=mix, prompt_logprobs=0)])


@pytest.mark.parametrize("kind", [FakeBackend, OneAtATime])
def test_chosen_tokens_are_reported_beside_each_token(tokenizer, kind):
    """Those of the mix before penalties, temperature and structure, in the order of the request; nothing else changes."""
    options = {"temperature": 0.9, "seed": 3, "max_tokens": 12, "logit_bias": {7: -3.0}, "speculative_tokens": 4}
    with make_engine(tokenizer, kind()) as engine:
        plain = engine.complete([ask("p", PROMPT, ensemble=MIX, **options)])[0][0]
        asked = ask("q", PROMPT, ensemble=MIX, logprob_token_ids=(7, 250, 7), **options)
        answer = engine.complete([asked])[0][0]
        with pytest.raises(InvalidRequestError, match="token id 900 in logprob_token_ids"):
            engine.complete([ask("r", PROMPT, logprob_token_ids=(900,))])
    rows = expected((*PROMPT, *answer.token_ids))[len(PROMPT) - 1 :]
    np.testing.assert_allclose(answer.candidate_logprobs, rows[:, [7, 250, 7]], atol=1e-5)
    assert (answer.token_ids, answer.logprobs) == (plain.token_ids, [])
