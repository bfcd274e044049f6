"""Motet serves a weighted ensemble of fine-tuned language models as one model, for close to the price of one.

>>> with motet.Engine.from_bundle("bundle") as engine: ...        # in this process
>>> with motet.Client("127.0.0.1:50051") as client: ...           # over gRPC

The names of `__all__` are imported when they are first used (PEP 562), so that `import motet.kernels.oracle.reference`
loads neither gRPC nor the engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .runtime.api.config import EngineConfig
    from .runtime.api.model_info import ModelInfo
    from .runtime.api.output import Completion, Output
    from .runtime.api.prompt import Conversation
    from .runtime.api.request import Ensemble, FinishReason, Member, Request, Space
    from .runtime.api.sampling import SamplingParams
    from .runtime.api.structure import Structure
    from .runtime.client.client import AsyncClient, Client
    from .runtime.engine.engine import Engine
    from .runtime.errors import MotetError
    from .runtime.model.config import DecoderConfig
    from .runtime.text.prompt import build_prompt

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here
__all__ = [
    "AsyncClient",
    "Client",
    "Completion",
    "Conversation",
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
    "Structure",
    "build_prompt",
]

_MODULES = {
    "AsyncClient": "client.client",
    "Client": "client.client",
    "Completion": "api.output",
    "Conversation": "api.prompt",
    "DecoderConfig": "model.config",
    "Engine": "engine.engine",
    "EngineConfig": "api.config",
    "Ensemble": "api.request",
    "FinishReason": "api.request",
    "Member": "api.request",
    "ModelInfo": "api.model_info",
    "MotetError": "errors",
    "Output": "api.output",
    "Request": "api.request",
    "SamplingParams": "api.sampling",
    "Space": "api.request",
    "Structure": "api.structure",
    "build_prompt": "text.prompt",
}  # public name → its module in motet.runtime


if not TYPE_CHECKING:  # a type checker that saw this would take any name for one of the module's

    def __getattr__(name):
        """Import a public name when it is first used."""
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module 'motet' has no attribute '{name}'")
        value = getattr(import_module(f".runtime.{module}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
