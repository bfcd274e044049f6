"""What sampling parameters come to: the edits of a growing text are the definition's, bit for bit."""

from __future__ import annotations

import numpy as np
from helpers.samples import penalise
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.kernels.oracle.edits import NO_EDITS, apply_edits
from motet.kernels.oracle.truncation import RULES
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.schedule.resolve import LogitEditor, resolve_sampling

VOCAB = 40
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=30)


@st.composite
def parameters(draw):
    pick = st.sampled_from
    return {
        "repetition_penalty": draw(pick([1.0, 1.3, 0.7])),
        "presence_penalty": draw(pick([0.0, 0.6, -0.4])),
        "frequency_penalty": draw(pick([0.0, 0.3])),
        "logit_bias": draw(st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=20)),
    }


@settings(max_examples=300, deadline=None)
@given(
    params=parameters(),
    prompt=tokens,
    output=tokens,
    draft=tokens,
    stop_ids=st.sets(st.integers(0, VOCAB - 1), max_size=4),
    min_tokens=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_edits_are_the_definition(params, prompt, output, draft, stop_ids, min_tokens, seed):
    """At every token of an answer, and at every token of a draft after it; what was handed out before stays as it was."""
    logits = np.random.default_rng(seed).standard_normal(VOCAB) * 4
    editor = LogitEditor(SamplingParams(**params, min_tokens=min_tokens), stop_ids, prompt)

    def expected(drawn):
        forbidden = stop_ids if len(drawn) < min_tokens else ()
        return penalise(logits, prompt, drawn, forbidden=forbidden, **params)

    found = [editor.edits()]
    for token in output:
        editor.observe(token)
        found.append(editor.edits())
    found += editor.edits_along(draft)[1:]
    found.append(editor.edits())
    texts = [[*output, *draft][:count] for count in range(len(output) + len(draft) + 1)] + [output]
    for edits, text in zip(found, texts, strict=True):
        assert len(np.unique(edits.ids)) == len(edits.ids)
        assert np.array_equal(apply_edits(logits, edits), expected(text))


def test_choices_go_their_own_ways():
    params = SamplingParams(frequency_penalty=1.0, logit_bias={1: 2.0})
    whole = LogitEditor(params, (), ())
    choices = [whole.fork() for _ in range(2)]
    choices[0].observe(5)
    choices[1].observe(6)
    assert [choice.edits().ids.tolist() for choice in (*choices, whole)] == [[1, 5], [1, 6], [1]]


def test_what_does_not_change_is_made_once():
    """A map of the whole vocabulary is not converted, nor copied, in every step."""
    editor = LogitEditor(SamplingParams(logit_bias=dict.fromkeys(range(1000), 1.0), min_tokens=1), (3, 2000), (5,))
    editor.observe(5)
    edits = editor.edits()
    editor.observe(6)
    assert editor.edits() is edits
    assert len(edits.ids) == 1000
    assert LogitEditor(SamplingParams(), (3,), (5,)).edits() is NO_EDITS


def test_every_rule_is_a_sampling_parameter_that_is_off_by_default():
    for name, rule in RULES.items():
        assert getattr(SamplingParams(), name) == rule.off
    assert resolve_sampling(SamplingParams(), 1, False).truncation == {}


def test_only_rules_that_are_on_cross_and_none_where_the_draw_is_greedy():
    values = {"min_p": 0.1, "top_k": 5}
    assert resolve_sampling(SamplingParams(**values), 1, False).truncation == values
    assert resolve_sampling(SamplingParams(**values, temperature=0.0), 1, False).truncation == {}
