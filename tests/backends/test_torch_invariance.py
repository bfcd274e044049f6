"""Answers of the torch backend do not depend on the batch, on chunks, cached prefixes, drafts, preemption or padding."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch backend runs on torch")

from helpers.torch_backend import (
    MIX,
    PROMPTS,
    ask,
    assert_same,
    complete_with,
    engine,
    ensemble,
    options,
    run,
)

pytestmark = pytest.mark.slow  # Triton's interpreter, or many steps through torch


def test_solo_is_batched_chunked_and_prefix_cached(torch_bundles):
    rng = np.random.default_rng(1)
    start = tuple(int(t) for t in rng.integers(5, 250, 24))
    prompts = [start + tuple(int(t) for t in rng.integers(5, 250, size)) for size in (1, 7, 12, 0, 20)]
    requests = ask(prompts, [ensemble(**MIX)] * len(prompts), 8)
    changes = {"prefill_chunk": 12, "max_num_batched_tokens": 30, "block_size": 4}
    together = run(torch_bundles / "tails-32", options(), requests, **changes)
    alone = [run(torch_bundles / "tails-32", options(), [r], prefix_cache=False, **changes)[0] for r in requests]
    assert_same(together, alone)


def test_drafted_is_undrafted(torch_bundles):
    """Several sampled rows a sequence: drafts that are verified change no token and no log-probability."""
    prompt = (5, 9, 31, 7, 5, 9, 31, 7, 5, 9, 31, 7, 5, 9)
    requests = ask([prompt, prompt[2:]], [ensemble(**MIX), ensemble(a=1.0)], 24, speculative_tokens=4)
    plain = ask([prompt, prompt[2:]], [ensemble(**MIX), ensemble(a=1.0)], 24)
    widest = 0

    def look(_backend, batch):
        nonlocal widest
        if batch.samples:
            widest = max(widest, int(np.diff(batch.cu_seqlens_q).max()))

    ends = complete_with(torch_bundles / "tails-32", look, requests)
    assert widest > 1  # something was drafted
    assert [ends[name][0] for name in "01"] == [
        tokens for tokens, _ in run(torch_bundles / "tails-32", options(), plain)
    ]


def test_preempted_and_recomputed(torch_bundles):
    """Blocks for little more than one sequence: groups are preempted and come back to the same tokens."""
    requests = ask([PROMPTS[2]] * 2 + [PROMPTS[0]], [ensemble(**MIX)] * 3, 24)
    alone = [run(torch_bundles / "tails-32", options(), [r])[0] for r in requests]
    with engine(torch_bundles / "tails-32", options(), block_size=4, prefix_cache=False) as running:
        running._scheduler.blocks.__init__(15, 4)  # of the 96 that there are
        found = [(c[0].token_ids, np.array(c[0].logprobs)) for c in running.complete(requests)]
    assert_same(found, alone)


def test_padded_steps_are_plain_steps(torch_bundles):
    """Every batch size padded to the ladder (what a GPU captures), with several tails and with adapters."""
    for name, mixes in (
        ("tails-8", [ensemble(**MIX)] * 3),
        ("adapters-8", [ensemble(base=0.5, d=0.5), ensemble(e=1.0)]),
    ):
        requests = ask(PROMPTS[: len(mixes)], mixes, 8)
        found = run(torch_bundles / name, options(graphs=True), requests)
        assert_same(found, run(torch_bundles / name, options(), requests))
