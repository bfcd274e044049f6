"""`open_session`: ONNX Runtime's sessions, all on one thread pool."""

from __future__ import annotations

import onnxruntime as ort

from ...api.config import EngineConfig
from ...errors import BundleError, MissingPackageError, MotetError, UnavailableError
from ...model.bundle import Bundle

_pool_threads: int | None = None


def open_session(model: str | bytes, threads: int, provider: str = "cpu") -> ort.InferenceSession:
    """A session on a graph (path or bytes). All graphs of a process share one thread pool: if each had its own, the
    spinning threads of one graph would take the cores from the next. `provider`: cpu or cuda; operators without a
    CUDA kernel (attention in float32) run on the CPU. Raises `UnavailableError` if the process already uses another
    number of threads, `MissingPackageError` if ONNX Runtime has no CUDA provider."""
    global _pool_threads
    if provider == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise MissingPackageError(
            f"this ONNX Runtime has no CUDA provider, only {ort.get_available_providers()}; install onnxruntime-gpu in "
            "place of onnxruntime, or serve with onnx_provider cpu"
        )
    if _pool_threads is None:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pool_threads = threads
    if threads != _pool_threads:
        raise UnavailableError(
            f"this process runs ONNX Runtime with {_pool_threads} threads, {threads} were asked for; "
            "use the same number or another process"
        )
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    providers = ["CUDAExecutionProvider"] if provider == "cuda" else []
    return ort.InferenceSession(model, options, providers=[*providers, "CPUExecutionProvider"])


def pool_threads() -> int | None:
    """The number of threads of this process's pool; None: no session was opened yet."""
    return _pool_threads


def encoder_session(bundle: Bundle, file: str, config: EngineConfig) -> ort.InferenceSession:
    """A session on the graph of an encoder, on the CPU: with as many threads as the process's pool has, if there is one already.
    Raises what `bundle_session` raises."""
    return _session(bundle, file, pool_threads() or config.num_threads, "cpu")


def bundle_session(bundle: Bundle, file: str, config: EngineConfig) -> ort.InferenceSession:
    """A session on a graph of a bundle. Raises `BundleError` if ONNX Runtime cannot load it, and what `open_session` raises."""
    return _session(bundle, file, config.num_threads, config.onnx_provider)


def _session(bundle: Bundle, file: str, threads: int, provider: str) -> ort.InferenceSession:
    try:
        return open_session(str(bundle.path / file), threads, provider)
    except MotetError:
        raise
    except Exception as error:  # ONNX Runtime raises many types, all from its C++ side
        raise BundleError(f"ONNX Runtime cannot load '{bundle.path / file}': {str(error).splitlines()[0]}") from error
