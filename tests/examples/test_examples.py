"""The examples do what they say: the tiny engine gives the real engine's tokens, the clients stream from a real server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from helpers.models import make_tail
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request, SamplingParams, Space
from motet.runtime.engine.engine import Engine

EXAMPLES = Path(__file__).parents[2] / "examples"
MIX = {"base": 0.25, "warm": 0.75}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def members(tiny_model_dir, tmp_path_factory):
    """(model directory, member → tail, their bundle in 32 bits)."""
    root, model_dir = tmp_path_factory.mktemp("examples"), tiny_model_dir("llama")
    tails = {"base": None, "warm": make_tail(model_dir, root / "warm", "warm", 1, 0.5)}
    return model_dir, tails, export_bundle(model_dir, root / "bundle", tails=tails, bits=32)


@pytest.mark.parametrize("space", list(Space))
@pytest.mark.parametrize("mix", [MIX, {"base": 1.0}], ids=["ensemble", "one"])
def test_tiny_engine_gives_the_real_engines_tokens(members, mix, space):
    model_dir, tails, bundle = members
    module = load("tiny_engine")
    settings = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "seed": 6},
        {"repetition_penalty": 1.3, "max_tokens": 20},
        {"temperature": 1.5, "seed": 7},
        {"max_tokens": 5},
    ]
    prompts = [[i + 65, 70, *range(80, 80 + 3 * i)] for i in range(len(settings))]
    sequences = [module.Sequence(p, **{"max_tokens": 12, **s}) for p, s in zip(prompts, settings, strict=True)]
    module.TinyEngine(model_dir, tails, mix, space=space, max_num_seqs=3).run(sequences)

    ensemble = Ensemble(tuple(Member(name, value) for name, value in mix.items()), space)
    params = [SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **s}) for s in settings]
    requests = [Request(str(i), (tuple(p),), ensemble, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
    with Engine.from_bundle(
        bundle, EngineConfig(backend="onnx", max_num_seqs=8, max_model_len=64, threads=1)
    ) as engine:
        served = [choices[0].token_ids for choices in engine.complete(requests)]
    assert [sequence.output_ids for sequence in sequences] == served
