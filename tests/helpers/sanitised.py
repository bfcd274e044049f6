"""The native kernels built to stop at the first wrong address or undefined operation, and an environment to run Python on
them. The library is kept in `build/sanitised` under a digest of what it is made from."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from motet.kernels.native.library import LIBRARY_VARIABLE

ROOT = Path(__file__).parents[2]
SANITISERS = "-fsanitize=address,undefined"
# Without the scopes of variables: the vectors of the portable path are structs, and watching each takes most of the time.
FLAGS = ("-O2", "-g1", "-fPIC", SANITISERS, "-fno-sanitize-recover=all", "-fno-sanitize-address-use-after-scope")


def compiler_file(name: str) -> Path | None:
    """Where the compiler has this library; None if it has none, or if there is no compiler."""
    if shutil.which("c++") is None:
        return None
    command = ["c++", f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return path if path.is_absolute() else None


def sanitised_environment() -> dict[str, str] | None:
    """The variables with which Python loads a sanitised library, which is built if there is none yet. None if the compiler has
    no address sanitiser."""
    paths = [compiler_file(name) for name in ("libasan.so", "libstdc++.so")]  # exceptions are thrown through the second
    if None in paths:
        return None
    return os.environ | {
        "LD_PRELOAD": " ".join(map(str, paths)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # the sanitiser watches numpy's arrays and ctypes' structures, too
        "OMP_NUM_THREADS": "1",  # numpy's products are tiny
        "OPENBLAS_NUM_THREADS": "1",
        LIBRARY_VARIABLE: str(_library()),
    }


def _library() -> Path:
    extension = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    flags = [*(flag for flag in extension["extra-compile-args"] if flag != "-O3"), *FLAGS]
    digest = hashlib.sha256(repr((flags, subprocess.check_output(["c++", "--version"]))).encode())
    for path in sorted((ROOT / "kernels" / "native" / "cpp").iterdir()):
        digest.update(path.read_bytes())
    target = ROOT / "build" / "sanitised" / f"{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / ".lock").open("w") as lock:  # another test may be building it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(target, flags, extension["sources"])
    return target


def _build(target: Path, flags: list[str], sources: list[str]) -> None:
    with TemporaryDirectory(dir=target.parent) as work, ThreadPoolExecutor(os.cpu_count()) as pool:

        def build(source: str) -> str:
            made = str(Path(work) / f"{Path(source).stem}.o")
            subprocess.run(["c++", *flags, "-c", str(ROOT / source), "-o", made], check=True)
            return made

        objects = list(pool.map(build, sources))
        made = Path(work) / "library.so"
        subprocess.run(["c++", "-shared", "-pthread", SANITISERS, *objects, "-o", str(made)], check=True)
        made.replace(target)
