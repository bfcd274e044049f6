"""A sliding window in the whole engine, on every backend: prompts and decoding in company, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers.models import WINDOW
from motet.export.bundle_writer import export_bundle
from motet.kernels.native import library
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request, SamplingParams
from motet.runtime.engine.engine import Engine

LENGTHS = (3, WINDOW - 1, 2 * WINDOW, 140)  # the last is longer than a partition of the native cache
COUNT = 12


@pytest.mark.parametrize("family", ["mistral", "qwen2-window"])
@pytest.mark.parametrize("backend", ["cpu", "onnx", "torch"])
def test_every_token_is_transformers_choice(tiny_model_dir, tmp_path, family, backend):
    """Each greedy token is transformers' first choice after the same tokens, or as good within the backend's rounding."""
    if backend == "cpu" and not library.is_available():
        pytest.skip("the native kernels were not built (no C++ compiler)")
    model_dir = tiny_model_dir(family)
    path = export_bundle(model_dir, tmp_path / "b", bits=32)
    kv = {"kv_dtype": "bf16"} if backend == "cpu" else {}
    config = EngineConfig(backend=backend, max_num_seqs=4, max_model_len=256, threads=2, **kv)
    prompts = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in LENGTHS]
    params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
    with Engine.from_bundle(path, config) as engine:
        ensemble = engine.model.default_ensemble
        requests = [Request(str(i), (tuple(prompt),), ensemble, params) for i, prompt in enumerate(prompts)]
        answers = [list(choices[0].token_ids) for choices in engine.complete(requests)]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == COUNT
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        limit = 0.15 if backend == "cpu" else 1e-3  # keys and values in bf16, or everything in float32
        assert ((logits.max(1).values - chosen) < limit * logits.std()).all()
