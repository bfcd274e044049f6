"""What is typed is used or refused, on every command: options that would do nothing, and text that is not UTF-8."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest
from motet.cli import main
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.client.client import Client
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import BundleError, ConfigError, UnsupportedModelError
from motet.runtime.model.bundle import MANIFEST
from motet.runtime.model.files import file_digest
from motet.runtime.model.generation import recommended_sampling
from motet.runtime.serve.local import serve_engine

LATIN1 = os.fsdecode(b"caf\xe9")
NOWHERE = ("--address", "127.0.0.1:1")


@pytest.fixture(scope="module")
def bundle(tiny_model_dir, tmp_path_factory):
    return export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("used") / "tiny", graphs=False)


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments, bytes of stdin) → (exit code, stdout, stderr) of a command in this process."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["motet", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


REFUSED = [
    (("generate", "x", "--space", "probs", *NOWHERE), "give --mix too"),
    (("chat", "--space", "probs", *NOWHERE), "give --mix too"),
    (("summarise", "cli", "out", "--bundle", "b", "--space", "probs"), "give --mix too"),
    (("generate", "x", "--member", "a", *NOWHERE), "give --context too"),
    (("generate", "x", "--alpha", "0.5", *NOWHERE), "give --context too"),
    (("generate", "x", "--bundle", "b", *NOWHERE), "give one of them"),
    (("chat", "--bundle", "b", *NOWHERE), "give one of them"),
    (("generate", "x", "--defaults", "model", *NOWHERE), "give --bundle too"),
    (("chat", "--defaults", "model", *NOWHERE), "give --bundle too"),
    (("generate", "x", "--defaults", "none", *NOWHERE), "'--defaults'"),
    (("chat", "--n", "2", *NOWHERE), "No such option"),
    (("generate", "x", "--stop", "", *NOWHERE), "stop strings must be"),
    (("generate", "x", "--min-tokens", "9", "--max-tokens", "8", *NOWHERE), "min_tokens must be at most"),
    (("bench", "decode", "b", "--bits", "4"), "--bits is for random weights"),
    (
        ("bench", "decode", "--random", "llama-1b", "--backend", "torch", "--new-tokens", "4"),
        "--new-tokens is for bundles",
    ),
    (("bench", "decode", "b", "--batch-sizes", ""), "is not a list"),
    (("bench", "decode", "b", "--batch-sizes", "1,0"), "at least 1"),
    (("bench", "serve", "b", "--rates", "0"), "above 0"),
    (("bench", "serve", "b", "--rates", "nan"), "finite"),
    (("bench", "quality", "b", "--no-peers", "--peer-python", "p"), "leave out --no-peers"),
    (("bench", "context", "b", "--contexts", ","), "is not a list"),
    (("serve", "b", "--onnx-provider", "cuda"), "add backend onnx"),
    (("generate", LATIN1, *NOWHERE), "argument 2, 'caf\\udce9', is not UTF-8"),
    (("chat", "--system", LATIN1, *NOWHERE), "argument 3"),
    (("summarise", "cli", LATIN1, "--bundle", "b"), "argument 3"),
    (("export", "m", LATIN1), "argument 3"),
    (("pull", LATIN1), "argument 2"),
    (("tune", "m", "--data", LATIN1, "--out", "o"), "argument 4"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: ascii(value)[:60])
def test_refused_before_any_work(command, arguments, message):
    code, out, error = command(*arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"merge": True}, "merge is for adapters"), ({"bits": 32, "group_size": 16}, "group_size is for 4 and 8 bits")],
)
def test_export_refuses_what_it_would_not_use(tiny_model_dir, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export_bundle(tiny_model_dir("llama"), tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_a_context_file(command, bundle, tmp_path):
    """With and without a byte order mark it is the same text; what cannot be read is refused."""
    options = ("generate", "x", "--bundle", bundle, "--max-tokens", 4, "--seed", 3, "--member", "base")
    answers = []
    for content in (b"a letter", b"\xef\xbb\xbfa letter"):
        (tmp_path / "letter").write_bytes(content)
        code, out, error = command(*options, "--context", tmp_path / "letter", "--json")
        assert code == 0, error
        answers.append(json.loads(out)["token_ids"])
    assert answers[0] == answers[1]
    (tmp_path / "letter").write_bytes(b"a\xff")
    for path, message in (
        (tmp_path / "letter", "not UTF-8 at byte 1"),
        (tmp_path, "cannot be read"),
        ("no", "cannot be"),
    ):
        code, _, error = command(*options, "--context", path)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error


def test_standard_input_of_chat(command, bundle):
    options = ("chat", "--bundle", bundle, "--max-tokens", 4, "--temperature", 0)
    code, _, error = command(*options, stdin=b"caf\xe9\n")
    assert (code, error) == (2, "motet: standard input is not UTF-8; convert it to UTF-8\n")
    plain, marked = (command(*options, stdin=mark + b"hello\n")[1] for mark in (b"", b"\xef\xbb\xbf"))
    assert plain == marked
    assert len(plain) > len("> > ")


def test_choices_as_json(command, bundle):
    options = ("--max-tokens", 3, "--ignore-eos", "--n", 2, "--logprobs", 2, "--seed", 5)
    options += ("--member-logprobs", "--logprob-token-ids", 7)
    code, out, _ = command("generate", "x", "--bundle", bundle, "--json", "--request-id", "mine", *options)
    assert code == 0
    choices = [json.loads(line) for line in out.splitlines()]
    assert [choice["choice"] for choice in choices] == [0, 1]
    for choice in choices:
        assert choice["request_id"] == "mine"
        assert choice["finish_reason"] == "length"
        assert choice["usage"]["completion_tokens"] == len(choice["token_ids"]) == 3
        assert [len(best) for best in choice["top_logprobs"]] == [2, 2, 2]
        assert [len(values) for values in choice["candidate_logprobs"]] == [1, 1, 1]
        # The only member is the mix.
        assert [values[0] for values in choice["member_logprobs"]] == pytest.approx(choice["logprobs"], abs=1e-4)


def test_a_job_with_a_failed_record_exits_with_1(command, bundle, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "a", "text": "x"}\n{"id": "b"}\n')
    options = ("summarise", source, out, "--bundle", bundle, "--max-summary-tokens", 2)
    code, told, _ = command(*options)
    assert (code, len(out.read_text().splitlines())) == (1, 2)
    assert "1 done, 0 skipped, 1 failed" in told
    source.write_text('{"id": "a", "text": "x"}\n')
    assert command(*options)[0] == 0
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a"]


@pytest.mark.parametrize("max_tokens", [12, 400])
def test_chat_leaves_out_the_oldest_turns(command, bundle, monkeypatch, max_tokens):
    """Each request has the system message, the line just typed, and as many turns before it as fit."""
    sent, answers, generate = [], [], Client.generate

    def spy(client, messages, **options):
        sent.append([dict(message) for message in messages])
        answers.append("")
        for delta in generate(client, messages, **options):
            answers[-1] += delta.text
            yield delta

    monkeypatch.setattr(Client, "generate", spy)
    context, lines = 400, [f"line {i} " + "x" * 30 for i in range(6)]
    typed = [*lines[:4], "y" * 500, *lines[4:]]  # the long line never fits
    with (
        Engine.from_bundle(bundle, EngineConfig(max_model_len=context, threads=1)) as engine,
        serve_engine(engine) as address,
    ):
        options = ("--address", address, "--system", "be kind", "--max-tokens", max_tokens, "--temperature", 0)
        code, _, error = command("chat", *options, stdin="\n".join(typed).encode())
        tokenizer = engine.tokenizer
    assert code == 0, error
    assert error.count("does not fit the context of 400 tokens") == 1
    assert error.count("were left out") >= 1
    assert [messages[-1]["content"] for messages in sent] == lines
    system, turns = {"role": "system", "content": "be kind"}, []
    for messages, line, answer in zip(sent, lines, answers, strict=True):
        turns.append({"role": "user", "content": line})
        for start in range(0, len(turns), 2):
            room = 1 if start == len(turns) - 1 else min(max_tokens, context // 2)
            if len(tokenizer.encode_chat([system, *turns[start:]])) + room <= context:
                break
        assert messages == [system, *turns[start:]]
        turns = [*turns[start:], {"role": "assistant", "content": answer}]


def test_recommended_sampling_is_used(command, bundle, tmp_path):
    """`do_sample: false` is greedy; what is typed comes first."""
    model = shutil.copytree(bundle, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 5, "top_k": 7}))
    manifest = json.loads((model / MANIFEST).read_text())
    manifest["files"]["generation_config.json"] = file_digest(model / "generation_config.json")
    (model / MANIFEST).write_text(json.dumps(manifest))
    common = ("generate", "x", "--bundle", model, "--json", "--ignore-eos")

    def tokens(*options):
        code, out, error = command(*common, *options)
        assert code == 0, error
        return json.loads(out)["token_ids"]

    greedy = tokens("--temperature", 0, "--max-tokens", 5)
    assert tokens("--defaults", "model") == greedy
    assert tokens("--defaults", "model", "--max-tokens", 3) == greedy[:3]


def test_what_generation_config_may_say(tmp_path):
    def read(**values):
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        return recommended_sampling(tmp_path)

    assert recommended_sampling(tmp_path) == {}
    assert read(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, eos_token_id=[1, 2], num_beams=1) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
    }
    assert read(do_sample=False, temperature=0.6, max_new_tokens=9) == {"temperature": 0.0, "max_tokens": 9}
    for name, value in (("num_beams", 4), ("no_repeat_ngram_size", 1), ("renormalize_logits", True), ("new", "x")):
        with pytest.raises(UnsupportedModelError, match=name):
            read(**{name: value})
    with pytest.raises(BundleError, match="top_p must be"):
        read(top_p=3)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        recommended_sampling(tmp_path)
