"""The limits of this machine, measured in the same run as the figures that are compared with them.

If the native kernels were built, their probes are used: threads that read memory with the widest loads, and the peak rate of
the dot product instruction. Otherwise the limits are those of numpy's reduction and ONNX Runtime's integer matrix product.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ...kernels.native import library
from ...runtime.backends.onnx.sessions import open_session


def measure(threads: int) -> dict[str, Any]:
    """Read bandwidth (GB/s) and rate of 8-bit multiply-accumulates (GMAC/s) with `threads` threads, and the probes' name.

    It runs in its own process: in a process with an engine, every ONNX Runtime session would use the engine's thread pool.
    """
    command = [sys.executable, "-m", "motet.bench.lib.probes", str(threads)]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def read_bandwidth(threads: int, *, megabytes: int = 256, repeats: int = 5) -> float:
    """GB/s of numpy's maximum, which is vectorised and releases the GIL. Each thread has an array larger than any cache."""
    arrays = [np.ones(megabytes * 2**20 // 8, np.int64) for _ in range(threads)]
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))
            times.append(time.perf_counter() - start)
    return sum(array.nbytes for array in arrays) / statistics.median(times[1:]) / 1e9


def int8_rate(threads: int, *, size: int = 1024, repeats: int = 5) -> float:
    """GMAC/s of ONNX Runtime's MatMulInteger, u8 × s8, [size, size] · [size, size]. 0 if onnx is not installed.

    It uses the hardware's dot products and ONNX Runtime's packing: a practical limit, below the instruction's peak.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ModuleNotFoundError:
        return 0.0
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 127, (size, size), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_session(model.SerializeToString(), threads)
    x = rng.integers(0, 255, (size, size), dtype=np.uint8)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - start)
    return size**3 / statistics.median(times[2:]) / 1e9


def main(threads: int) -> None:
    """Print the result of `measure` as JSON."""
    native = library.is_available()
    read, dot = (library.probe_read, library.probe_dot) if native else (read_bandwidth, int8_rate)
    values = {"threads": threads, "probes": "native" if native else "numpy, onnxruntime"}
    print(json.dumps({**values, "read_gb_s": read(threads), "int8_gmac_s": dot(threads)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
