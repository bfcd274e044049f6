"""Directories that are written as a whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import sys

import pytest
from motet.runtime.errors import ConfigError, DataError, UnavailableError
from motet.runtime.model import files

OLD, NEW = "old content", "new content"
EVENTS = ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "open")  # what writing and moving raises


def write(path, content):
    with files.new_directory(path, "marker", "a thing") as work:
        (work / "part").mkdir()
        for name in ("marker", "data", "part/data"):
            (work / name).write_text(content)


def content(path):
    """What all of the directory's files hold; None if it is not there. Two contents, or a file that is lost, fail."""
    if not path.exists():
        return None
    found = {name: (path / name).read_text() for name in ("marker", "data", "part/data")}
    assert len(set(found.values())) == 1, found
    return found["data"]


def killed_at(step, action):
    """Run `action` in a process that ends without any clean-up at the `step`-th operation on files; False: it ended before."""
    child = os.fork()
    if not child:
        left = [step]

        def count(event, _arguments):
            if event in EVENTS:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_leaves_the_old_or_the_new(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda _a, _b: False)
    seen = set()
    for step in range(200):
        out = tmp_path / f"{step}" / "out"
        write(out, OLD)
        if not killed_at(step, lambda: write(out, NEW)):  # noqa: B023
            break
        found = content(out)
        if not exchanges and found is None:  # between two renames: the old one lies beside it
            found = content(next(out.parent.glob(".out-old-*")))
            assert found == OLD
        seen.add(found)
        write(out, "third content")  # what a kill left does not hinder the next writer
        assert content(out) == "third content"
    assert seen == {OLD, NEW}
    assert step > 10
    assert content(out) == NEW
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_kill_leaves_no_half_of_a_removed_directory(tmp_path):
    for step in range(100):
        out = tmp_path / f"{step}" / "out"
        write(out, OLD)
        if not killed_at(step, lambda: files.remove_directory(out)):  # noqa: B023
            break
        assert content(out) in (OLD, None)
    assert step > 2
    assert not list(out.parent.iterdir())


def test_a_failure_leaves_the_old(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, OLD)
    with pytest.raises(TypeError, match="NoneType"):
        write(out, None)
    assert content(out) == OLD
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda _a, _b: False)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="the disk is gone"):
        write(out, NEW)
    assert content(out) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_of_many_writers_at_once(tmp_path):
    """Processes that begin together: one enters, the others say so; what is there in the end is that one's, whole."""
    context = multiprocessing.get_context("fork")
    out, count = tmp_path / "out", 6
    write(out, OLD)
    begin, said, finish = context.Barrier(count), context.Queue(), context.Event()

    def writer(name):
        begin.wait(60)
        try:
            with files.new_directory(out, "marker", "a thing") as work:
                said.put((name, None))
                finish.wait(60)
                (work / "part").mkdir()
                for file in ("marker", "data", "part/data"):
                    (work / file).write_text(name)
        except UnavailableError as error:
            said.put((name, str(error)))

    processes = [context.Process(target=writer, args=(f"writer {index}",)) for index in range(count)]
    for process in processes:
        process.start()
    answers = dict(said.get(timeout=60) for _ in processes)
    entered = [name for name, error in answers.items() if error is None]
    assert len(entered) == 1
    refused = f"another process is writing '{out}'; wait until it has ended, or choose another directory"
    assert [error for error in answers.values() if error] == [refused] * (count - 1)
    assert content(out) == OLD
    finish.set()
    for process in processes:
        process.join(60)
    assert content(out) == entered[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write(out, NEW)
    assert content(out) == NEW


def test_the_directory_of_a_writer_that_was_killed_is_removed(tmp_path):
    """It hinders nobody. Nor does another directory's writer, whose name begins alike."""
    (tmp_path / ".out-new-0123abcd").mkdir()
    with files.new_directory(tmp_path / "out-new-x", "marker", "a thing") as work:
        write(tmp_path / "out", NEW)
        write(tmp_path / "o[u]t", OLD)
        (work / "marker").touch()
    assert content(tmp_path / "out") == NEW and content(tmp_path / "o[u]t") == OLD
    assert not (tmp_path / ".out-new-0123abcd").exists()


def test_a_parent_that_another_program_keeps_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE_S", 0.05)
    parent = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(parent, fcntl.LOCK_EX)
    with pytest.raises(UnavailableError, match=f"another program keeps '{tmp_path}' locked"):
        write(tmp_path / "out", NEW)
    os.close(parent)
    write(tmp_path / "out", NEW)


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    writing = files.new_directory(out, "marker", "a thing")
    writing.__enter__()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigError, match="exists and is not a thing"):
        writing.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "mine").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(_descriptor, _operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / ".out-new-0123abcd").mkdir()  # perhaps somebody writes there
    write(tmp_path / "out", OLD)
    write(tmp_path / "out", NEW)
    assert content(tmp_path / "out") == NEW and (tmp_path / ".out-new-0123abcd").exists()


def test_a_journal(tmp_path):
    path = tmp_path / "journal"
    assert files.read_lines(path) == []
    for text in ("one", "two"):
        files.append_line(path, text)
    with path.open("a") as file:
        file.write("a kill cut th")
    assert files.read_lines(path) == [b"one", b"two"]
    files.append_line(path, "three")
    assert files.read_lines(path) == [b"one", b"two", b"three"]


def test_something_else_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="exists and is not a thing; choose another"):
        write(tmp_path / "out", NEW)
    assert (tmp_path / "out" / "mine").exists()
    write(tmp_path / "other", NEW)
    assert (tmp_path / "other").stat().st_mode & 0o077 == 0o077 & ~current_umask()  # as any new directory


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("content", ["", "[1]", "{", "null", "[" * 200_000])
def test_files_that_hold_no_json_object(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json' (is not JSON|must hold a JSON object).*; fetch it again"):
        files.read_object(tmp_path / "x.json", "fetch it again", DataError)
