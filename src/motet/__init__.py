"""Motet serves a weighted ensemble of fine-tuned language models as one model, for close to the price of one.

>>> with motet.Engine.from_bundle("bundle") as engine: ...        # in this process
>>> with motet.Client("127.0.0.1:50051") as client: ...           # over gRPC
"""

from __future__ import annotations

from .runtime.admission import ModelInfo
from .runtime.client import AsyncClient, Client
from .runtime.config import DecoderConfig, EngineConfig
from .runtime.engine import Engine
from .runtime.errors import MotetError
from .runtime.output import Completion, Output
from .runtime.prompt import build_prompt
from .runtime.request import Ensemble, FinishReason, Member, Request, SamplingParams, Space

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
