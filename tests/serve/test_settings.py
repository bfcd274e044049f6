"""Settings: a file, the environment and the command line, in that order; what contradicts itself is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from motet.runtime import errors
from motet.runtime.serve.settings import ServerSettings, Settings, is_loopback

TLS = {"tls_cert": Path("c"), "tls_key": Path("k")}


def write(tmp_path, text):
    path = tmp_path / "motet.toml"
    path.write_text(text)
    return path


def test_the_later_comes_before_the_earlier(tmp_path):
    file = write(
        tmp_path,
        "[server]\nport = 1\nlame_duck = 1\nreflection = true\nkeys = '/k'\n[engine]\nmax_num_seqs = 3\nthreads = 1\n"
        "[tenants.acme]\nweight = 2\n",
    )
    environment = {
        "MOTET_SERVE_LAME_DUCK": "2.5",
        "MOTET_SERVE_THREADS": "2",
        "MOTET_SERVE_REFLECTION": "false",
        "HOME": "/",
    }
    settings = Settings.load(file, environment, server={"port": 3}, engine={"threads": 3})
    assert (settings.server.port, settings.server.lame_duck, settings.server.reflection) == (3, 2.5, False)
    assert settings.server.keys == Path("/k")
    assert (settings.engine.max_num_seqs, settings.engine.threads) == (3, 3)
    assert settings.tenants["acme"].weight == 2
    assert Settings.load() == Settings()


def test_what_is_printed_can_be_read(tmp_path):
    settings = Settings.load(
        None,
        {},
        server={"host": "0.0.0.0", "keys": Path('/a "b'), **TLS, "log_format": "json"},
        engine={"max_model_len": 99},
    )
    assert Settings.load(write(tmp_path, settings.to_toml())) == settings
    file = write(tmp_path, "[tenants.default]\nmax_requests = 4\n")
    assert Settings.load(write(tmp_path, Settings.load(file).to_toml())).tenants["default"].max_requests == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sever]\n", r"unknown tables \['sever'\]"),
        ("[server]\nprot = 1\n", r"unknown ServerSettings key\(s\) \['prot'\]"),
        ("[engine]\nseqs = 1\n", "unknown EngineConfig key"),
        ("[server]\nport = 'x'\n", "port must be an integer, got 'x'"),
        ("[server]\nport = true\n", "port must be an integer, got True"),
        ("[server]\nport = 1.5\n", "port must be an integer, got 1.5"),
        ("[server]\nport = 70000\n", "port must be an integer in 0…65535"),
        ("[server]\nreflection = 1\n", "reflection must be true or false, got 1"),
        ("[server]\nhost = 3\n", "host must be text, got 3"),
        ("[server]\nlame_duck = -1\n", "lame_duck must be a number of seconds"),
        ("[server]\nlog_format = 'xml'\n", "log_format must be one of"),
        ("[server]\n[server]\n", "cannot be read"),
        ("[tenants]\nacme = 3\n", "must be a table"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(errors.ConfigError, match=message):
        Settings.load(write(tmp_path, text))


def test_the_environment_is_used_or_refused():
    with pytest.raises(errors.ConfigError, match="MOTET_SERVE_PROT"):
        Settings.load(None, {"MOTET_SERVE_PROT": "1"})
    with pytest.raises(errors.ConfigError, match="MOTET_SERVE_PORT must be an integer, got 'x'"):
        Settings.load(None, {"MOTET_SERVE_PORT": "x"})
    with pytest.raises(errors.NotFoundError, match="no file"):
        Settings.load(Path("nothing.toml"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "0.0.0.0"}, r"needs TLS \(tls_cert, tls_key\) and authentication"),
        ({"host": "::"}, "reached from other machines"),
        ({"host": "example.org", "keys": Path("k")}, r"needs TLS \(tls_cert, tls_key\), or insecure"),
        ({"host": "10.0.0.1", **TLS}, r"needs authentication \(keys, or jwks\), or insecure"),
        ({"insecure": True}, "leave it out"),
        ({"tls_cert": Path("c")}, "belong together"),
        ({"tls_client_ca": Path("c")}, "needs TLS"),
        ({"jwks": Path("j")}, "belong together"),
        ({"keys": Path("k"), "allow_drain": True}, "leave allow_drain out"),
        ({"audit_content": True}, "give audit too"),
        ({"send_timeout": 0}, "send_timeout must be above 0"),
        ({"stream_interval": 0}, "stream_interval must be an integer of at least 1"),
    ],
)
def test_contradictions(fields, message):
    with pytest.raises(errors.ConfigError, match=message):
        ServerSettings(**fields)


def test_what_may_listen_on_the_network():
    ServerSettings(host="0.0.0.0", keys=Path("k"), **TLS)
    ServerSettings(host="0.0.0.0", insecure=True)
    assert [
        is_loopback(host) for host in ("127.9.9.9", "::1", "[::1]", "localhost", "0.0.0.0", "", "127.0.0.1.evil.org")
    ] == [
        True,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
