"""Signatures of bundles: what the package's own command verifies, and everything that is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from motet.bench.lib.certificates import Authority
from motet.cli import app
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import BundleError, ConfigError, InvalidEnsembleError, NotFoundError
from motet.runtime.model import signature
from motet.runtime.serve.settings import Settings
from typer.testing import CliRunner

pytest.importorskip("model_signing")
pytestmark = pytest.mark.slow  # the package imports a lot


def write_keys(folder, name, key, password=None):
    """PEM files (private, public)."""
    pem, private, public = serialization.Encoding.PEM, folder / f"{name}.key", folder / f"{name}.pub"
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("keys"), "mine", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def unsigned(tiny_model_dir, tmp_path_factory):
    return export_bundle(tiny_model_dir("llama"), tmp_path_factory.mktemp("bundle") / "b", graphs=False)


@pytest.fixture
def bundle(unsigned, keys, tmp_path):
    """A signed copy."""
    path = shutil.copytree(unsigned, tmp_path / "b")
    assert signature.sign(path, keys[0]) == path / "model.sig"
    return path


def own_command(*arguments):
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True)


def test_what_is_signed_is_opened_and_the_packages_own_command_verifies_it(bundle, keys):
    with Engine.from_bundle(bundle, EngineConfig(threads=1, verify_key=keys[1])) as engine:
        assert engine.model.name == "b"
    file = bundle / "model.sig"
    done = own_command("verify", "key", bundle, "--signature", file, "--public_key", keys[1])
    assert done.returncode == 0, done.stderr
    (bundle / "tokenizer.json").write_text("{}")
    assert own_command("verify", "key", bundle, "--signature", file, "--public_key", keys[1]).returncode == 1


def test_what_the_packages_own_command_signs_is_opened(bundle, keys):
    file = bundle / "model.sig"
    file.unlink()
    done = own_command("sign", "key", bundle, "--signature", file, "--private_key", keys[0])
    assert done.returncode == 0, done.stderr
    signature.verify(bundle, keys[1])
    # that command leaves these names out of a signature; here nothing is left out
    (bundle / ".gitignore").write_text("*")
    with pytest.raises(BundleError, match=r"not signed: \['.gitignore'\]"):
        signature.verify(bundle, keys[1])


def flip(bundle, name="model.safetensors"):
    content = bytearray((bundle / name).read_bytes())
    content[-1] ^= 1
    (bundle / name).write_bytes(content)


def change_manifest(bundle):
    manifest = json.loads((bundle / "motet.json").read_text())
    (bundle / "motet.json").write_text(json.dumps(manifest | {"name": "another"}))


def edit(change):
    def edited(bundle):
        values = json.loads((bundle / "model.sig").read_text())
        change(values)
        (bundle / "model.sig").write_text(json.dumps(values))

    return edited


def hide_in_folder(bundle):
    (bundle / "extra").mkdir()
    (bundle / "extra" / "x").write_text("x")


WRONG = {
    "a flipped bit": (flip, "Hash mismatch for 'model.safetensors'"),
    "a changed manifest": (change_manifest, "Hash mismatch for 'motet.json'"),
    "an added file": (lambda bundle: (bundle / "new.txt").write_text("x"), "Extra files found"),
    "a file in a folder": (hide_in_folder, "Extra files found"),
    "a file that git would ignore": (lambda bundle: (bundle / ".gitignore").write_text("x"), "not signed"),
    "a removed file": (lambda bundle: (bundle / "tokenizer.json").unlink(), "Missing files"),
    "a link": (lambda bundle: (bundle / "l").symlink_to("tokenizer.json"), "symbolic link|symlink"),
    "no signature": (lambda bundle: (bundle / "model.sig").unlink(), "is not signed"),
    "a signature that is a link": (
        lambda bundle: (
            os.rename(bundle / "model.sig", bundle.parent / "s"),
            (bundle / "model.sig").symlink_to("../s"),
        ),
        "is a link",
    ),
    "no JSON": (lambda bundle: (bundle / "model.sig").write_text("{"), "does not hold"),
    "a list": (lambda bundle: (bundle / "model.sig").write_text("[]"), "does not hold"),
    "bytes": (lambda bundle: (bundle / "model.sig").write_bytes(b"\xff" * 9), "does not hold"),
    "depth": (lambda bundle: (bundle / "model.sig").write_text("[" * 100_000), "does not hold"),
    "size": (lambda bundle: (bundle / "model.sig").write_bytes(b" " * (1 << 23)), "at most 4194304 bytes"),
    "no envelope": (edit(lambda values: values.pop("dsseEnvelope")), "does not hold"),
    "no signatures": (edit(lambda values: values["dsseEnvelope"].update(signatures=[])), "does not hold"),
    "another signature": (
        edit(lambda values: values["dsseEnvelope"]["signatures"][0].update(sig="MEUCIQ==")),
        "not of the trusted key",
    ),
    "another payload": (edit(lambda values: values["dsseEnvelope"].update(payload="e30=")), "not of the trusted key"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused(bundle, keys, wrong):
    damage, message = WRONG[wrong]
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        Engine.from_bundle(bundle, EngineConfig(threads=1, verify_key=keys[1]))


def test_a_signature_of_another_bundle_or_of_another_key(bundle, unsigned, keys, tmp_path):
    other = write_keys(tmp_path, "other", ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(BundleError, match="does not hold: Key mismatch"):
        signature.verify(bundle, other[1])
    # it says that it is of the trusted key
    mine = json.loads((bundle / "model.sig").read_text())
    signature.sign(bundle, other[0])
    signature.verify(bundle, other[1])
    theirs = json.loads((bundle / "model.sig").read_text())
    (bundle / "model.sig").write_text(json.dumps(mine | {"dsseEnvelope": theirs["dsseEnvelope"]}))
    with pytest.raises(BundleError, match="not of the trusted key"):
        signature.verify(bundle, keys[1])
    another = shutil.copytree(unsigned, tmp_path / "another")
    change_manifest(another)
    signature.sign(another, keys[0])
    shutil.copy(another / "model.sig", bundle / "model.sig")
    with pytest.raises(BundleError, match=r"Hash mismatch for 'motet.json'"):
        signature.verify(bundle, keys[1])


def test_a_signature_that_leaves_files_out(bundle, keys):
    """Who signs with the package's command may have files ignored; nothing says that they are what they were."""
    done = own_command(
        "sign", "key", bundle, "--signature", bundle / "model.sig", "--private_key", keys[0],
        "--ignore-paths", bundle / "tokenizer.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.raises(BundleError, match=r"not signed: \['tokenizer.json'\]"):
        signature.verify(bundle, keys[1])


def test_certificates(bundle, tmp_path):
    root, stranger = Authority(tmp_path, "root"), Authority(tmp_path, "stranger")
    signer = root.issue("signer", for_signing=True)
    signature.sign(bundle, signer.key, signer.certificate, [root.path])
    signature.verify(bundle, authorities=root.path)
    done = own_command(
        "verify", "certificate", bundle, "--signature", bundle / "model.sig", "--certificate_chain", root.path
    )
    assert done.returncode == 0, done.stderr
    with Engine.from_bundle(bundle, EngineConfig(threads=1, verify_ca=root.path)) as engine:
        assert engine.model.name == "b"
    with pytest.raises(BundleError, match="does not hold"):
        signature.verify(bundle, authorities=stranger.path)
    server = root.issue("server")  # a certificate of the same authority, for something else
    signature.sign(bundle, server.key, server.certificate, [root.path])
    with pytest.raises(BundleError, match="cannot be used for signing"):
        signature.verify(bundle, authorities=root.path)
    with pytest.raises(ConfigError, match="does not match"):
        signature.sign(bundle, signer.key, server.certificate)
    with pytest.raises(ConfigError, match="chain is of the authorities"):
        signature.sign(bundle, signer.key, chain=[root.path])


def test_keys_that_cannot_be_used(bundle, keys, tmp_path):
    odd = write_keys(tmp_path, "odd", ed25519.Ed25519PrivateKey.generate())
    locked = write_keys(tmp_path, "locked", ec.generate_private_key(ec.SECP256R1()), b"secret")
    nothing = tmp_path / "nothing"
    nothing.write_text("nothing")
    for private in (odd[0], locked[0], nothing, keys[1]):
        with pytest.raises(ConfigError, match="cannot sign"):
            signature.sign(bundle, private)
    for public in (odd[1], nothing, keys[0]):
        with pytest.raises(ConfigError, match="cannot verify"):
            signature.verify(bundle, public)
    with pytest.raises(ConfigError, match="certificates in PEM"):
        signature.verify(bundle, authorities=nothing)
    for call in (signature.sign, signature.verify):
        with pytest.raises(NotFoundError, match="no file 'missing'"):
            call(bundle, Path("missing"))
        with pytest.raises(NotFoundError, match="no bundle"):
            call(tmp_path / "none", keys[0] if call is signature.sign else keys[1])
    for both in ({}, {"key": keys[1], "authorities": keys[1]}):
        with pytest.raises(ConfigError, match="one of the two"):
            signature.verify(bundle, **both)


def test_damage_is_seen_before_it_is_signed(bundle, keys):
    before = (bundle / "model.sig").read_bytes()
    flip(bundle)
    with pytest.raises(BundleError, match="damaged"):
        signature.sign(bundle, keys[0])
    assert (bundle / "model.sig").read_bytes() == before
    assert not list(bundle.glob(".*"))


def test_a_cluster_refuses_before_it_starts_anything(bundle, keys):
    pytest.importorskip("ray")
    from motet.runtime.cluster.engine import ClusterEngine
    from motet.runtime.cluster.settings import ClusterSettings

    flip(bundle)
    with pytest.raises(BundleError, match="Hash mismatch"):
        ClusterEngine(bundle, EngineConfig(verify_key=keys[1]), ClusterSettings("local"))


def test_the_command_line(unsigned, keys, tmp_path):
    def motet(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return done.stdout.strip() if done.exit_code == 0 else done.exception

    bundle = shutil.copytree(unsigned, tmp_path / "b")
    refused = motet("serve", bundle, "--verify-key", keys[1], "--port", 0)
    assert isinstance(refused, BundleError) and "is not signed" in str(refused)
    assert motet("sign", bundle, "--private-key", keys[0]) == str(bundle / "model.sig")
    signature.verify(bundle, keys[1])
    (tmp_path / "motet.toml").write_text(f"[engine]\nverify_key = '{keys[1]}'\n")
    assert Settings.load(tmp_path / "motet.toml").engine.verify_key == keys[1]
    assert Settings.load(None, {"MOTET_SERVE_VERIFY_CA": "/ca"}).engine.verify_ca == Path("/ca")


# Every command that reads a bundle, with what it needs beside the bundle.
COMMANDS = {
    "generate": ("generate", "x", "--bundle", "BUNDLE", "--max-tokens", 2),
    "generate with the bundle's defaults": (
        "generate",
        "x",
        "--bundle",
        "BUNDLE",
        "--defaults",
        "model",
        "--max-tokens",
        2,
    ),
    "chat": ("chat", "--bundle", "BUNDLE", "--max-tokens", 2),
    "summarise": ("summarise", "IN", "OUT", "--bundle", "BUNDLE", "--max-summary-tokens", 2),
    "batch run": ("batch", "run", "IN", "OUT", "--bundle", "BUNDLE", "--defaults", '{"max_summary_tokens": 2}'),
    "inspect": ("inspect", "BUNDLE"),
    "export-onnx": ("export-onnx", "BUNDLE", "OUT"),
    "explain": ("explain", "BUNDLE", "--data", "nowhere.jsonl", "--out", "OUT"),
    "calibrate": ("calibrate", "BUNDLE", "--data", "nowhere.jsonl"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_reads_a_bundle_asks_for_the_signature(bundle, keys, tmp_path, name):
    """The same call is refused over a changed bundle, and works over a signed one."""
    (tmp_path / "in.jsonl").write_text('{"id": "1", "text": "hello"}\n')
    places = {"BUNDLE": bundle, "IN": tmp_path / "in.jsonl", "OUT": tmp_path / "out"}
    call = [str(places.get(word, word)) for word in COMMANDS[name]]
    signed = [*call, "--verify-key", str(keys[1])]
    good = CliRunner().invoke(app, signed, input="hello\n\n")
    if name in ("calibrate", "explain"):  # of what comes next something is wrong
        assert isinstance(good.exception, NotFoundError | InvalidEnsembleError)
        assert "nowhere.jsonl" in str(good.exception) or "nothing to explain" in str(good.exception)
    else:
        assert good.exit_code == 0, good.exception
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "out").unlink(missing_ok=True)
    (bundle / "more.txt").write_text("not signed")
    refused = CliRunner().invoke(app, signed, input="hello\n\n")
    assert isinstance(refused.exception, BundleError)
    assert "not signed" in str(refused.exception) or "more.txt" in str(refused.exception)
    both = CliRunner().invoke(app, [*signed, "--verify-ca", str(keys[1])])
    assert isinstance(both.exception, ConfigError)
    assert "two ways to verify" in str(both.exception)


def test_no_command_that_reads_a_bundle_is_without_it():
    """Found by their parameters; benches measure what their user made. A command that is new here belongs into `COMMANDS`."""

    def commands(command, *names):
        for name, below in getattr(command, "commands", {}).items():
            yield from commands(below, *names, name)
        if names and not hasattr(command, "commands"):
            yield " ".join(names), {parameter.name for parameter in command.params}

    found = dict(commands(typer.main.get_command(app)))
    readers = {name for name, params in found.items() if "bundle" in params and not name.startswith("bench ")}
    asking = {name for name, params in found.items() if "verify_key" in params}
    assert readers - {"sign"} <= asking
    assert asking - {"serve"} == {name.partition(" with ")[0] for name in COMMANDS}


def test_bundles_alone_have_signatures(tiny_model_dir, keys):
    for call, said in (
        (("inspect", tiny_model_dir("llama")), "is no bundle"),
        (("generate", "x", "--address", "127.0.0.1:1"), "give --bundle too"),
        (("chat",), "give --bundle too"),
    ):
        refused = CliRunner().invoke(app, [*map(str, call), "--verify-key", str(keys[1])])
        assert isinstance(refused.exception, ConfigError)
        assert said in str(refused.exception)


def test_the_settings(keys):
    with pytest.raises(ConfigError, match="two ways to verify"):
        EngineConfig(verify_key=keys[1], verify_ca=keys[1])
    with pytest.raises(ConfigError, match="verify_key must be a path"):
        EngineConfig(verify_key="x")
