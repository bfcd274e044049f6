"""The table of sampling fields: what is taken, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from motet.runtime.api.sampling import DEFAULTS, HELP, RULES, SamplingParams, check_names
from motet.runtime.errors import InvalidRequestError

FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]


def test_every_field_has_a_rule_a_help_and_a_lawful_default():
    assert list(RULES) == list(HELP) == list(DEFAULTS) == FIELDS
    for name in FIELDS:
        assert HELP[name].endswith(".")
        default = DEFAULTS[name]
        assert default is None or RULES[name].check(name, default) == default


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_what_is_of_no_use(name):
    text = "" if name == "stop" else "text"  # an empty stop string would end every answer
    for value in (object(), text, 1j, [object()]):
        with pytest.raises(InvalidRequestError, match=name) as caught:
            SamplingParams(**{name: value})
        assert caught.value.field == name
    if DEFAULTS[name] is not None:
        with pytest.raises(InvalidRequestError, match="got None"):
            SamplingParams(**{name: None})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer in 1…2147483647, got 0"),
        ({"max_tokens": 2**31}, "got 2147483648"),
        ({"max_tokens": True}, "got True"),
        ({"top_k": 1.0}, "top_k must be an integer in 0…2147483647, got 1.0"),
        ({"top_k": np.arange(3)}, "got array"),
        ({"top_p": 0}, r"top_p must be a number in \(0, 1\], got 0"),
        ({"min_p": 1.5}, r"min_p must be a number in \[0, 1\], got 1.5"),
        ({"temperature": 10**400}, r"temperature must be a number in \[0, 100\], got 1000"),
        ({"temperature": True}, "got True"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be a number in \[0.01, 100\], got 0"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"stop": b"ab"}, "64 stop strings of 1 to 1024 bytes"),
        ({"stop": ("x" * 1025,)}, "every one of the stop strings must be text of 1 to 1024 bytes"),
        ({"stop": ("\ud800",)}, "UTF-8"),
        ({"stop": ("x",) * 65}, "65 stop strings; at most 64 are allowed"),
        ({"stop_token_ids": range(65)}, "65 stop token ids; at most 64"),
        ({"stop_token_ids": 7}, "a list of at most 64 stop token ids, got 7"),
        ({"stop_token_ids": (-1,)}, "every id in stop_token_ids must be"),
        ({"logit_bias": {"5": 1.0}}, "every id in logit_bias must be"),
        ({"logit_bias": {5: float("inf")}}, "every logit_bias must be a finite number, got inf"),
        ({"logit_bias": [(5, 1.0)]}, "a mapping of at most 65536 token ids to finite numbers"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens must be at most max_tokens \(4\), got 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_say_field_limit_and_value(values, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        SamplingParams(**values)
    assert caught.value.field == next(iter(values))


def test_values_get_one_type():
    params = SamplingParams(
        max_tokens=np.int64(5),
        temperature=np.float32(0.5),
        top_p=Fraction(1, 2),
        stop="ab",
        stop_token_ids=np.array([3, 4]),
        logit_bias={np.int32(7): 1},
    )
    expected = SamplingParams(5, temperature=0.5, top_p=0.5, stop=("ab",), stop_token_ids=(3, 4), logit_bias={7: 1.0})
    assert params == expected
    assert [type(value) for value in (params.max_tokens, params.temperature, params.top_p)] == [int, float, float]
    assert params.stop == ("ab",), "one text is one stop string, not its letters"
    assert type(next(iter(params.logit_bias))) is int


def test_params_do_not_share_the_callers_objects():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 99.0
    assert params.logit_bias == {1: 2.0}


def test_unknown_names():
    check_names(["top_k", "mix"], ["mix"])
    with pytest.raises(InvalidRequestError, match=r"unknown option 'topk'; known are .*'top_k'"):
        check_names(["topk"])
