"""Answers of a JSON schema, checked by another library than the one that forced them."""

from __future__ import annotations

import json

import jsonschema
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.model_info import ModelInfo
from motet.runtime.api.request import Ensemble, FinishReason, Member, Request, Space
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.api.structure import Structure
from motet.runtime.engine.engine import Engine

from .fake_backend import FakeBackend

FOUR = Ensemble((Member("a", 0.4), Member("b", 0.3), Member("c", 0.2), Member("d", 0.1)), Space.PROBS)


def structure_engine(tokenizer, backend=None, **config) -> Engine:
    """Of four members, with an end-of-sequence token that is no byte."""
    values = {"max_num_seqs": 8, "max_model_len": 1600, "max_num_batched_tokens": 64, "prefill_chunk": 8} | config
    model = ModelInfo("fake", ("a", "b", "c", "d"), FOUR, (258,), 259, values["max_model_len"])
    backend = backend or FakeBackend(1200, vocab_size=259, num_members=4)
    return Engine(backend, tokenizer, model, EngineConfig(**values))


def answers_of(engine, schema, ensemble=FOUR, max_tokens=1500):
    """The texts of two choices, one greedy and one sampled, of an ensemble; each ended by the schema or the model."""
    structure = Structure.json_schema(schema)
    prompt = tuple(engine.tokenizer.encode("json: "))
    # Long strings, numbers and arrays end sooner: an answer that max_tokens cuts proves nothing.
    closing = {engine.tokenizer.token_id(letter): 6.0 for letter in '"}],:'}
    for index, temperature in enumerate((0.0, 1.0)):
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=index, logit_bias=closing)
        [[answer]] = engine.complete([Request("s", (prompt,), ensemble, params, structure=structure)])
        yield answer


def check_schema(engine, schema, **options):
    """Raises `AssertionError` for an answer that is no JSON of the schema. Returns how many were cut by `max_tokens`."""
    cut = 0
    validator = jsonschema.validators.validator_for(schema)(schema)
    for answer in answers_of(engine, schema, **options):
        if answer.finish_reason is FinishReason.LENGTH:
            cut += 1
            continue
        assert answer.finish_reason is FinishReason.STOP, answer
        found = json.loads(answer.text)
        problems = [error.message for error in validator.iter_errors(found)]
        assert not problems, (schema, answer.text, problems)
    return cut
