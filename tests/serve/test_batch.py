"""Batch jobs: every record is answered once, whatever happens in between."""

from __future__ import annotations

import json
import time

import grpc
import openai
import pytest
from helpers.batch_jobs import ended, killed_and_undisturbed, memory_of_a_submission
from helpers.fake_backend import FakeBackend, make_engine
from helpers.servers import serving, serving_http, until
from motet.export.bundle_writer import export_bundle
from motet.proto import batch_pb2, batch_pb2_grpc
from motet.runtime.client.batch import BatchClient
from motet.runtime.client.client import Client
from motet.runtime.client.connection import Connection
from motet.runtime.errors import (
    DataError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
    UnimplementedError,
)
from motet.runtime.serve.batch import runner
from motet.runtime.serve.batch.runner import Jobs
from motet.runtime.serve.grpc.statuses import Statuses
from motet.runtime.serve.http.app import App
from motet.runtime.trust.access import Access
from motet.runtime.trust.identity import Role
from motet.runtime.trust.keys import KeyFile, add_key, revoke_key
from motet.runtime.trust.quotas import TenantLimits

BODY = {"max_tokens": 6, "ignore_eos": True, "temperature": 0.9}


@pytest.fixture
def engine(tokenizer):
    with make_engine(tokenizer, FakeBackend(200, vocab_size=259)) as engine:
        yield engine


def with_jobs(engine, directory, access=None, **options):
    """A gRPC door with batch jobs."""

    def prepare(server):
        app = App(server.service, access or Access.open_to_all())
        server.jobs = app.door.jobs = Jobs(server.service, directory, app.answer)
        server.jobs.start()

    return serving(engine, access, prepare=prepare, **options)


def records(count):
    return [(f"r{i}", {"prompt": f"text {i % 7}", **BODY}) for i in range(count)]


def test_a_job_has_the_answers_of_single_requests(engine, tmp_path):
    with with_jobs(engine, tmp_path / "state") as running, BatchClient(running.address) as client:
        job = client.submit("/v1/completions", records(40), metadata={"who": "me"})
        assert (job.total, job.state in ("queued", "running"), job.metadata) == (40, True, {"who": "me"})
        last, found = ended(client, job.id)
        assert (last.state, last.done, last.failed) == ("done", 40, 0)
        assert [result.number for result in found.values()] == list(range(1, 41))
        assert {result.id for result in client.results(job.id)} == {f"r{i}" for i in range(40)}
        assert [result.number for result in client.results(job.id, after=38)] == [39, 40]
        assert [one.id for one in client.jobs()] == [job.id]
        with Client(running.address) as own:
            for index in (0, 17):
                choice = found[f"r{index}"].response["choices"][0]
                [alone] = own.complete(f"text {index % 7}", seed=choice["seed"], **BODY)
                assert choice["text"] == alone.text
        client.delete(job.id)
        assert client.jobs() == []
        with pytest.raises(NotFoundError):
            client.get(job.id)


def test_records_fail_alone(engine, tmp_path):
    task = [("good", {"prompt": "x", **BODY}), ("bad", {"prompt": "x", "temperature": -1}), ("odd", {"promptt": "x"})]
    with with_jobs(engine, tmp_path) as running, BatchClient(running.address) as client:
        last, found = ended(client, client.submit("/v1/completions", task).id)
        assert (last.done, last.failed) == (1, 2)
        assert [found[name].status for name in ("good", "bad", "odd")] == [200, 400, 400]
        assert "temperature" in found["bad"].response["error"]["message"]


def test_every_kind_of_task(engine, tmp_path):
    with with_jobs(engine, tmp_path) as running, BatchClient(running.address) as client:
        for endpoint, task, name in (
            ("/v1/chat/completions", "hello", "choices"),
            ("/v1/responses", "hello", "output"),
            ("/v1/embeddings", "hello", "data"),
            ("/v1/summarise", "some words to make shorter", "summary"),
            ("/v1/classify", {"text": "good", "labels": ["yes", "no"]}, "labels"),
        ):
            limits = {"/v1/chat/completions": {"max_tokens": 5}, "/v1/responses": {"max_output_tokens": 5}}
            limits["/v1/summarise"] = {"max_summary_tokens": 4, "instruction": "short: "}
            job = client.submit(endpoint, [("a", task)], defaults=limits.get(endpoint))
            _, found = ended(client, job.id)
            assert found["a"].status == 200, found
            assert found["a"].response[name]


