"""What the native sampler refuses, and that no argument makes it write outside its arrays."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motet.kernels.native import library
from motet.kernels.native import sampling as cpu_sample
from motet.kernels.native.sampling import Sample, sample
from motet.kernels.oracle.edits import NO_EDITS, Edits
from motet.runtime.errors import InvalidRequestError, UnavailableError

pytestmark = pytest.mark.native


def edits(ids, divisors=None, penalties=None, biases=None):
    size = len(ids)
    columns = (divisors or [1.0] * size, penalties or [0.0] * size, biases or [0.0] * size)
    return Edits(np.array(ids, np.int64), *map(np.array, columns))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terms": []}, "end of its terms"),
        ({"terms": [(2, 1.0)]}, "row 2 of 2"),
        ({"terms": [(-1, 1.0)]}, "row -1 of 2"),
        ({"terms": [(0, float("nan"))]}, "coefficient"),
        ({"edits": edits([20])}, "edited id is 20"),
        ({"edits": edits([-1])}, "edited id is -1"),
        ({"edits": edits([3, 2**40])}, "edited id"),
        ({"edits": edits([5], divisors=[0.0])}, "divisor of token 5"),
        ({"edits": edits([5], divisors=[float("inf")])}, "divisor"),
        ({"edits": edits([5], penalties=[float("nan")])}, "penalty"),
        ({"edits": edits([5], biases=[float("inf")])}, "bias"),
        ({"edits": edits([5, 6], biases=[1.0])}, "2 tokens need arrays"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"truncation": {"top_k": -1}}, "top_k"),
        ({"truncation": {"top_k": 2**70}}, "top_k"),
        ({"truncation": {"top_p": 0.0}}, "top_p"),
        ({"truncation": {"min_p": 1.5}}, "min_p"),
        ({"truncation": {"other": 1.5}}, "not by"),
        ({"seed": -1}, "seed"),
        ({"logprobs": -1}, "logprobs"),
        ({"edits": replace(NO_EDITS, mask=np.zeros(2, np.uint32))}, "mask"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(InvalidRequestError, match=message):
        sample(np.zeros((2, 20), np.float32), [Sample([(0, 1.0)]), replace(Sample([(1, 1.0)]), **changes)])


def test_bad_logits_arrays_and_paths_are_refused():
    for shape in ((20,), (2, 0)):
        with pytest.raises(InvalidRequestError, match="logits"):
            sample(np.zeros(shape, np.float32), [Sample([(0, 1.0)])])
    with pytest.raises(UnavailableError, match="path 'mmx'"):
        sample(np.zeros((1, 4), np.float32), [Sample([(0, 1.0)])], isa="mmx")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_arguments_never_crash(data):
    """Fields of the C structures at random: an error or a result, and nothing written outside."""
    number = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**62, -(2**63), 2**63 - 1]))
    real = st.floats(allow_nan=True, allow_infinity=True)
    logits = np.zeros((2, 32), np.float32)
    rows, mix = np.array([0, data.draw(number)], np.int64), np.array([0.5, data.draw(st.just(0.5) | real)])
    ids = np.array([data.draw(number) for _ in range(3)], np.int64)
    one = cpu_sample._Sample(num_terms=2, logprobs=-1, top_p=1.0, temperature=1.0)
    for name in data.draw(st.sets(st.sampled_from(["first_term", "num_terms", "top_k", "num_edits"]))):
        setattr(one, name, data.draw(number))
    for name in data.draw(st.sets(st.sampled_from(["temperature", "top_p", "min_p"]))):
        setattr(one, name, data.draw(real))
    values = np.array([data.draw(real) for _ in range(3)])
    one.logprobs = data.draw(st.sampled_from([-5, -1, 0, 3, 4, 2**31 - 1]))
    one.edit_ids, one.num_edits = ids.ctypes.data, min(one.num_edits, 3)
    one.edit_divisors = one.edit_penalties = one.edit_biases = values.ctypes.data
    outputs = [np.full(8, 7, dtype) for dtype in (np.int64, np.int32, np.float64, np.int64, np.float64, np.float64)]
    sampling = cpu_sample._Sampling(
        logits.ctypes.data, 2, data.draw(st.sampled_from([32, 5, -1])), data.draw(st.sampled_from([32, 0, -1, 31])), 2,
        rows.ctypes.data, mix.ctypes.data, 1, ctypes.addressof(one), 3, *(array.ctypes.data for array in outputs),
    )  # fmt: skip
    code = library.load().motet_sample(None, b"", ctypes.byref(sampling))
    used = (1, 1, 1, 3, 3, 2)
    for array, size in zip(outputs, used, strict=True):
        assert (array[size if code == 0 else 0 :] == 7).all()
