"""Portable ONNX decoders in Optimum and OpenVINO, unchanged (`make onnx-runtimes` installs them, and runs this file)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.compare import relative_error
from helpers.decoder_graph import greedy_with_transformers
from helpers.models import FAMILIES
from helpers.onnx_runtimes import OnnxRuntimes
from helpers.portable_graph import bundle_decoder, torch_logits
from motet.export.bundle_writer import export_bundle
from motet.export.onnx_directory import write_onnx
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.engine.engine import Engine
from motet.runtime.model.bundle import Bundle

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MOTET_HOME", ROOT / ".motet")) / "onnx-runtimes" / "venv" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(not PYTHON.is_file(), reason="`make onnx-runtimes` installs them, and runs this file"),
]
LIMIT = 1e-4  # of the logits' spread: both compute in float32
PROMPTS = [np.random.default_rng(length).integers(0, 250, length).tolist() for length in (40, 5, 17)]
COUNT = 12
# Those of which Optimum 0.1.0 knows the shape of the cache.
IN_OPTIMUM = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma3_text", "gpt2", "gpt_neox"),
    *("falcon", "falcon-new"),
)


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory):
    process = OnnxRuntimes(PYTHON, tmp_path_factory.mktemp("runtimes") / "log")
    yield process
    process.close()


def written(model_dir, path, bits, **options):
    bundle = Bundle.load(export_bundle(model_dir, path / "b", bits=bits, graphs=False))
    return bundle, write_onnx(bundle, path / "o", **options)


def greedy(decoder, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(torch_logits(decoder, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("family", IN_OPTIMUM)
def test_optimum_generates(runtimes, tiny_model_dir, tmp_path, family, bits):
    bundle, out = written(tiny_model_dir(family), tmp_path, bits)
    decoder = bundle_decoder(bundle, "base")
    assert runtimes.generate(out, PROMPTS, COUNT) == [greedy(decoder, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.native
def test_optimum_generates_what_is_served(runtimes, real_model_dir, tmp_path):
    """The real model: Optimum's tokens are those of transformers, and of the cpu backend, with keys and values in 16 bits (in 8
    a near tie falls the other way)."""
    bundle, out = written(real_model_dir, tmp_path, 32)
    config = EngineConfig(backend="cpu", threads=2, max_model_len=256, kv_dtype="bf16")
    with Engine.from_bundle(bundle.path, config) as engine:
        texts = ("Explain what a hash table is.", "Name three colours.", "Write a short poem about the sea.")
        prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
        ensemble = engine.model.default_ensemble
        requests = [Request(str(i), (tuple(prompt),), ensemble, params) for i, prompt in enumerate(prompts)]
        served = [list(found[0].token_ids) for found in engine.complete(requests)]
    found = runtimes.generate(out, [list(prompt) for prompt in prompts], 32)
    assert found == [greedy_with_transformers(real_model_dir, list(prompt), 32) for prompt in prompts]
    assert found == served


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize(
    ("family", "opset"),
    [(family, 21) for family in FAMILIES] + [(family, opset) for family in FAMILIES[:2] for opset in (17, 23)],
)
def test_logits_of_openvino(runtimes, tiny_model_dir, tmp_path, family, bits, opset):
    bundle, out = written(tiny_model_dir(family), tmp_path, bits, opset=opset)
    decoder = bundle_decoder(bundle, "base")
    found = runtimes.logits(out, PROMPTS, bundle.config.num_kv_heads, bundle.config.head_size)
    for prompt, logits in zip(PROMPTS, found, strict=True):
        assert relative_error(logits, torch_logits(decoder, prompt)) < LIMIT