REFUSED = {
    "an unknown endpoint": ("/v1/models", [("a", {})], InvalidRequestError, "endpoint must be"),
    "an id twice": ("/v1/completions", [("a", {}), ("a", {})], DataError, "same id"),
    "no id": ("/v1/completions", [("", {})], InvalidRequestError, "id of a record"),
    "a stream": ("/v1/completions", [("a", {"stream": True})], DataError, "leave stream out"),
    "an id of a request": ("/v1/completions", [("a", {"request_id": "x"})], DataError, "request_id"),
    "half a character": ("/v1/completions", [("a", {"prompt": "\ud800"})], DataError, "half of a character"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_job_is_taken_whole_or_not_at_all(engine, tmp_path, case):
    endpoint, task, error, text = REFUSED[case]
    with with_jobs(engine, tmp_path) as running, BatchClient(running.address) as client:
        with pytest.raises(error, match=text):
            client.submit(endpoint, [("first", {"prompt": "x"}), *task])

        def broken():
            yield "a", {"prompt": "x"}
            raise ValueError("the source broke")

        with pytest.raises(ValueError, match="source broke"):
            client.submit("/v1/completions", broken())
        assert client.jobs() == []


def test_defaults_are_checked_with_each_record(engine, tmp_path):
    with with_jobs(engine, tmp_path) as running, BatchClient(running.address) as client:
        for defaults, error, text in (
            ({"stream": True}, DataError, "leave stream out"),
            ({"prompt": "x" * 20_000}, InvalidRequestError, "defaults have at most"),
        ):
            with pytest.raises(error, match=text):
                client.submit("/v1/completions", [("a", {"prompt": "x"})], defaults=defaults)
        assert client.jobs() == []


def test_calls_after_the_end_are_unavailable(engine, tmp_path):
    with with_jobs(engine, tmp_path) as running, BatchClient(running.address) as client:
        job = client.submit("/v1/completions", records(2))
        ended(client, job.id)
        running.start(running.server.jobs.stop()).result(20)
        for call in (lambda: client.get(job.id), client.jobs, lambda: client.submit("/v1/completions", records(1))):
            with pytest.raises(UnavailableError, match="next start"):
                call()


def test_cancel_keeps_what_there_is(engine, tmp_path):
    engine._backend.on_step = lambda _batch: time.sleep(0.005)
    with with_jobs(engine, tmp_path) as running, BatchClient(running.address) as client:
        job = client.submit("/v1/completions", records(200))
        until(lambda: client.get(job.id).done > 5)
        assert client.cancel(job.id).state == "cancelled"
        done = client.get(job.id).done
        until(lambda: engine.is_idle)
        assert client.get(job.id).done == done == len(list(client.results(job.id))) < 200


def test_without_a_state_directory(engine):
    with serving(engine) as running, BatchClient(running.address) as client:
        with pytest.raises(UnimplementedError, match="--state-dir"):
            client.submit("/v1/completions", records(1))
        with pytest.raises(UnimplementedError, match="--state-dir"):
            list(client.watch("x"))


def test_a_tenant_sees_its_own(engine, tmp_path):
    keys = tmp_path / "keys.json"
    mine, other, infer = (
        add_key(keys, tenant, [role]) for tenant, role in (("a", Role.BATCH), ("b", Role.BATCH), ("a", Role.INFER))
    )
    with with_jobs(engine, tmp_path / "state", Access(KeyFile(keys))) as running:
        with BatchClient(Connection(running.address, key=mine)) as client:
            job = client.submit("/v1/completions", records(3))
            ended(client, job.id)
        with BatchClient(Connection(running.address, key=other)) as client:
            assert client.jobs() == []
            for call in (client.get, client.cancel, client.delete, lambda id: list(client.results(id))):
                with pytest.raises(NotFoundError):
                    call(job.id)
        with BatchClient(Connection(running.address, key=infer)) as client, pytest.raises(PermissionDeniedError):
            client.jobs()


def test_a_revoked_keys_job_ends(tokenizer, tmp_path):
    """What runs is answered; every record after that says why it is not."""
    backend = FakeBackend(200, vocab_size=259)
    backend.on_step = lambda _batch: time.sleep(0.002)
    keys = tmp_path / "keys.json"
    mine, other = (add_key(keys, "a", [Role.BATCH]) for _ in range(2))
    with (
        make_engine(tokenizer, backend) as engine,
        with_jobs(engine, tmp_path / "state", Access(KeyFile(keys))) as running,
        BatchClient(Connection(running.address, key=mine)) as client,
        BatchClient(Connection(running.address, key=other)) as of_same_tenant,
    ):
        job = client.submit("/v1/completions", records(300))
        until(lambda: of_same_tenant.get(job.id).done > 5)
        revoke_key(keys, mine.split("-")[1])
        last, found = ended(of_same_tenant, job.id)
        assert last.state == "done" and last.done + last.failed == 300 and last.failed > 0
        refused = [result.response["error"] for result in found.values() if result.status == 401]
        assert len(refused) == last.failed
        assert {error["code"] for error in refused} == {"invalid_api_key"}
        assert all("revoked; ask again with another one" in error["message"] for error in refused)
        again = of_same_tenant.submit("/v1/completions", records(3))  # the tenant's other key is not touched
        assert ended(of_same_tenant, again.id)[0].done == 3


# ---- a server that is killed -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_server_goes_on(tiny_model_dir, tmp_path):
    bundle = export_bundle(tiny_model_dir("llama"), tmp_path / "tiny", graphs=False)
    killed, undisturbed = killed_and_undisturbed(bundle, tmp_path, count=60, kills=3, seed=1)
    assert killed == undisturbed
    assert len(killed) == 60


@pytest.mark.slow
def test_a_large_job_needs_no_more_memory_than_a_small_one(tiny_model_dir, tmp_path):
    bundle = export_bundle(tiny_model_dir("llama"), tmp_path / "tiny", graphs=False)
    small, large = (memory_of_a_submission(bundle, tmp_path / str(count), count) for count in (1000, 20_000))
    assert large < small + 60, "MiB; the requests alone are 40"


# ---- OpenAI's files and batches --------------------------------------------------------------------------------------


def test_openai_batches(engine, tmp_path):
    with serving_http(engine, state=tmp_path / "state") as (address, _service):
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": "hello", **BODY, **more}}
            for name, more in (("one", {}), ("two", {"seed": 5}), ("bad", {"temperature": -1}))
        ]
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        assert file.bytes == len(content)
        assert [one.id for one in client.files.list()] == [file.id]
        assert client.files.content(file.id).read() == content
        options = {"endpoint": "/v1/completions", "completion_window": "24h", "metadata": {"a": "b"}}
        batch = client.batches.create(input_file_id=file.id, **options)
        until(lambda: client.batches.retrieve(batch.id).status == "completed")
        batch = client.batches.retrieve(batch.id)
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
        assert (batch.metadata, batch.input_file_id) == ({"a": "b"}, file.id)
        output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert {line["custom_id"] for line in output} == {"one", "two"}
        asked = {"model": "fake", "prompt": "hello", "seed": 5, "temperature": 0.9, "max_tokens": 6}
        again = client.completions.create(**asked, extra_body={"ignore_eos": True})
        [two] = [line for line in output if line["custom_id"] == "two"]
        assert two["response"]["body"]["choices"][0]["text"] == again.choices[0].text
        [error] = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
        assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
        assert [one.id for one in client.batches.list()] == [batch.id]
        with pytest.raises(openai.BadRequestError, match="line 1 of the file is for"):
            client.batches.create(input_file_id=file.id, **(options | {"endpoint": "/v1/embeddings"}))
        assert client.files.delete(file.id).deleted
        for id in (file.id, "file-../../keys", "batch_x-output"):
            with pytest.raises(openai.NotFoundError):
                client.files.content(id)
        with pytest.raises(openai.NotFoundError):
            client.batches.create(input_file_id=file.id, **options)
        with pytest.raises(openai.BadRequestError, match="purpose"):
            client.files.create(file=("in.jsonl", b"{}"), purpose="fine-tune")


def test_a_submission_that_is_cut_is_nothing(engine, tmp_path):
    """However the stream ends: a client that breaks off may look like one that has sent all."""
    settings = batch_pb2.JobSettings(endpoint="/v1/completions")
    record = batch_pb2.Record(id="a", request='{"prompt": "x"}')
    cut = [batch_pb2.SubmitRequest(settings=settings, records=[record])]
    after = [*cut, batch_pb2.SubmitRequest(is_last=True), batch_pb2.SubmitRequest(records=[record])]
    with with_jobs(engine, tmp_path) as running, grpc.insecure_channel(running.address) as channel:
        stub = batch_pb2_grpc.BatchStub(channel)
        for messages in (cut, after, [], [batch_pb2.SubmitRequest(records=[record])]):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Submit(iter(messages))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not stub.List(batch_pb2.ListRequest()).jobs
        assert stub.Submit(iter([*cut, batch_pb2.SubmitRequest(is_last=True)])).total == 1


def test_watch_sends_all_of_large_results(engine, tmp_path):
    """A page is short where its results are large, and still not the last one."""
    with with_jobs(engine, tmp_path) as running, BatchClient(running.address) as client:
        texts = [f"text {i}" for i in range(200)]
        job = client.submit("/v1/embeddings", [(f"r{i}", {"input": texts}) for i in range(12)])
        ended(client, job.id)
        running.start(running.server.jobs._run(lambda: grow(running.server.jobs._store, job.id))).result(20)
        _, found = ended(client, job.id)
        assert len(found) == len(list(client.results(job.id))) == 12


def grow(store, job, size=2**20):
    """Make its results as large as those of a model that is not tiny."""
    large = json.dumps({"data": "x" * size}).encode()
    store._database.execute("update records set response = ? where job = ?", (large, job))


def test_a_small_quota_makes_a_job_slower_and_loses_nothing(engine, tmp_path, monkeypatch):
    """One record may run at a time, and the others are refused meanwhile, far more often than a record may be refused alone."""
    monkeypatch.setattr(runner, "_MOST_WAITS", 3)
    limits = {"default": TenantLimits(max_requests=2)}
    with with_jobs(engine, tmp_path, service={"limits": limits}) as running, BatchClient(running.address) as client:
        job = client.submit("/v1/completions", records(60))
        last, found = ended(client, job.id)
        assert (last.done, last.failed, len(found)) == (60, 0, 60)


def test_a_record_that_never_has_room_has_an_end(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_MOST_WAITS", 2)
    limits = {"default": TenantLimits(requests_per_minute=3)}
    with with_jobs(engine, tmp_path, service={"limits": limits}) as running, BatchClient(running.address) as client:
        job = client.submit("/v1/completions", [("r", {"prompt": [f"text {i}" for i in range(5)], **BODY})])
        last, found = ended(client, job.id)
        assert (last.failed, found["r"].status) == (1, 429)


@pytest.mark.parametrize("method", ["Results", "Watch"])
def test_results_that_nobody_reads_are_ended(engine, tmp_path, method, monkeypatch):
    given_up, send = [], Statuses._send

    async def noting(*args):
        try:
            await send(*args)
        except UnavailableError:
            given_up.append(method)
            raise

    monkeypatch.setattr(Statuses, "_send", noting)
    with (
        with_jobs(engine, tmp_path, service={"send_timeout_s": 0.5}) as running,
        BatchClient(running.address) as client,
        grpc.insecure_channel(running.address) as channel,
    ):
        texts = [f"text {i}" for i in range(20)]
        job = client.submit("/v1/embeddings", [(f"r{i}", {"input": texts}) for i in range(24)])
        ended(client, job.id)
        running.start(
            running.server.jobs._run(lambda: grow(running.server.jobs._store, job.id, 29 * 2**20 // 10))
        ).result(20)
        stub = batch_pb2_grpc.BatchStub(channel)
        calls = [getattr(stub, method)(batch_pb2.ResultsRequest(job_id=job.id)) for _ in range(5)]
        until(lambda: len(given_up) == 5, seconds=60)
        until(lambda: running.server.service._quotas.num_open == 0)
        for call in calls:
            with pytest.raises(grpc.RpcError, match="not read"):
                list(call)
