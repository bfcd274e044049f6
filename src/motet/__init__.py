"""Motet serves a weighted ensemble of fine-tuned language models as one model, for close to the price of one.

>>> with motet.Engine.from_bundle("bundle") as engine: ...        # in this process
>>> with motet.Client("127.0.0.1:50051") as client: ...           # over gRPC
"""

from __future__ import annotations

from .runtime.api.config import EngineConfig
from .runtime.api.model_info import ModelInfo
from .runtime.api.output import Completion, Output
from .runtime.api.request import Ensemble, FinishReason, Member, Request, Space
from .runtime.api.sampling import SamplingParams
from .runtime.client.client import AsyncClient, Client
from .runtime.engine.engine import Engine
from .runtime.errors import MotetError
from .runtime.model.config import DecoderConfig
from .runtime.text.prompt import build_prompt

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "Client",
    "Completion",
    "DecoderConfig",
    "Engine",
    "EngineConfig",
    "Ensemble",
    "FinishReason",
    "Member",
    "ModelInfo",
    "MotetError",
    "Output",
    "Request",
    "SamplingParams",
    "Space",
    "build_prompt",
]
