"""Bearer keys: what the file holds, who is let in, and how a running server follows changes."""

from __future__ import annotations

import json
import stat

import pytest
from motet.runtime import errors
from motet.runtime.trust import keys as module
from motet.runtime.trust.identity import Identity, Role, anonymous
from motet.runtime.trust.keys import KeyFile, add_key, read_keys, revoke_key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def test_the_file_holds_no_key(path):
    key = add_key(path, "acme", [Role.INFER])
    assert key.split("-", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyFile(path).identify(key) == Identity("acme", f"key:{read_keys(path)[0].id}", frozenset({Role.INFER}))


@pytest.mark.parametrize(
    "change",
    [
        lambda k: "",
        lambda k: k[:-1],
        lambda k: k + "x",
        lambda k: k.swapcase(),
        lambda k: "motet-000000000000" + k[18:],
    ],
    ids=["nothing", "shorter", "longer", "another", "unknown id"],
)
def test_every_wrong_key_gets_the_same_answer(path, change):
    key = add_key(path, "acme", [Role.INFER])
    with pytest.raises(errors.UnauthenticatedError, match="the key is not valid"):
        KeyFile(path).identify(change(key))


def test_keys_end(path, monkeypatch):
    short, other = add_key(path, "acme", [Role.INFER], lifetime_s=60), add_key(path, "acme", [Role.ADMIN])
    file = KeyFile(path)
    assert file.identify(short).tenant == file.identify(other).tenant == "acme"  # two keys of a tenant, for rotation
    revoke_key(path, read_keys(path)[1].id)
    with pytest.raises(errors.UnauthenticatedError):
        file.identify(other)
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 61)
    with pytest.raises(errors.UnauthenticatedError):
        file.identify(short)


def test_a_damaged_change_is_not_used(path, caplog):
    """A server goes on with the keys that it has."""
    key = add_key(path, "acme", [Role.INFER])
    file = KeyFile(path)
    path.write_text("{")
    assert file.identify(key).tenant == "acme"
    assert "the changed files are not used" in caplog.text
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        KeyFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a list 'keys'"),
        ('{"keys": [{}]}', "damaged"),
        ('{"keys": [{"roles": ["root"]}]}', "damaged"),
    ],
)
def test_a_damaged_file_is_refused(path, content, message):
    path.write_text(content)
    with pytest.raises(errors.ConfigError, match=message):
        KeyFile(path)


def test_a_key_needs_a_digest(path):
    add_key(path, "acme", [Role.INFER])
    values = json.loads(path.read_text())
    values["keys"][0]["sha256"] = "0"
    path.write_text(json.dumps(values))
    with pytest.raises(errors.ConfigError, match="no SHA-256"):
        read_keys(path)


@pytest.mark.parametrize("tenant", ["", "a/b", "../x", "é", "x" * 65, "-x"])
def test_names_of_tenants(path, tenant):
    with pytest.raises(errors.ConfigError, match="a tenant's name"):
        add_key(path, tenant, [Role.INFER])


def test_there_is_no_such_key(path):
    with pytest.raises(errors.NotFoundError, match="motet keys add"):
        revoke_key(path, "abc")
    add_key(path, "acme", [Role.INFER])
    with pytest.raises(errors.NotFoundError, match="no key 'abc'"):
        revoke_key(path, "abc")


def test_roles():
    with pytest.raises(
        errors.PermissionDeniedError, match="the role admin, and this caller's roles are: batch, infer, monitor"
    ):
        anonymous().require([Role.ADMIN])
    anonymous(may_drain=True).require([Role.ADMIN])
    with pytest.raises(errors.PermissionDeniedError, match="roles are: none"):
        Identity("a", "b", frozenset()).require(Role)
    assert Identity("a", "b", frozenset({Role.BATCH})).is_background
    assert not anonymous().is_background
