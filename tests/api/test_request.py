"""Requests are checked when they are made: what, the limit, the value."""

from __future__ import annotations

import math

import pytest
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.limits import MAX_MIX
from motet.runtime.api.request import Ensemble, GenerateRequest, Member, Request, Space, check_embedding
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.errors import ConfigError, InvalidEnsembleError, InvalidRequestError
from motet.runtime.model.config import DecoderConfig


@pytest.mark.parametrize(
    ("members", "space", "message"),
    [
        ([("a", 0.5), ("b", 0.6)], Space.LOGITS, "sums to 1.1"),
        ([("a", 1.5), ("b", -0.5)], Space.PROBS, "need space LOGITS"),
        ([("a", math.nan)], Space.LOGITS, r"must be a number in \[-1000, 1000\], got nan"),
        ([("a", 1e308), ("b", -1e308), ("c", 1.0)], Space.LOGITS, r"in \[-1000, 1000\], got 1e\+308"),
        ([("a", 1.7e308), ("b", 1.7e308)], Space.PROBS, "must be a number in"),
        ([("a", 1000.5), ("b", -999.5)], Space.LOGITS, "got 1000.5"),
        ([("a", 0.5), ("a", 0.5)], Space.LOGITS, "named twice"),
        ([], Space.LOGITS, "1 to 64 members, got 0"),
    ],
)
def test_bad_ensembles(members, space, message):
    with pytest.raises(InvalidEnsembleError, match=message):
        Ensemble(tuple(Member(*member) for member in members), space)


def test_negative_coefficients_in_logits_space():
    assert len(Ensemble((Member("a", 1.5), Member("a", -0.5, view=1))).members) == 2


@pytest.mark.parametrize(
    ("values", "field", "parts"),
    [
        ({"temperature": math.nan}, "temperature", ("[0, 100]", "got nan")),
        ({"temperature": -1}, "temperature", ("[0, 100]", "got -1")),
        ({"top_p": 0}, "top_p", ("(0, 1]", "got 0")),
        ({"top_p": 1.1}, "top_p", ("(0, 1]", "got 1.1")),
        ({"min_p": 2}, "min_p", ("[0, 1]", "got 2")),
        ({"top_k": -1}, "top_k", ("0…", "got -1")),
        ({"max_tokens": 0}, "max_tokens", ("1…", "got 0")),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", ("at most max_tokens (4)", "got 5")),
        ({"repetition_penalty": 0}, "repetition_penalty", ("[0.01, 100]", "got 0")),
        ({"n": 0}, "n", ("1…64", "got 0")),
        ({"n": 65}, "n", ("1…64", "got 65")),
        ({"logprobs": 65}, "logprobs", ("0…64", "got 65")),
        ({"seed": 2**64}, "seed", (f"0…{2**64 - 1}", f"got {2**64}")),
        ({"stop": ("x",) * 65}, "stop", ("stop strings", "at most 64", "65")),
        ({"stop": ("",)}, "stop", ("stop string", "1 to 1024 bytes")),
        ({"logit_bias": {1: math.inf}}, "logit_bias", ("logit_bias", "finite")),
    ],
    ids=str,
)
def test_bad_sampling(values, field, parts):
    """The error names the field; the message has the limit and the value."""
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**values)
    assert caught.value.field == field
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_empty_prompt_and_unknown_view():
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        Request("x", ((),), Ensemble((Member("a", 1.0),)))
    with pytest.raises(InvalidEnsembleError, match="view 2"):
        Request("x", ((1,),), Ensemble((Member("a", 1.0, view=2),)))


def test_negative_coefficients_need_permission():
    ensemble = Ensemble((Member("a", 1.5), Member("a", -0.5, view=1)))
    with pytest.raises(InvalidEnsembleError, match=r"is -0\.5; set allow_negative"):
        GenerateRequest("x", ensemble, ("y",))
    assert GenerateRequest("x", ensemble, ("y",), allow_negative=True).ensemble is ensemble


