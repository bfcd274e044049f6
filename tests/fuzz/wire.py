"""Messages that are none, or nearly: changed bytes of real ones, sent to every method of a running server.

Each gets a status that says whose mistake it was, and never one that says that it was the server's.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence

import grpc
from motet.proto import admin_pb2, batch_pb2, inference_pb2

CODES = grpc.StatusCode
EXPECTED = {
    CODES.OK,
    CODES.INVALID_ARGUMENT,
    CODES.NOT_FOUND,
    CODES.RESOURCE_EXHAUSTED,
    CODES.PERMISSION_DENIED,
    CODES.UNIMPLEMENTED,
}


def _seeds() -> dict[str, list[bytes]]:
    """Method → real messages, which the fuzz begins with."""
    prompt = inference_pb2.Prompt(text="hello")
    chat = inference_pb2.Prompt(
        messages={"messages": [{"role": "user", "content": "hi", "tool_calls": "[]"}], "tools": "[{}]"}
    )
    member = inference_pb2.Member(name="a", mix=0.5, view=inference_pb2.View(prompt=prompt))
    generate = [
        inference_pb2.GenerateRequest(prompt=prompt, stopping={"max_tokens": 2}),
        inference_pb2.GenerateRequest(
            prompt=chat, sampling={"logprobs": 2, "n": 2}, stopping={"max_tokens": 2, "stop": ["x"]}
        ),
        inference_pb2.GenerateRequest(
            prompt=prompt,
            ensemble={"members": [member, {"name": "b", "mix": 0.5}]},
            sampling={"logit_bias": {3: 1.0}, "seed": 1, "temperature": 0.5},
            stopping={"max_tokens": 2},
            time_limit_s=5,
            priority=1,
            cache_salt="s",
        ),
    ]
    messages = {
        "/motet.v1.Inference/Generate": generate,
        "/motet.v1.Inference/Complete": generate,
        "/motet.v1.Inference/Tokenize": [inference_pb2.TokenizeRequest(prompt=p) for p in (prompt, chat)],
        "/motet.v1.Inference/Detokenize": [inference_pb2.DetokenizeRequest(token_ids=[1, 2, 3])],
        "/motet.v1.Inference/Abort": [inference_pb2.AbortRequest(request_id="x")],
        "/motet.v1.Admin/GetModel": [admin_pb2.GetModelRequest(name="tiny")],
        "/motet.v1.Admin/ListModels": [admin_pb2.ListModelsRequest()],
        "/motet.v1.Batch/Submit": [
            batch_pb2.SubmitRequest(
                settings=batch_pb2.JobSettings(endpoint="/v1/completions", defaults="{}", metadata={"a": "b"}),
                records=[batch_pb2.Record(id="a", text="x"), batch_pb2.Record(id="b", request='{"prompt": "x"}')],
                is_last=True,
            )
        ],
        "/motet.v1.Batch/Get": [batch_pb2.JobRequest(job_id="x")],
        "/motet.v1.Batch/List": [batch_pb2.ListRequest(limit=3, after="x")],
        "/motet.v1.Batch/Results": [batch_pb2.ResultsRequest(job_id="x", after=2)],
        "/motet.v1.Inference/Embed": [
            inference_pb2.EmbedRequest(
                prompts=[inference_pb2.Prompt(text="hello")],
                ensemble=inference_pb2.Ensemble(members=[inference_pb2.Member(name="a", mix=1.0)]),
            )
        ],
    }
    return {method: [message.SerializeToString() for message in kinds] for method, kinds in messages.items()}


def mutated(rng: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """The content after one to four random changes."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(found))
        match rng.randrange(6):
            case 0:
                found[at:at] = rng.randbytes(rng.randint(1, 8))
            case 1:
                del found[at : at + rng.randint(1, 4)]
            case 2:
                found[at : at + 1] = rng.randbytes(1)
            case 3:
                del found[at:]
            case 4:
                found[at:at] = rng.choice(others)
            case 5:
                found[at:at] = bytes([rng.choice((0xFF, 0x80, 0x00, 0x7F))] * rng.randint(1, 20))
    return bytes(found)


def fuzz(address: str, count: int, seed: int) -> Counter[grpc.StatusCode]:
    """Send so many messages; how many had which status. Raises `AssertionError` for one that should not be."""
    rng, statuses = random.Random(seed), Counter[grpc.StatusCode]()
    seeds = _seeds()
    everything = [content for kinds in seeds.values() for content in kinds]
    methods = sorted(seeds)
    with grpc.insecure_channel(address) as channel:
        calls = {m: (channel.unary_stream if m.endswith("Generate") else channel.unary_unary)(m) for m in methods}
        for index in range(count):
            method = rng.choice(methods)
            content = mutated(rng, rng.choice(seeds[method]), everything)
            try:
                answer = calls[method](content, timeout=30)
                list(answer) if method.endswith("Generate") else answer
                status = CODES.OK
            except grpc.RpcError as error:
                status = error.code()
            assert status in EXPECTED, f"message {index} of seed {seed}, {method}: {status}: {content.hex()}"
            statuses[status] += 1
    return statuses


def main() -> None:
    """100,000 messages to a server over the fake backend."""
    import logging
    import tempfile
    from pathlib import Path

    from helpers.fake_backend import make_engine
    from helpers.models import write_tokenizer
    from helpers.servers import serving
    from motet.runtime.text.tokenizer import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        with make_engine(Tokenizer.from_dir(Path(directory))) as engine, serving(engine) as running:
            print(
                {status.name: count for status, count in fuzz(running.address, arguments.count, arguments.seed).items()}
            )


if __name__ == "__main__":
    main()
