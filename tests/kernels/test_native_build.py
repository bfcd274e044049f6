"""Builds of the native kernels other than the usual one: none at all, one that watches addresses and undefined behaviour, and
the thread pool alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.sanitised import ROOT, compiler_file, sanitised_environment
from helpers.source import WITHOUT_COMPILER, copy_source
from motet.export.bundle_writer import export_bundle
from motet.kernels.native import library
from motet.runtime.errors import UnavailableError

SERVE = """
import sys
from pathlib import Path
from motet.kernels.native import library
from motet.runtime.api.config import EngineConfig
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import UnavailableError
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams

assert not library.is_available()
try:
    Engine.from_bundle(Path(sys.argv[1]), EngineConfig(backend="cpu"))
except UnavailableError as error:
    print(error)
with Engine.from_bundle(Path(sys.argv[1]), EngineConfig(threads=1, max_model_len=64)) as engine:
    request = Request("x", ((1, 2, 3),), engine.model.default_ensemble, SamplingParams(max_tokens=4, ignore_eos=True))
    print(len(engine.complete([request])[0][0].token_ids))
"""


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_serves(tmp_path, tiny_model_dir):
    bundle = export_bundle(tiny_model_dir("llama"), tmp_path / "bundle")
    source = copy_source(tmp_path / "source")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        "site",
        str(source),
    ]
    subprocess.run(install, check=True, cwd=tmp_path, env=WITHOUT_COMPILER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", SERVE, str(bundle)]
    result = subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    error, count = result.stdout.splitlines()
    assert "install Motet where a C++17 compiler is" in error
    assert count == "4"


@pytest.mark.slow
@pytest.mark.native
def test_sanitised():
    """The tests of the kernels, on a build that stops at the first wrong address or undefined operation."""
    environment = sanitised_environment()
    if environment is None:
        pytest.skip("the compiler has no address sanitiser")
    files = [f"tests/backends/test_cpu_{name}.py" for name in ("invariance", "boundary")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    command += ["-k", "depend or crash or refused or nan or fit or sizes"]
    environment["MOTET_TEST_SCHEDULES"] = "5"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_threads(tmp_path):
    """The thread pool alone: who is late is left out for a while, and all items are done once (see pool_test.cpp)."""
    program = tmp_path / "pool_test"
    sources = [str(ROOT / "tests" / "kernels" / "pool_test.cpp"), str(ROOT / "kernels" / "native" / "cpp" / "pool.cpp")]
    command = ["c++", "-std=c++17", "-O2", "-g1", "-pthread", *sources, "-o", str(program)]
    if compiler_file("libtsan.so") is not None:  # stops at the first data race
        command.append("-fsanitize=thread")
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_paths_without_python(tmp_path):
    """Every path of this CPU through the C interface alone (see paths_test.cpp)."""
    result = subprocess.run([build_paths(tmp_path, "c++")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all paths agree\n")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="there is no compiler for ARM, or no emulator (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_paths_of_arm(tmp_path):
    """The same on an emulated CPU with dot products, and on one without, where plain C++ is left."""
    program = build_paths(tmp_path, "aarch64-linux-gnu-g++")
    for cpu, paths in (("max", "neon, portable"), ("cortex-a53", "portable")):
        result = subprocess.run(["qemu-aarch64", "-cpu", cpu, program], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout == f"paths: {paths}\nall paths agree\n"


def build_paths(out, compiler):
    """paths_test.cpp and the kernels as one program without shared libraries, which an emulator of another CPU runs."""
    sources = [*(ROOT / "kernels" / "native" / "cpp").glob("*.cpp"), ROOT / "tests" / "kernels" / "paths_test.cpp"]
    options = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-pthread"]

    def compile_one(source):
        subprocess.run([compiler, *options, "-c", source, "-o", out / f"{source.stem}.o"], check=True)
        return str(out / f"{source.stem}.o")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler, *options, "-static", *objects, "-o", out / "paths_test"], check=True)
    return out / "paths_test"


def test_a_library_of_another_version_is_no_library(monkeypatch):
    monkeypatch.setenv(library.LIBRARY_VARIABLE, "libc.so.6")  # loads, and has none of our functions
    library.load.cache_clear()
    try:
        with pytest.raises(UnavailableError, match="another version"):
            library.load()
        assert not library.is_available()
    finally:
        library.load.cache_clear()
