"""TLS of both doors: who is refused, and that a new certificate needs no restart."""

from __future__ import annotations

import shutil
import ssl
import urllib.error
import urllib.request

import pytest
from helpers.servers import serving
from motet.bench.lib.certificates import Authority
from motet.runtime import errors
from motet.runtime.client.client import AsyncClient, Client
from motet.runtime.client.connection import Connection
from motet.runtime.serve.metrics import engine_registry
from motet.runtime.serve.monitor import Monitor
from motet.runtime.trust.access import Access
from motet.runtime.trust.tls import TlsFiles

SHORT = {"max_tokens": 2, "ignore_eos": True, "temperature": 0.0}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def pair(authority):
    return authority.issue("server")


def files(pair, client_ca=None):
    return TlsFiles(pair.certificate, pair.key, client_ca)


def works(connection):
    with Client(connection) as client:
        return len(client.complete("x", timeout_s=20, **SHORT)[0].token_ids) == 2


def is_refused(connection):
    with Client(connection) as client, pytest.raises(errors.UnavailableError):
        client.complete("x", timeout_s=20, **SHORT)
    return True


def test_who_may_connect(engine, authority, pair, tmp_path):
    with serving(engine, tls=files(pair)) as running:
        assert works(Connection(running.address, ca=authority.path))
        assert is_refused(running.address)  # plaintext
        assert is_refused(Connection(running.address, tls=True))  # the system knows no such authority
        assert is_refused(Connection(running.address, ca=Authority(tmp_path, "other").path))


def test_an_expired_certificate(engine, authority):
    with serving(engine, tls=files(authority.issue("old", days=-1))) as running:
        assert is_refused(Connection(running.address, ca=authority.path))


def test_clients_with_certificates(engine, authority, pair, tmp_path):
    other = Authority(tmp_path, "other")
    ann, eve, old = authority.issue("ann"), other.issue("eve"), authority.issue("ann-old", days=-1)
    with serving(engine, tls=files(pair, authority.path)) as running:

        def connection(client=None):
            more = {} if client is None else {"certificate": client.certificate, "certificate_key": client.key}
            return Connection(running.address, ca=authority.path, **more)

        assert works(connection(ann))
        assert is_refused(connection())
        assert is_refused(connection(eve))
        assert is_refused(connection(old))


def test_a_new_certificate_is_used(engine, tmp_path, caplog):
    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    old, new = first.issue("server"), second.issue("server-new")
    with serving(engine, tls=files(old)) as running:
        assert works(Connection(running.address, ca=first.path))
        old.key.write_bytes(new.key.read_bytes())  # half of it: what does not fit is not used
        assert works(Connection(running.address, ca=first.path))
        assert "the changed files are not used" in caplog.text
        shutil.copy(new.certificate, old.certificate)
        assert works(Connection(running.address, ca=second.path))
        assert is_refused(Connection(running.address, ca=first.path))


def test_the_monitor_has_it_too(engine, authority, pair):
    with serving(engine, tls=files(pair)) as running:
        monitor = Monitor(running.service, engine_registry(engine), Access.open_to_all(), tls=files(pair))
        try:
            url = f"https://127.0.0.1:{monitor.port}/livez"
            context = ssl.create_default_context(cafile=authority.path)
            assert urllib.request.urlopen(url, context=context, timeout=20).status == 200
            with pytest.raises(urllib.error.URLError):
                urllib.request.urlopen(url, timeout=20)  # an authority that is not known
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                urllib.request.urlopen(url.replace("https", "http"), timeout=20)
            assert urllib.request.urlopen(url, context=context, timeout=20).status == 200
        finally:
            monitor.close()


@pytest.mark.parametrize("what", ["missing", "no PEM", "another key"])
def test_files_that_do_not_fit(authority, pair, tmp_path, what):
    key, error = pair.key, errors.ConfigError
    if what == "missing":
        key, error = tmp_path / "nothing.key", errors.NotFoundError
    elif what == "no PEM":
        key = tmp_path / "key"
        key.write_text("no PEM")
    else:
        key = authority.issue("another").key
    with pytest.raises(error):
        TlsFiles(pair.certificate, key)


def test_a_key_stays_on_this_machine_or_is_encrypted(authority):
    Connection("127.0.0.1:1", key="motet-x")
    Connection("localhost:1", key="motet-x")
    Connection("example.org:1", key="motet-x", ca=authority.path)
    with pytest.raises(errors.ConfigError, match=r"must not travel to example\.org:1 unencrypted"):
        Connection("example.org:1", key="motet-x")
    with pytest.raises(errors.ConfigError, match="belong together"):
        Connection("127.0.0.1:1", certificate=authority.path)
    with pytest.raises(errors.ConfigError, match="printable ASCII"):
        Connection("127.0.0.1:1", key="a\nb")
    with pytest.raises(errors.ConfigError, match="unencrypted"):
        Connection("unix-box.example.org:1", key="motet-x")
    Connection("unix:/run/motet.sock", key="motet-x")
    assert "motet-x" not in repr(Connection("127.0.0.1:1", key="motet-x"))
    with pytest.raises(errors.NotFoundError, match="cannot be read"):
        Client(Connection("127.0.0.1:1", ca=authority.path.with_name("nothing")))


def test_asynchronous_clients(engine, authority, pair):
    import asyncio

    async def run(address):
        async with AsyncClient(Connection(address, ca=authority.path)) as client:
            return await client.complete("x", **SHORT)

    with serving(engine, tls=files(pair)) as running:
        assert len(asyncio.run(run(running.address))[0].token_ids) == 2
