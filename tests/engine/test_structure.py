"""Answers that must have a form: whatever is drawn keeps to it, and nothing else of the answer changes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time

import numpy as np
import pytest
from helpers.fake_backend import FakeBackend
from helpers.structures import FOUR, check_schema, structure_engine
from motet.runtime.api.request import FinishReason, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.api.structure import Structure, StructureKind
from motet.runtime.errors import InvalidRequestError, UnavailableError
from motet.runtime.text.grammar import Grammars

TEXT = {"type": "string", "maxLength": 8}
NODE = {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}}
BOTH = [{"properties": {"a": TEXT}, "required": ["a"]}, {"properties": {"b": TEXT}, "required": ["b"]}]
CLOSED = {"type": "object", "additionalProperties": False}
SCHEMAS = [
    CLOSED | {"properties": {"a": TEXT, "b": {"type": "integer"}}, "required": ["b"]},
    {"type": "array", "items": {"enum": ["red", "green", None, 3]}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [{"const": "x"}, {"type": "boolean"}], "items": False},
    {"type": "integer", "minimum": -7, "exclusiveMaximum": 12},
    {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 20},
    {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$"},
    {"type": "string", "format": "date"},
    {"$ref": "#/$defs/node", "$defs": {"node": CLOSED | NODE | {"required": ["next"]}}},
    {"allOf": BOTH, "type": "object", "additionalProperties": TEXT, "maxProperties": 3},
    CLOSED | {"patternProperties": {"^k[0-9]$": {"type": "boolean"}}, "maxProperties": 3},
    {"type": ["boolean", "integer"]},
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, TEXT],
        "additionalItems": False,
    },
]


@pytest.fixture(scope="module")
def engine(tokenizer):
    with structure_engine(tokenizer) as engine:
        yield engine


def ask(engine, structure, **options):
    params = SamplingParams(**({"max_tokens": 200, "temperature": 1.0, "seed": 1} | options))
    prompt = tuple(engine.tokenizer.encode("hello"))
    return engine.complete([Request("s", (prompt,), FOUR, params, structure=structure)])[0]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_json_of_a_schema(engine, schema):
    assert check_schema(engine, schema) == 0, "max_tokens cut it: nothing was shown"


def test_every_kind(engine):
    for seed in range(5):
        [answer] = ask(engine, Structure.regex(r"(foo|ba[rz])[0-9]{3}"), seed=seed)
        assert re.fullmatch(r"(foo|ba[rz])[0-9]{3}", answer.text)
        [answer] = ask(engine, Structure.choice(["yes", "no", 'not "sure"\n', "größe", "a/b|c"]), seed=seed)
        assert answer.text in {"yes", "no", 'not "sure"\n', "größe", "a/b|c"}
        [answer] = ask(engine, Structure.grammar('start: "(" start ")" | "x"'), seed=seed)
        assert re.fullmatch(r"\(*x\)*", answer.text)
        assert answer.text.count("(") == answer.text.count(")")
        assert answer.finish_reason is FinishReason.STOP
        [answer] = ask(engine, Structure.json_object(), seed=seed, max_tokens=60)
        if answer.finish_reason is FinishReason.STOP:
            assert isinstance(json.loads(answer.text), dict)
        assert answer.text.startswith("{")


def test_it_ends_where_nothing_may_follow(engine):
    [answer] = ask(engine, Structure.choice(["abc"]))
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("abc", FinishReason.STOP, 3)


def test_log_probabilities_are_those_of_free_text(engine):
    """Of the mixed distribution before the structure forbids anything."""
    [answer] = ask(engine, Structure.choice(["abc"]), logprobs=2, temperature=0.0)
    prompt = tuple(engine.tokenizer.encode("hello"))
    scores = SamplingParams(max_tokens=1, temperature=0.0, logprobs=64)
    [[free]] = engine.complete([Request("f", (prompt,), FOUR, scores)])
    assert answer.top_logprobs[0] == free.top_logprobs[0][:2]
    assert answer.logprobs[0] <= answer.top_logprobs[0][1][1], "'a' is none of the best two here"


def test_drafts_choices_and_preemption_change_nothing(tokenizer):
    """What the structure forces is drafted; n choices follow it apart; so few blocks that groups are preempted."""
    schema = CLOSED | {"properties": {"long_name": TEXT, "other_name": TEXT}, "required": ["long_name", "other_name"]}
    structure = Structure.json_schema(schema)
    found, steps = [], []
    for blocks, draft, options in ((1200, 0, {}), (1200, None, {}), (1200, 6, {}), (26, None, {"max_model_len": 100})):
        with structure_engine(tokenizer, FakeBackend(blocks, vocab_size=259, num_members=4), **options) as engine:
            answers = ask(engine, structure, n=5, speculative_tokens=draft, max_tokens=80)
            found.append([(answer.text, answer.token_ids, answer.finish_reason) for answer in answers])
            steps.append(engine.stats().steps)
            if blocks == 26:
                assert engine.stats().preemptions > 0
    assert found[0] == found[1] == found[2] == found[3]
    assert len({text for text, _, _ in found[0]}) == 5
    assert steps[1] < 0.7 * steps[0], "what is forced is drawn many tokens a step"


def test_with_penalties_and_confidence_of_the_rest(engine):
    [answer] = ask(
        engine, Structure.regex("[ab]{6}"), frequency_penalty=2.0, repetition_penalty=1.2, top_k=5, top_p=0.9
    )
    assert re.fullmatch("[ab]{6}", answer.text)


def wide(i, j):
    return {"properties": {f"a{i}{j}": {}}}


DEEP = '{"items":' * 100 + "{}" + "}" * 100
HOSTILE = {
    "not JSON": ("json_schema", "{"),
    "no object": ("json_schema", "true"),
    "unknown type": ("json_schema", '{"type": "foo"}'),
    "false": ("json_schema", '{"type": "object", "properties": {"a": false}, "required": ["a"]}'),
    "fetches": ("json_schema", '{"$ref": "http://127.0.0.1:1/x"}'),
    "unsupported": ("json_schema", '{"not": {"type": "string"}}'),
    "deep": ("json_schema", DEEP),
    "very deep": ("json_schema", DEEP * 60),
    "wide": ("json_schema", json.dumps({"allOf": [{"anyOf": [wide(i, j) for i in range(6)]} for j in range(8)]})),
    "parentheses": ("regex", "(" * 30_000),
    "too large": ("regex", "a" * 70_000),
    "bomb": ("regex", "(?:(?:.{0,500}){0,500}){0,500}"),
    "lark": ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "unknown rule": ("grammar", "start: foo"),
    "a chain of rules": ("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3000)) + 'r3000: "a"'),
    "empty": ("regex", ""),
    "no choice": ("choice", "[]"),
    "choice of numbers": ("choice", "[1, 2]"),
    "unknown kind": ("yaml", "x"),
    "too much": ("json_object", "{}"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_refused(engine, case):
    kind, spec = HOSTILE[case]
    began = time.monotonic()
    with pytest.raises(InvalidRequestError) as refused:
        ask(engine, Structure(kind, spec))
    assert time.monotonic() - began < 1
    assert refused.value.field == "structure"
    assert len(str(refused.value)) < 400


def test_a_grammar_that_is_too_slow_ends_its_request_alone(engine):
    """An ambiguous grammar costs more with each token."""
    slow = Structure.grammar('start: s\ns: s s | "a" | s s s | "aa"')
    with pytest.raises(InvalidRequestError, match="too complex"):
        ask(engine, slow, max_tokens=400, logit_bias={258: -50})  # it shall not end before
    assert ask(engine, Structure.choice(["abc"]))[0].text == "abc"


@pytest.mark.parametrize("name", ["ignore_eos", "min_tokens"])
def test_what_contradicts_a_structure_is_refused(engine, name):
    with pytest.raises(InvalidRequestError, match=name):
        ask(engine, Structure.json_object(), **{name: True if name == "ignore_eos" else 3})


def test_kinds_have_their_makers():
    assert {getattr(Structure, str(kind)).__name__ for kind in StructureKind} == {str(kind) for kind in StructureKind}


def deep(links=50, levels=58):
    """A schema of few levels whose references together are thousands deep."""
    parts = {}
    for index in range(links):
        part = {"$ref": f"#/$defs/{index + 1}"}
        for _ in range(levels):
            part = {"items": part}
        parts[str(index)] = part
    return json.dumps({"$ref": "#/$defs/0", "$defs": parts | {str(links): {"type": "null"}}}, separators=(",", ":"))


BREAKING = {
    "deeper than the stack": Structure.json_schema(deep()),
    "the same in a grammar": Structure.grammar(f"start: %json {deep()}"),
    "a machine of a million states": Structure.json_schema('{"type": "integer", "multipleOf": 100000007}'),
    "a product of two": Structure.json_schema(
        '{"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}'
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKING)
def test_what_would_end_or_stop_the_process_is_refused(tried, name):
    """It is tried in another process, and refused at once when it comes again."""
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="takes more than"):
            tried.matcher(BREAKING[name])
    assert tried.matcher(Structure.json_object()).mask().any(), "others go on"


@pytest.mark.slow
def test_who_ends_the_other_process_harms_nobody(tried):
    """It is started again; and what was refused for want of time is not refused for good."""
    tried.matcher(Structure.regex("a+"))
    tried._trial._process.kill()
    tried._trial._process.wait()
    assert tried.matcher(Structure.regex("b+")).mask().any()
    os.kill(tried._trial._process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, tried._trial._process.pid, os.WSTOPPED)  # its threads do not stop at the same moment
    with pytest.raises(UnavailableError, match="busy"):
        tried.matcher(Structure.regex("c+"))
    assert tried.matcher(Structure.regex("c+")).mask().any()


def test_many_open_files_do_not_matter(tried):
    files = [open(os.devnull) for _ in range(1100)]  # noqa: SIM115
    try:
        tried.close()
        assert tried.matcher(Structure.regex("d+")).mask().any()
    finally:
        for file in files:
            file.close()


@pytest.fixture(scope="module")
def tried(tokenizer):
    grammars = Grammars(tokenizer, 259, [257])
    grammars.tries_first = True
    yield grammars
    grammars.close()


def test_answers_do_not_use_up_what_they_share(tokenizer):
    """All answers of a structure fill one lexer; each still has what it would have alone, also if it has begun already."""
    grammars = Grammars(tokenizer, 259, [257])
    structure = Structure.regex(r"(\w\w?\w?x){1,600}")
    early = grammars.matcher(structure, "a")
    rng, failures, renewed = random.Random(0), 0, False
    for _ in range(40):
        matcher = grammars.matcher(structure, "a")
        for _ in range(250):
            allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
            if not len(allowed):
                failures += 1
                break
            matcher.accept(int(rng.choice(allowed)))
        renewed |= matcher._again is None
    assert failures == 0
    assert early.mask().any()


def test_a_structure_that_fails_keeps_the_cache(engine):
    """Its answer ends with an error, and what is cached of its prompt is no worse for it."""
    prompt = tuple(engine.tokenizer.encode("hello " * 40))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    engine.complete([Request("a", (prompt,), FOUR, params)])
    slow = Structure.grammar('start: s\ns: s s | "a" | s s s | "aa"')
    until_it_fails = SamplingParams(max_tokens=400, temperature=1.0, seed=1, logit_bias={258: -50})
    with pytest.raises(InvalidRequestError, match="too complex"):
        engine.complete([Request("b", (prompt,), FOUR, until_it_fails, structure=slow)])
    [[answer]] = engine.complete([Request("c", (prompt,), FOUR, params)])
    assert answer.usage.cached_tokens > len(prompt) // 2
