"""The batch job over a real bundle of a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import ConfigError, DataError, InvalidRequestError, NotFoundError
from motet.runtime.jobs.parts import Parts
from motet.runtime.jobs.summarise import summarise
from motet.runtime.text.documents import decode_text, split_document
from motet.runtime.text.summary import SummariseParams

PARAMS = SummariseParams(max_summary_tokens=12, chunk_tokens=60)
SHORT = SummariseParams("", max_summary_tokens=2)


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


def test_a_line_has_the_temperatures_that_are_not_1(engine, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "one", "text": "some text"}\n')
    [name] = engine.model.members
    run(engine, source, out, SHORT, ensemble=Ensemble((Member(name, 1.0, temperature=1.5),)))
    assert (read(out)["one"]["mix"], read(out)["one"]["temperatures"]) == ({name: 1.0}, {name: 1.5})
    run(engine, source, tmp_path / "plain.jsonl", SHORT)
    assert "temperatures" not in read(tmp_path / "plain.jsonl")["one"]
    parts = Parts(str(tmp_path / "parts"), "parquet")
    parts.write("0", [read(out)["one"]])
    assert [line["temperatures"] for line in parts.lines()] == [{name: 1.5}]


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


def test_every_length_that_is_accepted_comes_to_an_end(engine, tmp_path):
    """The tiny model's bytes are seldom characters, so its summaries have more tokens as text than were drawn."""
    source, text = tmp_path / "in.jsonl", "words in a row. " * 60
    source.write_text(json.dumps({"id": "long", "text": text}))
    with pytest.raises(ConfigError, match=r"must be in (\d+)…") as refused:
        run(engine, source, tmp_path / "out", SummariseParams("", 8, 16))
    least = int(str(refused.value).split("in ")[1].split("…")[0])
    assert least > 2 * 8
    with pytest.raises(ConfigError, match=f"must be in {least}…"):
        run(engine, source, tmp_path / "out", SummariseParams("", 8, least - 1))
    assert not (tmp_path / "out").exists()
    for params in (SummariseParams("", 8, least), SummariseParams("", 3, 21), SummariseParams("", 8, 40)):
        out = tmp_path / f"out-{params.max_summary_tokens}-{params.chunk_tokens}"
        assert run(engine, source, out, params).done == 1, out.read_text()
        first = len(split_document(engine.tokenizer, text, params.chunk_tokens))
        assert first < read(out)["long"]["chunks"] <= 3 * first  # each round has at most half the texts, rounded up


@pytest.mark.parametrize("context", [100, 128, 256, 2048])
def test_defaults_fit_the_context(tokenizer, context):
    params = SummariseParams("Sum up: ").fitted(tokenizer, context)
    prompt = (
        len(tokenizer.encode_chat([{"role": "user", "content": "Sum up: x"}])) if tokenizer.has_chat_template else 9
    )
    assert 1 <= params.max_summary_tokens <= 96
    assert 2 * params.max_summary_tokens < params.chunk_tokens <= 1024
    assert prompt - 1 + params.chunk_tokens + params.max_summary_tokens <= context
    assert params.fitted(tokenizer, context) == params  # what was chosen is allowed
    if context == 2048:
        assert (params.max_summary_tokens, params.chunk_tokens) == (96, 1024)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_summary_tokens": 250}, "max_summary_tokens must be at most"),
        ({"instruction": "x" * 300}, "shorten the instruction"),
        ({"chunk_tokens": 290}, "chunk_tokens must be in"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(tokenizer, params, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SHORT, **params).fitted(tokenizer, 300)


@pytest.mark.parametrize("value", [0, True, "8", 2.0])
def test_lengths_are_integers(value):
    with pytest.raises(ConfigError, match="max_summary_tokens must be an integer"):
        SummariseParams(max_summary_tokens=value)


BAD_LINES = {
    b'{"id": "a", "text": "\\ud800"}': "half of a surrogate pair",
    b'{"id": "\\udfff", "text": "x"}': "the id in line 2",
    b'{"id": ["a"], "text": "x"}': "the id in line 2",
    b'{"id": "a", "text": "\xe9"}': "not UTF-8",
    b"[" * 100_000: "not JSON",
    b'{"text": 1}': 'a "text" string',
    b"\xef\xbb\xbf": "not JSON",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=BAD_LINES.values())
def test_a_bad_line_is_one_failed_record(engine, tmp_path, line, message):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"id": "first", "text": "x"}\n' + line + b'\n{"id": 3, "text": "y"}\n')
    report = run(engine, source, out, SHORT)
    assert (report.done, report.failed) == (2, 1)
    records = read(out)
    assert {"first", "3"} < set(records)
    (error,) = [record["error"] for record in records.values() if "error" in record]
    assert error["type"] == "DataError"
    assert message in error["message"]
    again = run(engine, source, out, SHORT)
    assert (again.done, again.skipped, again.failed) == (0, 2, 1)
    assert len(read(out)) == 3


