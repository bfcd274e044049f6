"""The repository itself: the wheel holds the tree, the stubs are the protos', serving needs no heavy package."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import motet
import pytest
from google.protobuf import descriptor_pb2
from helpers.source import WITHOUT_COMPILER, copy_source
from motet.proto.generate import generate

ROOT = Path(__file__).parents[2]
FOLDERS = ("runtime", "kernels", "export", "finetune", "proto", "bench")


@pytest.mark.slow
def test_the_wheel_is_the_tree(tmp_path):
    """Built without a compiler, which takes a second: the extension is the only file that one adds."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(copy_source(tmp_path / "source")),
    ]
    subprocess.run(command, check=True, env=WITHOUT_COMPILER)
    built = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(built) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info" not in name}
    expected = {f"motet/{path.name}" for path in (ROOT / "src" / "motet").iterdir() if path.suffix in (".py", ".typed")}
    for folder in FOLDERS:
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".pyi", ".proto")]
        expected |= {f"motet/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert packed == expected
    assert built.name.startswith(f"motet-{motet.__version__}-")


def test_stubs_are_generated_from_the_protos(tmp_path):
    generate(tmp_path)
    generated = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "proto").glob("*_pb2*")}
    assert generated == committed


def test_the_folder_of_protos_is_a_root_that_loaders_take_as_it_is(tmp_path):
    """Every import is found below proto/, from wherever the loader is started, and so are all services."""
    names = sorted(path.relative_to(ROOT / "proto").as_posix() for path in (ROOT / "proto").rglob("*.proto"))
    command = ["grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"-o{tmp_path / 'set'}", *names]
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=tmp_path)
    found = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes())
    assert sorted(file.name for file in found.file) == names
    services = sorted(service.name for file in found.file for service in file.service)
    assert services == ["Admin", "Batch", "GRPCInferenceService", "Inference"]


@pytest.mark.parametrize(
    "module",
    [
        "motet",
        "motet.cli",
        "motet.runtime.serve.grpc.server",
        "motet.runtime.backends.onnx.backend",
        "motet.runtime.jobs.summarise",
        "motet.runtime.backends.open",
    ],
)
def test_serving_needs_no_heavy_package(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'onnx', 'triton') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def loaded_by(statement, *modules):
    """Which of `modules` a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*(name for name in {modules!r} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_an_oracle_loads_nothing_of_the_server():
    heavy = ("grpc", "jinja2", "tokenizers", "onnxruntime", "typer", "motet.runtime.engine.engine")
    assert loaded_by("import motet.kernels.oracle.reference", *heavy) == []
    assert loaded_by("import motet; motet.Engine", "grpc", "motet.runtime.engine.engine") == [
        "motet.runtime.engine.engine"
    ]


def test_the_public_names():
    """Each name of `__all__` is what a type checker sees under it; there are no others."""
    tree = ast.parse(Path(motet.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    declared = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted(declared) == sorted(motet.__all__)
    for name, module in declared.items():
        assert getattr(motet, name) is getattr(importlib.import_module(f"motet.{module}"), name), name
        assert name in dir(motet)
    with pytest.raises(AttributeError, match="module 'motet' has no attribute 'Motor'"):
        motet.Motor  # noqa: B018


@pytest.mark.slow
def test_the_reference_has_the_public_names(tmp_path):
    """What `make docs` builds: an entry with a text for each public name."""
    command = [sys.executable, "-m", "pdoc", "--output-directory", str(tmp_path), "motet"]
    subprocess.run(command, check=True, capture_output=True)
    page = (tmp_path / "motet.html").read_text()
    sections = {section.split('"', 1)[0]: section for section in re.split(r'<section id="', page)[1:]}
    assert set(motet.__all__) <= set(sections)
    without = [name for name in motet.__all__ if 'class="docstring"' not in sections[name]]
    assert without == ["Completion"]  # another name for Output


KERNEL_TESTS = ("test_mix_sample", "test_mix_head_sample", "test_attention", "test_weight_matmul", "test_rotary_write")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["torch", "triton"])
def test_without_torch_or_triton_kernel_tests_say_so_and_nothing_is_imported(package, tmp_path):
    """Where a package is missing, collecting the kernels' tests imports neither it nor fails."""
    (tmp_path / f"{package}.py").write_text(
        "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n"
    )
    code = "import sys, pytest; status = pytest.main(sys.argv[1:]); print('loaded', 'triton.language' in sys.modules, status)"
    files = [str(ROOT / "tests" / "kernels" / f"{name}.py") for name in KERNEL_TESTS]
    command = [sys.executable, "-c", code, "-rs", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "loaded False" in result.stdout, result.stdout + result.stderr
    assert result.stdout.count("SKIPPED") == len(KERNEL_TESTS)
