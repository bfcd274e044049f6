"""Pulls from a hub on this machine, by the hub's real client: plans, broken and continued fetches, digests, refusals."""

from __future__ import annotations

import io
import json
import shutil
import threading

import huggingface_hub
import pytest
import safetensors.torch
import torch
from helpers.hub_server import HubRepository, HubServer
from huggingface_hub import constants
from motet.runtime.checkpoints import hub as hub_module
from motet.runtime.checkpoints import store
from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_config
from motet.runtime.checkpoints.store import is_intact, plan_pull, pull, resolve_model
from motet.runtime.errors import BundleError, NotFoundError, PermissionDeniedError, UnavailableError

WEIGHTS = "model.safetensors"


pytestmark = pytest.mark.alone  # a server, and threads that wait for it


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A store and a cache of the client's of their own, and no wait between tries."""
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_module, "_WAIT_S", 0.0)


@pytest.fixture
def hub(tiny_model_dir, monkeypatch):
    repositories = {"a/model": HubRepository.of(tiny_model_dir("llama"))}
    with HubServer(repositories) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", server.url, raising=False)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield server


def cached(tmp_path, files):
    """Put files into the cache of the hub's client, as it does."""
    folder = tmp_path / "cache" / "models--a--model"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


def pulled(source="a/model", **options):
    said = []
    return pull(source, show_progress=False, on_status=said.append, **options), said


def test_a_plan_says_what_is_there_and_fetches_nothing(hub, tmp_path):
    files = hub.repositories["a/model"].files
    files |= {"consolidated.safetensors": b"x" * 99, "README.md": b"text", "onnx/model.onnx": b"x"}
    plan = plan_pull("a/model")
    assert {file.name: file.size for file in plan.files} == {
        name: len(files[name])
        for name in files
        if name not in ("consolidated.safetensors", "README.md", "onnx/model.onnx")
    }
    assert (plan.reason, plan.lacking) == ("", plan.total)
    assert "a" * 40 in plan.where and not hub.sent and not (tmp_path / "home").exists()
    target, said = pulled()
    assert f"model: {len(plan.files)} files" in said[0] and said[1] == "a--model: fetched"
    assert sum(size for *_, size in hub.sent) == plan.total
    assert plan_pull("a/model").reason is None and not (tmp_path / "home" / "downloads" / "a--model").exists()
    assert is_intact(target)


def test_revisions_are_kept_and_owners_are_apart(hub, tiny_model_dir):
    hub.repositories["b/model"] = HubRepository.of(tiny_model_dir("qwen2"), revision="b" * 40)
    assert [pulled(source)[0].name for source in hub.repositories] == ["a--model", "b--model"]
    assert [read_config(resolve_model(source)).family for source in hub.repositories] == ["llama", "qwen2"]
    assert pulled()[1] == ["a--model: the copy is intact"]
    hub.repositories["a/model"] = HubRepository.of(tiny_model_dir("qwen3"), revision="c" * 40)
    target, said = pulled()
    assert said[-1] == "a--model: fetched again: the source changed"
    assert json.loads((target / store.MANIFEST).read_text())["content"] == "c" * 40


def test_a_connection_that_ends_is_opened_again_where_it_ended(hub):
    hub.repositories["a/model"].breaks[WEIGHTS] = [1000, 500, 0, 0, 7]
    target, _ = pulled()
    assert (target / WEIGHTS).read_bytes() == hub.repositories["a/model"].files[WEIGHTS]
    starts = [start for name, start, _ in hub.sent if name == WEIGHTS]
    assert starts == [0, 1000, 1500, 1500, 1500, 1507]


def test_a_broken_pull_is_continued_by_the_next_one(hub):
    repository = hub.repositories["a/model"]
    repository.breaks[WEIGHTS] = [5000, 0, 0, 0]
    with pytest.raises(UnavailableError, match="a/model"):
        pulled()
    assert not store.models_dir().exists() or not list(store.models_dir().iterdir())
    plan = plan_pull("a/model")
    assert plan.total - plan.lacking >= 5000 + len(repository.files["config.json"])
    hub.sent.clear()
    target, said = pulled()
    assert "are here already" in said[0] and is_intact(target)
    assert hub.sent == [(WEIGHTS, 5000, len(repository.files[WEIGHTS]) - 5000)]