def test_a_folder_with_files_that_cannot_be_read(engine, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "bom.txt").write_bytes(b"\xef\xbb\xbfx")
    (docs / "plain.txt").write_bytes(b"x")
    (docs / os.fsdecode(b"caf\xe9.txt")).write_text("y")
    (docs / "link.txt").symlink_to(docs / "nothing")
    os.mkfifo(docs / "pipe.txt")
    (docs / "wide.txt").write_bytes("x".encode("utf-16"))
    report = run(engine, docs, tmp_path / "out", SHORT)
    assert (report.done, report.failed) == (3, 3)
    records = read(tmp_path / "out")
    assert {name for name, record in records.items() if "error" in record} == {"link.txt", "pipe.txt", "wide.txt"}
    assert records["caf\\xe9.txt"]["source"].endswith("caf\\xe9.txt")
    assert records["bom.txt"]["summary"] == records["plain.txt"]["summary"]
    assert records["bom.txt"]["prompt_tokens"] == records["plain.txt"]["prompt_tokens"]


def test_a_folder_that_cannot_be_listed_is_a_failed_record(engine, tmp_path, monkeypatch):
    (tmp_path / "docs" / "closed").mkdir(parents=True)
    (tmp_path / "docs" / "a.txt").write_text("x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = run(engine, tmp_path / "docs", tmp_path / "out", SHORT)
    assert (report.done, report.failed) == (1, 1)
    assert "Permission denied" in read(tmp_path / "out")["closed"]["error"]["message"]


FOREIGN = {
    "notes": b"my notes\n",
    "a line without an end": b"my notes",
    "records of another kind": b'{"id": "a", "text": "x"}\n',
    "one record without an end": b'{"id": "a", "text": "x"}',
    "after a record": b'{"id": "a", "source": "b", "error": {}}\n{"text": "x"}\n',
    "binary": bytes(range(256)),
    "an empty line": b"\n",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_no_job_wrote_is_kept(engine, tmp_path, content):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "x"}\n')
    out.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"line \d of '.*out.jsonl' was not written by a job"):
        run(engine, source, out, SHORT)
    assert out.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_outputs_that_are_part_of_the_input(engine, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InvalidRequestError, match="read as a text of the input folder"):
        run(engine, tmp_path, tmp_path / "out.txt", SHORT)
    os.link(tmp_path / "a.txt", tmp_path / "same")
    with pytest.raises(InvalidRequestError, match="other than the input"):
        run(engine, tmp_path / "a.txt", tmp_path / "same", SHORT)
    assert (tmp_path / "a.txt").read_text() == "x"


def test_decode_text():
    assert decode_text(b"\xef\xbb\xbf\xc3\xa9", "it") == "é"
    with pytest.raises(DataError, match="it is not UTF-8 at byte 1"):
        decode_text(b"a\xff", "it")
