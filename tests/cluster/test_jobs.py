"""A job over a Ray cluster of this machine: the same results as in one process, each once, whatever ends in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time

import pytest
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.cluster import jobs
from motet.runtime.errors import DataError, InvalidRequestError, NotFoundError, UnavailableError
from motet.runtime.jobs.parts import Parts
from motet.runtime.jobs.work import JobReport, RequestWork, SummariseWork, run
from motet.runtime.text.summary import SummariseParams

pytestmark = pytest.mark.slow
CONFIG = EngineConfig(threads=1, max_num_seqs=4)
WORK = RequestWork("/v1/completions", {"max_tokens": 12, "temperature": 0.9, "ignore_eos": True})


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    return export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("ray") / "tiny")


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # another cluster, which "local" does not take
        with jobs.cluster("local", 2):
            yield


def write(path, count):
    path.write_text("".join(json.dumps({"id": f"r{i}", "text": f"text number {i}"}) + "\n" for i in range(count)))
    return path


def answers(out):
    """Id → what does not differ from run to run. Fails if an id is there twice."""
    found = {}
    for line in Parts(str(out)).lines():
        assert line["custom_id"] not in found, "answered twice"
        body = line["response"]["body"]
        found[line["custom_id"]] = line["response"]["status_code"], body["choices"], body["usage"]["total_tokens"]
    return found


def test_the_same_as_in_one_process(bundle, cluster, tmp_path):
    source = write(tmp_path / "in.jsonl", 200)
    assert run(WORK, bundle, CONFIG, source, Parts(str(tmp_path / "alone"))) == JobReport(200, 0, 0)
    for form in ("jsonl", "parquet"):
        out = str(tmp_path / form)
        assert jobs.run(WORK, bundle, CONFIG, str(source), out, actors=2, out_format=form) == JobReport(200, 0, 0)
        assert answers(out) == answers(tmp_path / "alone")
    again = write(tmp_path / "in.jsonl", 203)
    assert jobs.run(WORK, bundle, CONFIG, str(again), out, actors=1) == JobReport(3, 0, 200)
    assert len(answers(out)) == 203


def test_summaries_from_parquet_and_folders(bundle, cluster, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    work = SummariseWork(params=SummariseParams(max_summary_tokens=8, chunk_tokens=40))
    texts = {f"d{i}.txt": f"document {i} " * 60 for i in range(6)}
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    pa.parquet.write_table(pa.table({"id": list(texts), "text": list(texts.values())}), tmp_path / "in.parquet")
    run(work, bundle, CONFIG, folder, Parts(str(tmp_path / "alone")))
    alone = {line["id"]: line["summary"] for line in Parts(str(tmp_path / "alone")).lines()}
    assert set(alone) == set(texts)
    assert jobs.run(work, bundle, CONFIG, str(tmp_path / "in.parquet"), str(tmp_path / "p"), actors=1).done == 6
    assert {line["id"]: line["summary"] for line in Parts(str(tmp_path / "p")).lines()} == alone
    assert jobs.run(work, bundle, CONFIG, str(folder), str(tmp_path / "f"), actors=1).done == 6
    assert sorted(line["summary"] for line in Parts(str(tmp_path / "f")).lines()) == sorted(alone.values())


def test_what_cannot_be_answered_fails_alone(bundle, cluster, tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [{"id": "good", "text": "x"}, {"text": "no id"}, {"id": "empty", "text": " "}, {"id": 5}]
    body = {"prompt": "x", "max_tokens": 3, "temperature": -1}
    lines += [{"custom_id": "wrong", "url": "/v1/completions", "body": body}]
    lines += [{"custom_id": "other", "url": "/v1/embeddings", "body": {"input": "x"}}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no json\n")
    report = jobs.run(WORK, bundle, CONFIG, str(source), str(tmp_path / "out"), actors=1)
    assert (report.done, report.failed) == (2, 5)
    statuses = {line["custom_id"]: line["response"]["status_code"] for line in Parts(str(tmp_path / "out")).lines()}
    assert statuses["good"] == 200 and statuses["wrong"] == statuses["other"] == statuses["empty"] == 400
    assert len(statuses) == 7
    with pytest.raises(NotFoundError):
        jobs.run(WORK, bundle, CONFIG, str(tmp_path / "nothing.jsonl"), str(tmp_path / "x"), actors=1)
    with pytest.raises(InvalidRequestError, match="endpoint"):
        jobs.run(RequestWork("/v1/nothing"), bundle, CONFIG, str(source), str(tmp_path / "y"), actors=1)


def test_a_killed_actor_loses_and_doubles_nothing(bundle, cluster, tmp_path):
    source = write(tmp_path / "in.jsonl", 1500)
    killed = []

    def kill():
        while len(killed) < 2:
            time.sleep(0.7)
            found = subprocess.run(["pgrep", "-f", "ray::MapWorker"], capture_output=True, text=True, check=False)
            if pids := found.stdout.split():
                os.kill(int(pids[-1]), signal.SIGKILL)
                killed.append(pids[-1])

    thread = threading.Thread(target=kill)
    thread.start()
    report = jobs.run(WORK, bundle, CONFIG, str(source), str(tmp_path / "out"), actors=2)
    thread.join()
    assert report == JobReport(1500, 0, 0)
    assert set(answers(tmp_path / "out")) == {f"r{i}" for i in range(1500)}


def test_lines_are_cut_as_files_are_not_as_unicode_is(bundle, cluster, tmp_path):
    source = tmp_path / "in.jsonl"
    texts = ["one\u2028two", "three\x85four", "five\u2029six"]
    lines = [json.dumps({"id": f"r{i}", "text": text}, ensure_ascii=False).encode() for i, text in enumerate(texts)]
    source.write_bytes(b"\n".join([*lines, b'{"id": "bad", "text": "\xff"}', b"", lines[0].replace(b"r0", b"r9")]))
    report = jobs.run(WORK, bundle, CONFIG, str(source), str(tmp_path / "out"), actors=1)
    assert (report.done, report.failed) == (4, 1)


def test_a_job_writes_only_where_jobs_have_written(bundle, tmp_path):
    """Others name their files as we do."""
    source = write(tmp_path / "in.jsonl", 3)
    other = tmp_path / "other"
    other.mkdir()
    write(other / "part-00001.jsonl", 2)
    with pytest.raises(DataError, match="was not written by a job"):
        run(WORK, bundle, CONFIG, source, Parts(str(other)))
    for out in (tmp_path, source):
        with pytest.raises((InvalidRequestError, UnavailableError)):
            run(WORK, bundle, CONFIG, source, Parts(str(out)))
    with pytest.raises(InvalidRequestError, match="must not lie in each other"):
        run(WORK, bundle, CONFIG, other / "part-00001.jsonl", Parts(str(other)))
    assert len((other / "part-00001.jsonl").read_text().splitlines()) == 2


def test_one_record_does_not_end_the_others(bundle, tmp_path):
    source = tmp_path / "in.jsonl"
    body = {"prompt": "x", "max_tokens": 1}
    lines = [{"custom_id": name, "url": "/v1/completions", "body": body} for name in ("good", "\ud800")]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run(WORK, bundle, CONFIG, source, Parts(str(tmp_path / "out")))
    assert (report.done, report.failed) == (1, 1)


def test_parts_are_whole_or_absent(tmp_path):
    parts = Parts(str(tmp_path))
    first = {"custom_id": "1", "response": {"status_code": 200}, "key": "k1"}
    parts.write("a", [first, {"custom_id": "2", "response": {"status_code": 500}}])
    parts.write("b", [{"custom_id": "3", "response": {"status_code": 429}}])
    (tmp_path / ".part-c.new").write_text('{"custom_id": "4"')  # of a process that was killed
    assert parts.keep_finished() == {"k1"}
    assert list(parts.lines()) == [first]
    (tmp_path / "part-x.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="was not written by a job"):
        parts.keep_finished()
