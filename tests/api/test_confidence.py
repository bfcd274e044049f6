"""Confidence and disagreement: their definitions, and what a request must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.runtime.api.confidence import Calibration, disagreement, logit
from motet.runtime.api.request import Ensemble, GenerateRequest, Member, Request
from motet.runtime.errors import InvalidRequestError


def test_members_that_agree_do_not_disagree():
    assert disagreement([-1.5, -1.5, -1.5], [0.2, 0.3, 0.5]) == pytest.approx(0, abs=1e-12)
    assert disagreement([-0.1], [1.0]) == pytest.approx(0, abs=1e-12)
    expected = math.log(0.5 * 0.9 + 0.5 * 0.1) - 0.5 * math.log(0.9) - 0.5 * math.log(0.1)
    assert disagreement([math.log(0.9), math.log(0.1)], [0.5, 0.5]) == pytest.approx(expected)
    assert disagreement([math.log(0.9), math.log(0.1)], [1.5, -0.5]) < expected  # shares of 3/4 and 1/4
    assert 9 < disagreement([-0.7, -math.inf], [0.5, 0.5]) < 11
    assert disagreement([-math.inf, -math.inf], [0.5, 0.5]) == 0


@given(st.lists(st.tuples(st.floats(-60, 0), st.floats(0.01, 5)), min_size=1, max_size=6))
def test_disagreement_is_not_negative(members):
    assert disagreement([p for p, _ in members], [w for _, w in members]) >= 0


def test_confidence_is_a_probability_that_rises_with_the_token_s():
    plain = Calibration(0.0, 1.0, 0.0)
    for p in (0.001, 0.3, 0.9):
        assert plain.confidence(math.log(p), 2.0) == pytest.approx(p)
    doubtful = Calibration(0.1, 0.7, -0.5)
    values = [doubtful.confidence(math.log(p), 0.3) for p in np.linspace(0.01, 1, 30)]
    assert values == sorted(values) and 0 < values[0] < values[-1] < 1
    assert doubtful.confidence(-1.0, 0.0) > doubtful.confidence(-1.0, 1.0)
    assert math.isfinite(logit(0.0)) and math.isfinite(logit(-math.inf))


@pytest.mark.parametrize("kind", [GenerateRequest, Request])
def test_a_request_that_may_abstain_asks_for_confidence(kind):
    def make(**fields):
        if kind is Request:
            return Request("r", ((1, 2),), Ensemble((Member("a", 1.0),)), **fields)
        return GenerateRequest("hello", **fields)

    assert make(abstain_below=0.5).return_confidence
    assert not make().return_confidence
    for bad in (-0.1, 1.1, "0.5", float("nan")):
        with pytest.raises(InvalidRequestError, match="abstain_below must be"):
            make(abstain_below=bad)
    with pytest.raises(InvalidRequestError, match="return_confidence must be"):
        make(return_confidence="yes")
