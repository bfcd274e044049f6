"""Every backend has what `Backend` asks for, with the same signatures: the tests' own backend too, which no type checker sees."""

from __future__ import annotations

import importlib
import inspect
import typing

import numpy as np
import pytest
from helpers.fake_backend import FakeBackend, ask, make_engine
from motet.runtime.backends.base import Backend

PROPERTIES = {name for name, value in vars(Backend).items() if isinstance(value, property)}
METHODS = {name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")}
BACKENDS = {
    "FakeBackend": "helpers.fake_backend",
    "CpuBackend": "motet.runtime.backends.cpu.backend",
    "DecoderGraphBackend": "motet.runtime.backends.onnx.decoder_graph",
    "OnnxBackend": "motet.runtime.backends.onnx.backend",
    "TorchBackend": "motet.runtime.backends.torch.backend",
}


def test_the_protocol_is_what_is_compared():
    assert sorted(PROPERTIES) == [
        *(
            "block_size",
            "can_sample_prefill",
            "can_verify",
            "has_hidden",
            "keeps_trunk",
            "kv_dtype",
            "name",
            "num_blocks",
            "takes_embedded",
        ),
    ]
    assert sorted(METHODS) == ["close", "hidden", "score", "seconds", "step"]


@pytest.mark.parametrize("name", BACKENDS)
def test_signatures_are_the_protocol_s(name):
    if name == "TorchBackend":
        pytest.importorskip("torch", reason="the torch backend runs on torch")
    backend = getattr(importlib.import_module(BACKENDS[name]), name)
    for method in METHODS:
        expected, found = getattr(Backend, method), getattr(backend, method)
        assert list(inspect.signature(found).parameters.values()) == list(
            inspect.signature(expected).parameters.values()
        )
        assert typing.get_type_hints(found) == typing.get_type_hints(expected), f"{name}.{method}"
    own = vars(FakeBackend()) if backend is FakeBackend else {}
    for attribute in PROPERTIES:
        assert hasattr(backend, attribute) or attribute in own or attribute in inspect.get_annotations(backend), (
            f"{name} has no {attribute}"
        )


def test_the_fake_scores_as_it_steps(tokenizer):
    """A greedy answer is the best token of each score."""
    prompt = list(range(5))
    with make_engine(tokenizer) as engine:
        answer = engine.complete([ask("x", prompt)])[0][0].token_ids
    scores = FakeBackend().score([*prompt, *answer[:-1]], 0)
    assert np.argmax(scores[len(prompt) - 1 :], axis=1).tolist() == answer