def test_a_server_without_ranges_sends_the_file_again(hub):
    hub.repositories["a/model"].breaks[WEIGHTS] = [5000]
    hub.repositories["a/model"].ranges = False
    target, _ = pulled()
    assert (target / WEIGHTS).read_bytes() == hub.repositories["a/model"].files[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_another_digest_is_refused_and_not_kept(hub, name):
    repository = hub.repositories["a/model"]
    if name == WEIGHTS:
        repository.digests[name] = "0" * 64
    else:  # what is sent is not what was listed
        listed = dict(repository.files)
        repository.files = _Swapped(listed, name)
    with pytest.raises(BundleError, match=f"'{name}' of 'a/model' has the .*SHA-(256|1) "):
        pulled()
    repository.digests.clear()
    repository.files = dict(repository.files)
    hub.sent.clear()
    target, _ = pulled()
    assert (name, 0, len(repository.files[name])) in hub.sent and is_intact(target)


class _Swapped(dict):
    """Files of which one is sent with other bytes than it is listed with."""

    def __init__(self, files, name):
        super().__init__(files)
        self.name = name

    def __getitem__(self, name):
        content = super().__getitem__(name)
        return content[:-1] + b"#" if name == self.name else content


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_what_to_do(hub, status):
    hub.repositories["a/model"].denied = (status, "GatedRepo")
    with pytest.raises(PermissionDeniedError, match=r"'a/model' is gated: accept its terms.*HF_TOKEN"):
        pulled()


def test_a_model_that_the_hub_does_not_have(hub):
    for call in (plan_pull, pulled):
        with pytest.raises(NotFoundError, match="no model 'b/gone'"):
            call("b/gone")
    pulled()
    hub.repositories["a/model"].hidden = True
    assert "the hub has no model 'a/model'" in pulled()[1][0]


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    """A copy is kept; without one the error says so."""
    target, _ = pulled()
    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "model_info", _unreachable)
    assert pulled()[0] == target and "newer revision would not be seen" in pulled()[1][0]
    with pytest.raises(UnavailableError, match="cannot get 'b/model' from the hub: no route"):
        pulled("b/model")


def test_the_clients_cache_serves_where_the_hub_does_not_answer(hub, tmp_path, monkeypatch):
    """What the cache holds whole is taken, under the revision that it has."""
    cached(tmp_path, hub.repositories["a/model"].files)
    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "model_info", _unreachable)
    target, said = pulled()
    assert "the cache of the hub's client" in said[0] and is_intact(target) and not hub.sent
    assert json.loads((target / store.MANIFEST).read_text())["content"] == "a" * 40


def _unreachable(*_args, **_options):
    raise ConnectionError("no route")


def test_what_the_clients_cache_has_is_not_fetched(hub, tmp_path):
    files = hub.repositories["a/model"].files
    cached(tmp_path, {WEIGHTS: files[WEIGHTS]})
    plan = plan_pull("a/model")
    assert plan.total - plan.lacking == len(files[WEIGHTS])
    target, _ = pulled()
    assert WEIGHTS not in [name for name, *_ in hub.sent] and is_intact(target)


def test_room_is_looked_for_first(hub, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UnavailableError, match=r"'a/model' from the hub needs .* 1 kB are free; make room"):
        pulled()
    assert not hub.sent


def test_a_model_without_weights_or_tokenizer(hub):
    files = hub.repositories["a/model"].files
    tokenizer = files.pop("tokenizer.json")
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        pulled()
    files["tokenizer.json"] = tokenizer
    del files[WEIGHTS]
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        pulled()


def test_a_pickled_model_is_rewritten(hub):
    files = hub.repositories["a/model"].files
    weights = io.BytesIO()
    torch.save(safetensors.torch.load(files.pop(WEIGHTS)), weights)
    files["pytorch_model.bin"] = weights.getvalue()
    target, _ = pulled()
    assert not (target / "pytorch_model.bin").exists()
    assert checkpoint_digest(target) and list(target.glob("*.safetensors"))


def test_a_log_has_lines(hub, capsys):
    """Without a terminal: what is done, and each tenth of it."""
    pull("a/model")
    lines = capsys.readouterr().err.splitlines()
    assert "fetching a/model: 100 %" in lines and all(" %" in line for line in lines)
    assert lines == list(dict.fromkeys(lines)) and "copying" in lines[-1]


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_torn_file_under_its_final_name_is_fetched_again(hub, tiny_model_dir, name):
    """As a machine leaves it that went down after the rename."""
    whole = (tiny_model_dir("llama") / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"x" * len(whole)):
        folder = store.models_dir().parent / "downloads" / "a--model" / ("a" * 40)
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        path, _ = pulled(force=True)
        assert (path / name).read_bytes() == whole


def test_a_torn_cache_of_the_client_is_fetched(hub, tiny_model_dir, tmp_path):
    whole = (tiny_model_dir("llama") / WEIGHTS).read_bytes()
    cached(tmp_path, {WEIGHTS: whole[:-1] + bytes([whole[-1] ^ 1])})
    path, _ = pulled()
    assert (path / WEIGHTS).read_bytes() == whole


def test_a_second_pull_waits_and_finds_the_model(hub, monkeypatch):
    """The first one holds its lock while it fetches; the second begins then, and fetches nothing."""
    fetching, done, found = threading.Event(), threading.Event(), {}
    real = hub_module.fetch_file

    def slow(*arguments):
        fetching.set()
        assert done.wait(60)
        return real(*arguments)

    monkeypatch.setattr(hub_module, "fetch_file", slow)
    first = threading.Thread(target=lambda: found.update(first=pulled()))
    first.start()
    assert fetching.wait(60)
    waits = threading.Event()
    real_alone = store._alone

    def alone(source):
        waits.set()
        return real_alone(source)

    monkeypatch.setattr(store, "_alone", alone)
    second = threading.Thread(target=lambda: found.update(second=pulled()))
    second.start()
    assert waits.wait(60)  # it has planned to fetch
    done.set()
    first.join(60)
    second.join(60)
    (path, _), (other, said) = found["first"], found["second"]
    assert path == other and is_intact(path)
    assert "the copy is intact" in said[-1]
