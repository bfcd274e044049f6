"""The batch job over a real bundle of a tiny model."""

from __future__ import annotations

import json

import pytest
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, InvalidRequestError, NotFoundError
from motet.runtime.jobs.summarise import SummariseParams, summarise
from motet.runtime.text.documents import split_document

PARAMS = SummariseParams(max_summary_tokens=12, chunk_tokens=60)


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tmp_path_factory):
    path = export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("summarise") / "tiny")
    with Engine.from_bundle(path, EngineConfig(max_num_seqs=4, max_model_len=300, threads=2)) as engine:
        yield engine


def run(engine, source, out, params=PARAMS, **options):
    return summarise(engine, source, out, params=params, **options)


def read(path):
    return {record["id"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_split_document(tokenizer):
    text = "One sentence. Another one.\n\nA new paragraph that is rather longer than the first. " * 3 + "x" * 90
    for size in (10, 40, 200):
        pieces = split_document(tokenizer, text, size)
        assert "".join(pieces) == text
        assert all(len(tokenizer.encode(piece)) <= size for piece in pieces)
    assert split_document(tokenizer, "a\n\nb", 3) == ["a\n\n", "b"]


def test_records_errors_and_reruns(engine, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [b'{"id": "good", "text": "some text"}', b'{"id": "long", "text": "' + b"many words. " * 60 + b'"}']
    lines += [b'{"text": "\xff"}', b"{", b'{"id": "x"}', b'{"id": "empty", "text": " "}']
    source.write_bytes(b"\n".join(lines) + b"\n")
    report = run(engine, source, out)
    assert (report.done, report.skipped, report.failed) == (2, 0, 4)
    records = read(out)
    assert records["long"]["chunks"] > 3
    assert records["good"]["chunks"] == 1
    errors = [record["error"]["message"] for record in records.values() if "error" in record]
    assert len(errors) == 4
    assert any("not UTF-8" in message for message in errors)

    with out.open("a") as file:
        file.write('{"id": "torn", "summ')  # a kill in the middle of a line
    progress = []
    again = run(engine, source, out, on_progress=lambda *counts: progress.append(counts))
    assert progress == [(ended, 6) for ended in range(7)]
    assert (again.done, again.skipped, again.failed) == (0, 2, 4)
    assert "torn" not in out.read_text()
    assert read(out)["good"] == records["good"]

    source.write_bytes(b'{"id": "good", "text": "other text"}\n')
    assert run(engine, source, out).done == 1


def test_another_bundle_of_the_same_name_is_another_model(engine, tiny_model_dir, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "a", "text": "some text"}\n')
    assert run(engine, source, out).done == 1
    path = export_bundle(tiny_model_dir("qwen2"), tmp_path / "tiny", graphs=False)
    with Engine.from_bundle(path, EngineConfig(max_num_seqs=4, max_model_len=300, threads=2)) as other:
        assert other.model.name == engine.model.name
        assert run(other, source, out).done == 1
        assert run(other, source, out).skipped == 1


def test_folder(engine, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("text of a")
    (tmp_path / "docs" / "b.md").write_bytes(b"\xff\xfe")
    (tmp_path / "docs" / "c.bin").write_bytes(b"ignored")
    report = run(engine, tmp_path / "docs", tmp_path / "out.jsonl")
    assert (report.done, report.failed) == (1, 1)
    assert set(read(tmp_path / "out.jsonl")) == {"a.txt", "b.md"}


def test_refused_before_any_work(engine, tmp_path):
    source = tmp_path / "in.jsonl"
    with pytest.raises(NotFoundError):
        run(engine, source, tmp_path / "out")
    source.write_text('{"text": "x"}\n')
    with pytest.raises(InvalidRequestError, match="other than the input"):
        run(engine, source, source)
    with pytest.raises(ConfigError, match="chunk_tokens"):
        run(engine, source, tmp_path / "out", SummariseParams(max_summary_tokens=12, chunk_tokens=9999))
    assert source.read_text() == '{"text": "x"}\n'
