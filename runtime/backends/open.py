"""`open_backend`: the backend that an `EngineConfig` names."""

from __future__ import annotations

import logging

from ...kernels.native import library
from ..api.config import EngineConfig
from ..errors import ConfigError, MissingPackageError, UnavailableError
from ..model.bundle import Bundle
from .base import Backend
from .probe import check_probe

log = logging.getLogger("motet.backend")


def open_backend(bundle: Bundle, config: EngineConfig) -> Backend:
    """The backend that `config.backend` names, which answers the bundle's probe as it should (see `probe`). Raises what
    `check_probe` and `_open` raise."""
    backend = _open(bundle, config)
    if config.probe and bundle.decoder_graph is None:
        try:
            check_probe(bundle, backend, config.positions(bundle.config.max_position_embeddings))
        except BaseException:
            backend.close()
            raise
    return backend


def _open(bundle: Bundle, config: EngineConfig) -> Backend:
    """The backend that `config.backend` names; "auto" is the native kernels, or ONNX Runtime if they were not built
    or do not support the model's sizes. Raises `UnavailableError` for a backend that this machine cannot run,
    `MissingPackageError` for one that is not installed, `ConfigError` for one that cannot serve the bundle."""
    if bundle.decoder_graph is not None:
        if config.backend not in ("auto", "onnx"):
            raise ConfigError(
                f"'{bundle.name}' holds an ONNX graph that another program exported, which backend {config.backend} cannot "
                "run; use backend onnx or auto, or export the model's directory of safetensors"
            )
        from .onnx.decoder_graph import DecoderGraphBackend

        return DecoderGraphBackend(bundle, config)
    if config.backend == "torch":
        try:
            from .torch.backend import TorchBackend
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                f"the torch backend needs {error.name}; install it with `pip install 'motet[gpu]'`"
            ) from error
        return TorchBackend(bundle, config)
    if config.backend == "auto" and bundle.graphs is None and not library.is_available():
        raise UnavailableError(
            f"'{bundle.name}' has no ONNX graphs and the native kernels were not built here; export it again with graphs, "
            "or install motet where there is a C++ compiler"
        )
    if config.backend != "onnx" and (config.backend == "cpu" or library.is_available()):
        from .cpu.backend import CpuBackend

        try:
            return CpuBackend(bundle, config)
        except UnavailableError as error:
            if config.backend == "cpu" or bundle.graphs is None:
                raise
            log.warning("the onnx backend serves '%s': %s", bundle.name, error)
    from .onnx.backend import OnnxBackend

    return OnnxBackend(bundle, config)
