"""`hidden`: the states that the head multiplies, on every backend, with tails too, however a prompt is cut."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers.models import make_tail
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member
from motet.runtime.engine.embedder import EmbedJob
from motet.runtime.engine.engine import Engine

PROMPTS = [tuple(range(65, 65 + size)) for size in (3, 40, 90)]
MIX = Ensemble((Member("base", 0.25), Member("warm", 0.75)))


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    root, model = tmp_path_factory.mktemp("hidden"), tiny_model_dir("llama")
    tails = {"base": None, "warm": make_tail(model, root / "warm", "warm", 1, 0.5)}
    return export_bundle(model, root / "bundle", tails=tails, bits=32)


def embeddings(bundle, backend, **config):
    found, done = [None] * len(PROMPTS), threading.Semaphore(0)

    def keeper(index):
        def keep(result):
            found[index] = result
            done.release()

        return keep

    with Engine.from_bundle(bundle, EngineConfig(backend=backend, max_model_len=128, threads=2, **config)) as engine:
        engine.embedder.submit([EmbedJob(prompt, MIX, keeper(i)) for i, prompt in enumerate(PROMPTS)])
        for _ in PROMPTS:
            assert done.acquire(timeout=60)
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.native), "torch"])
def test_backends_agree(bundle, backend):
    reference = embeddings(bundle, "onnx")
    found = embeddings(bundle, backend)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert (found * reference).sum(axis=1).min() > 0.995  # keys and values are int8 or bf16
    assert not np.allclose(found[1], found[2], atol=1e-2)


@pytest.mark.native
def test_cuts_change_no_bit_on_the_native_backend(bundle):
    whole = embeddings(bundle, "cpu")
    in_pieces = embeddings(bundle, "cpu", max_num_batched_tokens=7, prefill_chunk=7)
    assert np.abs(whole - in_pieces).max() < 1e-6  # means are summed in another order
