"""Every method × every way in which a call ends: what was taken is given back, and the next call is answered."""

from __future__ import annotations

import time
from contextlib import suppress

import grpc
import pytest
from google.protobuf import message_factory
from helpers.servers import is_free, serving, until
from motet.proto import admin_pb2, batch_pb2, inference_pb2
from motet.runtime import errors
from motet.runtime.api.request import FinishReason
from motet.runtime.client.client import Client
from motet.runtime.serve.batch.runner import Jobs
from motet.runtime.serve.http.app import App
from motet.runtime.trust.access import Access

pytestmark = pytest.mark.slow
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def message(**fields):
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text="hello"),
        sampling=inference_pb2.Sampling(temperature=0.0),
        stopping=inference_pb2.Stopping(max_tokens=60, ignore_eos=True),
        **fields,
    )


def finish(_call, _engine, _backend):
    """Nothing is done to it."""


def wait_until_begun(call, engine):
    """Until the engine has made a token of it, or it is answered."""
    until(lambda: engine.stats().tokens > 0 or call.done())


def cancel(call, engine, _backend):
    wait_until_begun(call, engine)
    call.cancel()


def deadline(_call, _engine, _backend):
    """The call has one of 50 ms."""


def error(_call, _engine, backend):
    backend.fail_next = True


def shutdown(call, engine, _backend):
    wait_until_begun(call, engine)
    engine.abort(None, FinishReason.SHUTDOWN)


METHODS = {
    f"{service.full_name}/{method.name}": method
    for file in (inference_pb2, batch_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# What is sent; a method that is not here gets an empty message, with the id of a job if it has one.
MESSAGES = {
    "motet.v1.Inference/Generate": message(),
    "motet.v1.Inference/Generate-drafts": message(drafts=3),
    "motet.v1.Inference/Complete": message(),
    "motet.v1.Inference/Complete-choices": message(),
    "motet.v1.Inference/Tokenize": inference_pb2.TokenizeRequest(prompt=inference_pb2.Prompt(text="hello")),
    "motet.v1.Inference/Detokenize": inference_pb2.DetokenizeRequest(token_ids=[5, 6]),
    "motet.v1.Inference/Embed": inference_pb2.EmbedRequest(prompts=[inference_pb2.Prompt(text="hello")]),
    "motet.v1.Inference/Abort": inference_pb2.AbortRequest(request_id="x"),
    "motet.v1.Batch/Submit": batch_pb2.SubmitRequest(
        settings=batch_pb2.JobSettings(endpoint="/v1/completions"),
        records=[batch_pb2.Record(id="1", request='{"prompt": "a", "max_tokens": 9, "ignore_eos": true}')],
        is_last=True,
    ),
}
GENERATES = ("motet.v1.Inference/Generate", "motet.v1.Inference/Complete")
MESSAGES["motet.v1.Inference/Generate-drafts"].sampling.temperature = 1.0
MESSAGES["motet.v1.Inference/Complete-choices"].sampling.n = 3


def begin(channel, name, job="", timeout=20.0):
    """A call that runs. Its responses are `list(call)` if it streams them, else `call.result()`."""
    method = METHODS[name.split("-")[0]]
    sent = MESSAGES.get(name)
    if sent is None:
        sent = message_factory.GetMessageClass(method.input_type)()
        if "job_id" in method.input_type.fields_by_name:
            sent.job_id = job
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    made = getattr(channel, kind)(
        f"/{name.split('-')[0]}",
        request_serializer=lambda one: one.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    asked = iter([sent]) if method.client_streaming else sent
    return made(asked, timeout=timeout) if method.server_streaming else made.future(asked, timeout=timeout)


def end(call, name):
    """Read a call to its end, however that is."""
    with suppress(grpc.RpcError, grpc.FutureCancelledError):
        return list(call) if METHODS[name.split("-")[0]].server_streaming else [call.result()]
    return None


@pytest.mark.parametrize("ending", [finish, cancel, deadline, error, shutdown])
@pytest.mark.parametrize("name", sorted({*METHODS, *MESSAGES}))
def test_what_was_taken_is_given_back(engine, backend, tmp_path, name, ending):
    def prepare(server):
        app = App(server.service, Access.open_to_all())
        server.jobs = app.door.jobs = Jobs(server.service, tmp_path, app.answer)
        server.jobs.start()

    with (
        serving(engine, Access.open_to_all(may_drain=True), prepare=prepare) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        is_of_jobs = "Batch" in name
        [job] = end(begin(channel, "motet.v1.Batch/Submit"), "motet.v1.Batch/Submit") if is_of_jobs else [None]
        backend.on_step = lambda _batch: time.sleep(0.002)
        call = begin(channel, name, job.id if is_of_jobs else "", 0.05 if ending is deadline else 20)
        ending(call, engine, backend)
        found = end(call, name)
        if ending is finish:  # it is none that was refused at once
            assert found is not None
        if name.startswith(GENERATES):
            assert ending is not error or not backend.fail_next  # the failure was this call's
            if ending is shutdown:
                assert "SHUTDOWN" in str(found), found
        until(lambda: is_free(engine, running.service))
        backend.fail_next = False
        with Client(running.address) as client:
            if name.endswith("/Drain") and running.service.is_leaving:
                with pytest.raises(errors.UnavailableError):
                    client.complete("again", max_tokens=3, **GREEDY)
            else:
                assert len(client.complete("again", max_tokens=3, **GREEDY)[0].token_ids) == 3
