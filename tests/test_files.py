"""Writing at once or not at all, and locks."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edit_compile import files
from edit_compile.distillation.output.run_folder import RunFolder
from edit_compile.files import claimed, prompt_lines, read_small, replacing, write_text

LOAD = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path = Path(sys.argv[2])
"""
WRITES = """
for number in range(100):
    files.write_text(path, "ab"[number % 2] * 5000)
    assert path.read_text() in ("a" * 5000, "b" * 5000)
"""
COUNTS = """
for number in range(50):
    with files.claimed(path.with_name("lock"), wait=True) as mine:
        assert mine
        files.write_text(path, str(int(path.read_text()) + 1))
"""
DIES = """
with files.claimed(path):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_an_error_nothing_has_changed(tmp_path):
    path = tmp_path / "kept.txt"
    write_text(path, "before")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_what_is_written_replaces_what_was_there(tmp_path):
    path = tmp_path / "kept.txt"
    write_text(path, "before")
    write_text(path, "after")
    assert path.read_text() == "after"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_what_killed_processes_left_is_cleared_away(tmp_path):
    old, new = (tmp_path / f".a[1].txt.{name}.tmp" for name in ("0123abcd", "89efcdab"))
    for path in (old, new, tmp_path / ".other.txt.0123abcd.tmp"):
        path.touch()
        os.utime(path, (0, 0 if path != new else path.stat().st_mtime))
    write_text(tmp_path / "a[1].txt", "")
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].txt", new.name, ".other.txt.0123abcd.tmp"}


def begun(program, path):
    return subprocess.Popen([sys.executable, "-c", LOAD + program, files.__file__, str(path)], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("program", "before", "after"), [(WRITES, "", "b" * 5000), (COUNTS, "0", "100")], ids=["writing", "by turns"])
def test_two_processes_at_one_file(tmp_path, program, before, after):
    (path := tmp_path / "shared").write_text(before)
    processes = [begun(program, path) for _ in range(2)]
    assert [process.communicate(timeout=60)[1] for process in processes] == ["", ""]
    assert path.read_text() == after
    assert [file.name for file in tmp_path.iterdir()] == ["shared"]


def free(path):
    with claimed(path) as mine:
        return mine


def test_a_lock_is_held_by_one_and_leaves_nothing_behind(tmp_path):
    with claimed(tmp_path / "a" / "b" / "lock") as mine:
        assert mine
        assert not free(tmp_path / "a" / "b" / "lock")
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "a" / "lock"):
        (tmp_path / "a" / "result").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "result"]


def test_a_lock_ends_with_its_process(tmp_path):
    process = begun(DIES, tmp_path / "lock")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "lock").read_text() == socket.gethostname()
    assert free(tmp_path / "lock")


@pytest.mark.parametrize("locks", ["within a machine", "none", "not on this system"])
def test_another_machine_holds_a_lock_while_it_shows_signs_of_life(tmp_path, monkeypatch, locks):
    """The locks of a network file system may not be seen by other machines, or there are none."""

    def none(*args):
        raise OSError(errno.ENOLCK, "no locks")

    if locks == "none":
        monkeypatch.setattr(files.fcntl, "flock", none)
    if locks == "not on this system":
        monkeypatch.setattr(files, "fcntl", None)
    (path := tmp_path / "lock").write_text("another machine")
    assert not free(path)
    os.utime(path, (0, path.stat().st_mtime - 2 * files._STALE))
    assert free(path)
    with claimed(path) as mine:
        assert mine
        assert not free(path)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_none_is_an_error_or_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(OSError, match="No such file"):
        free(tmp_path / "link")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    os.utime(tmp_path / "bytes", (0, 0))
    assert free(tmp_path / "bytes")


def test_small_files_are_read_and_others_refused(tmp_path, monkeypatch):
    (tmp_path / "small").write_bytes(b"1234")
    monkeypatch.setattr(files, "_SMALL", 4)
    assert read_small(tmp_path / "small") == b"1234"
    (tmp_path / "large").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("large", "has more than 4 bytes"), ("pipe", "is not a regular file"), ("none", "No such file")):
        with pytest.raises(OSError, match=message):
            read_small(tmp_path / name)


def test_who_holds_a_lock_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BEAT", 0.01)
    with claimed(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (0, 0))
        until = time.monotonic() + 10
        while not (tmp_path / "lock").stat().st_mtime and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / "lock").stat().st_mtime > 0


def test_a_prompt_is_a_line_whatever_separators_are_in_it(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\n two\u2028lines, one\x0bprompt \rthe last".encode())
    assert prompt_lines(tmp_path / "prompts.txt") == ["a cat", "two\u2028lines, one\x0bprompt", "the last"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")  # noqa: PTH110
def test_a_full_disk_is_named_by_the_file(tmp_path):
    def fill(path):
        with replacing(path), Path("/dev/full").open("w") as full:
            full.write("a")

    with pytest.raises(OSError, match=re.escape(f"[Errno {errno.ENOSPC}] No space left on device: '{tmp_path / 'new'}'")):
        fill(tmp_path / "new")
    folder = RunFolder(tmp_path)
    folder.metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match=re.escape(f": '{folder.metrics}'")):
        folder.add({"phase": "stage 0", "total": 1})