def test_views_are_there_and_seen():
    def ask(view, *views):
        return GenerateRequest("x", Ensemble((Member("a", 1.0, view),)), views)

    assert ask(1, "y").views == ("y",)
    with pytest.raises(InvalidEnsembleError, match="asks for view 2; the request has 2"):
        ask(2, "y")
    with pytest.raises(InvalidEnsembleError, match="no member sees view 2"):
        ask(1, "y", "z")


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan, "5", True])
def test_time_limits(limit):
    ensemble = Ensemble((Member("a", 1.0),))
    for make in (
        lambda: GenerateRequest("x", time_limit_s=limit),
        lambda: Request("x", ((1,),), ensemble, time_limit_s=limit),
    ):
        with pytest.raises(InvalidRequestError, match="time_limit_s must be a finite number above 0") as caught:
            make()
        assert caught.value.field == "time_limit_s"


@pytest.mark.parametrize("temperature", [0, -1.0, 0.009, 100.5, math.inf, math.nan, "1", True, None])
def test_temperatures_of_members(temperature):
    assert Ensemble((Member("a", 1.0, temperature=0.01),)).members[0].temperature == 0.01
    with pytest.raises(
        InvalidEnsembleError, match=r"the temperature of member 'a' must be a number in \[0.01, 100\]"
    ) as caught:
        Ensemble((Member("a", 1.0, temperature=temperature),))
    assert caught.value.field == "ensemble.members.temperature"


def test_an_embedding_has_no_temperature():
    check_embedding(Ensemble((Member("a", 1.0),)), False)
    with pytest.raises(InvalidEnsembleError, match="a temperature divides logits"):
        check_embedding(Ensemble((Member("a", 1.0, temperature=2.0),)), False)


def test_a_space_by_its_name():
    assert Ensemble((Member("a", 1.0),), "probs").space is Space.PROBS
    with pytest.raises(InvalidEnsembleError, match="got 'sums'"):
        Ensemble((Member("a", 1.0),), "sums")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"sampling": {"n": 2}}, "sampling"),
        ({"ensemble": {"a": 1.0}}, "ensemble"),
        ({"views": "ab"}, "views"),
        ({"request_id": 5}, "request_id"),
    ],
    ids=str,
)
def test_values_of_another_type(values, field):
    with pytest.raises((InvalidRequestError, InvalidEnsembleError), match=field) as caught:
        GenerateRequest("x", **values)
    assert caught.value.field == field


def test_members_are_kept_as_they_were():
    members = [Member("a", 1.0)]
    ensemble = Ensemble(members)
    members.append(Member("b", 1.0))
    assert ensemble.members == (Member("a", 1.0),)
    with pytest.raises(InvalidEnsembleError, match="members must be a list of Member"):
        Ensemble(("a",))
    with pytest.raises(InvalidEnsembleError, match="must be a number in"):
        Ensemble((Member("a", True),))


def test_unknown_configuration_keys_are_refused():
    with pytest.raises(ConfigError, match="max_seqs"):
        EngineConfig.from_dict({"max_seqs": 3})
    with pytest.raises(ConfigError, match="unknown DecoderConfig"):
        DecoderConfig.from_dict({"hidden": 3})
    with pytest.raises(ConfigError, match="max_num_seqs must be"):
        EngineConfig(max_num_seqs=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_coefficient_over_its_temperature_has_the_limit_of_a_coefficient(sign):
    def members(temperature):
        return Member("a", 20.0 * sign, temperature=temperature), Member("b", 1 - 20.0 * sign)

    assert Ensemble(members(20 / MAX_MIX))
    wrong = rf"member 'a' is {20 * sign} and its temperature 0\.01; .* ±1000 in space LOGITS, got {2000 * sign}; raise"
    with pytest.raises(InvalidEnsembleError, match=wrong) as found:
        Ensemble(members(0.01))
    assert found.value.field == "ensemble.members.temperature"
    assert Ensemble((Member("a", 1.0, temperature=0.01),), Space.PROBS)  # it multiplies no logits
