"""The process that decodes images: how it ends, what it sees, and that nobody waits for it. Small scripts stand for one that
an image has taken over."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

import pytest
from helpers.media import encoded, image_decoder, picture
from motet.runtime.encoders import decoding
from motet.runtime.errors import InvalidRequestError, UnavailableError

pytestmark = pytest.mark.slow
IMAGE = encoded(picture(30, 20))
TAKES = """
import json, os, signal, sys, time
def say(text):
    sys.stdout.write(text + chr(10))
    sys.stdout.flush()
open({starts!r}, "a").write("x")
sys.stdin.buffer.readline()
say('"ready"')
size = json.loads(sys.stdin.buffer.readline())["size"]
"""


@pytest.fixture
def taken_over(tmp_path, monkeypatch):
    """(a decoder whose process does this once it has an image, the file that has a letter for each process)."""
    decoders = []

    def make(does, takes=True):
        starts, script = tmp_path / "starts", tmp_path / "script"
        reads = "sys.stdin.buffer.read(size)\nsay('\"taken\"')\n" if takes else ""
        script.write_text(f"#!{sys.executable}\n{TAKES.format(starts=str(starts))}{reads}{does}\n")
        script.chmod(0o700)
        monkeypatch.setattr(decoding.sys, "executable", str(script))
        decoders.append(image_decoder(2**20))
        return decoders[-1], starts

    yield make
    for decoder in decoders:
        decoder.close()


ENDS = {
    **{one.name: f"os.kill(os.getpid(), signal.{one.name})" for one in map(signal.Signals, (4, 5, 6, 7, 8, 9, 11, 31))},
    "status 0": "sys.exit(0)",
    "status 3": "sys.exit(3)",
    "no JSON": "say('{')",
    "no object": "say('[1]')",
    "another word": "say(json.dumps({'refused': 'sometimes'}))",
    "no numbers": "say(json.dumps({'dims': ['x', 1], 'type': 'image/png'}))",
    "another kind": "say(json.dumps({'dims': [1, 1], 'type': 'exe'}))",
    "too many": "say(json.dumps({'dims': [10**9, 10**9], 'type': 'image/png'}))",
}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_ends_the_process_on_an_image_is_a_refusal(taken_over, end):
    """And it is not tried again, nor called a busy server: the same file would do it again."""
    decoder, starts = taken_over(ENDS[end])
    with pytest.raises(InvalidRequestError, match="an image cannot be used: it cannot be decoded"):
        decoder.look(IMAGE)
    assert starts.read_text() == "x"


def test_a_process_that_ends_before_it_has_the_image_is_the_server_s_fault(taken_over):
    decoder, starts = taken_over("sys.exit(3)", takes=False)
    with pytest.raises(UnavailableError, match="try again later"):
        decoder.look(IMAGE)
    assert starts.read_text() == "xx"


def test_its_last_words_go_to_the_log_and_not_to_the_client(taken_over, caplog):
    decoder, _ = taken_over(
        "sys.stderr.write('heap \\x1b[0m is broken' + chr(10) + 50 * ('more' + chr(10))); sys.exit(1)"
    )
    with pytest.raises(InvalidRequestError) as caught:
        decoder.look(IMAGE)
    assert "heap" not in str(caught.value)
    found = [one.getMessage() for one in caplog.records]
    assert sum("is broken" in message for message in found) == 1
    assert not any("\x1b" in message for message in found)
    assert sum("says" in message for message in found) == decoding._LOGGED_LINES


def test_closing_ends_a_process_that_somebody_waits_for(taken_over, tmp_path):
    """It is reaped, the one who waits is told, and no other process is started."""
    pipe = tmp_path / "pipe"
    decoder, starts = taken_over(
        f"open({str(tmp_path / 'busy')!r}, 'w'); os.mkfifo({str(pipe)!r}); open({str(pipe)!r})"
    )
    found = []

    def ask():
        with pytest.raises(UnavailableError, match="shutting down"):
            decoder.look(IMAGE)
        found.append(1)

    thread = threading.Thread(target=ask)
    thread.start()
    while not (tmp_path / "busy").exists():
        thread.join(0.01)
        assert thread.is_alive()
    process = decoder.process
    decoder.close()
    thread.join()
    assert found == [1]
    assert process.returncode == -signal.SIGKILL
    assert decoder.process is None
    decoder.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        decoder.look(IMAGE)
    assert starts.read_text() == "x"


def test_many_threads_and_closing_leave_no_process(monkeypatch):
    started, popen = [], decoding.subprocess.Popen
    monkeypatch.setattr(
        decoding.subprocess, "Popen", lambda *args, **named: started.append(popen(*args, **named)) or started[-1]
    )
    decoder, ends = image_decoder(2**20), []

    def ask():
        try:
            while True:
                assert len(decoder.decode(IMAGE).values) == 7
        except UnavailableError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    decoder.decode(IMAGE)
    for thread in threads:
        thread.start()
    decoder.close()
    for thread in threads:
        thread.join()
    assert len(ends) == 3
    assert all("shutting down" in end for end in ends)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * len(started)


def test_the_process_sees_neither_the_working_directory_nor_the_environment(tmp_path, monkeypatch):
    for name in ("PIL", "numpy", "motet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOTET_TEST_PASSWORD", "hunter2")
    decoder = image_decoder(2**20)
    try:
        assert len(decoder.decode(IMAGE).values) == 7
        environment = Path(f"/proc/{decoder.process.pid}/environ").read_bytes()
    finally:
        decoder.close()
    names = {entry.partition(b"=")[0].decode() for entry in environment.split(b"\0") if entry}
    assert names <= {*decoding._ENVIRONMENT, "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
