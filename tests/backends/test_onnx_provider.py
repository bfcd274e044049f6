"""The onnx backend's provider: refused where it cannot be, the decoder's own tokens where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.onnx.sessions import open_session
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, MissingPackageError

HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs onnxruntime-gpu and an NVIDIA GPU")
PROMPT = (5, 9, 40, 77, 3)


def tokens(bundle: Path, provider: str) -> list[int]:
    config = EngineConfig.from_dict({"backend": "onnx", "onnx_provider": provider, "threads": 2})
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    with Engine.from_bundle(bundle, config) as engine:
        ((output,),) = engine.complete(
            [Request("r", (PROMPT,), Ensemble((Member(engine.model.members[0], 1.0),)), sampling)]
        )
    return list(output.token_ids)


def test_a_provider_is_one_of_the_onnx_backend() -> None:
    with pytest.raises(ConfigError, match="add backend onnx"):
        EngineConfig(onnx_provider="cuda")
    with pytest.raises(ConfigError, match="onnx_provider must be one of"):
        EngineConfig.from_dict({"backend": "onnx", "onnx_provider": "tpu"})


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_without_cuda_it_says_what_to_install() -> None:
    with pytest.raises(MissingPackageError, match="install onnxruntime-gpu"):
        open_session(b"", 2, "cuda")


@pytest.mark.parametrize("provider", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_provider_yields_the_decoders_tokens(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, provider: str
) -> None:
    bundle = export_bundle(tiny_model_dir("llama"), tmp_path / "bundle", bits=32)
    decoder, text = Decoder.from_dir(tiny_model_dir("llama")).double(), list(PROMPT)
    with torch.no_grad():
        for _ in range(24):
            text.append(int(decoder(torch.tensor([text]))[0, -1].argmax()))
    assert tokens(bundle, provider) == text[len(PROMPT) :]
