"""Commands that are stopped by signals, as real processes: one line, the documented status, and never later than the second signal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

BOTH = pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
READY = "open('ready', 'w').close()\n"
LOCKED_TWICE = """
import ctypes
c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
c.pthread_mutex_lock(mutex)
c.pthread_mutex_lock(mutex)
"""
CLEANS_UP_FOREVER = """
import time
try:
    time.sleep(60)
finally:
    time.sleep(60)
"""
LEAVES_A_THREAD = """
import threading, time
import edit_compile.stop_signals
edit_compile.stop_signals._PATIENCE = 0.3
threading.Thread(target=time.sleep, args=(60,)).start()
time.sleep(60)
"""
FORKS = """
import os, time
child = os.fork()
if child == 0:
    try:
        time.sleep(60)
    finally:
        os._exit(7)
open('child', 'w').write(str(child))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
raise ValueError('the child is gone')
"""


def started(folder, *arguments, environment=()):
    """A command as a process of its own, in a folder."""
    code = "from edit_compile.cli import main; main()"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)},
        **streams,
    )


def importing(folder, text, **options):
    """A command that is importing a module of its user's, once that has said that it is."""
    (folder / "module.py").write_text(READY + text)
    return once(folder / "ready", started(folder, "--import", "module.py", "inspect", "demo/dit", **options))


def once(file, process):
    """The process, once a file is there."""
    until = time.monotonic() + 300
    while not file.exists():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"{file.name} is not there: {process.communicate()}")
        time.sleep(0.02)
    time.sleep(0.2)  # and it does what comes then
    return process


def ended(process, within=30):
    """The status, and what was said on standard error."""
    try:
        _, said = process.communicate(timeout=within)
    finally:
        process.kill()
    return process.returncode, said


@BOTH
def test_a_signal_before_anything_is_loaded_is_one_line(tmp_path, number, status):
    process = importing(tmp_path, "import time\ntime.sleep(60)")
    process.send_signal(number)
    assert ended(process) == (status, "stopped\n")


@BOTH
@pytest.mark.parametrize("text", [LOCKED_TWICE, CLEANS_UP_FOREVER], ids=["in a call that never returns", "in the cleaning up"])
def test_a_second_signal_ends_what_hangs(tmp_path, text, number, status):
    process = importing(tmp_path, text)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    assert ended(process) == (status, "stopped at once\n")


def test_threads_that_hang_do_not_keep_a_stopped_command(tmp_path):
    process = importing(tmp_path, LEAVES_A_THREAD)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "stopped\n")


def test_a_launcher_that_passes_a_signal_on_is_no_second_one(tmp_path):
    process = importing(tmp_path, CLEANS_UP_FOREVER, environment={"TORCHELASTIC_RUN_ID": "x"})
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "stopped at once\n")


def test_a_forked_processs_signals_are_its_own(tmp_path):
    process = importing(tmp_path, FORKS)
    once(tmp_path / "child", process)
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):  # of one that the first has ended
            os.kill(int((tmp_path / "child").read_text()), signal.SIGINT)
    assert ended(process) == (1, "error: --import module.py: ValueError: the child is gone\n")


HANGING_DATA = """
import threading
from edit_compile.distillation.data.prefetch import prefetch
from edit_compile.distillation.train.interrupt import interruptible

def read(number):
    if THREAD or number == 1:
        open('reads', 'w').close()
        threading.Event().wait()

with interruptible():
    list((prefetch if THREAD else map)(read, range(3)))
"""


@pytest.mark.parametrize("thread", [True, False])
def test_training_whose_data_hang_ends_at_the_second_signal(tmp_path, thread):
    process = importing(tmp_path, f"THREAD = {thread}\n{HANGING_DATA}")
    once(tmp_path / "reads", process).send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    heard = "stopping as soon as what is needed to continue is saved; a second signal stops at once\n"
    assert ended(process) == (143, f"{heard}stopped at once\n")


HANGING_RUN = """
import threading
from edit_compile.distillation.data.sources.shapes import ShapesSource
read = ShapesSource.batch

def batch(self, request):
    if request.split == 'train':
        open('reads', 'w').close()
        threading.Event().wait()
    return read(self, request)

ShapesSource.batch = batch
"""


@pytest.mark.slow
def test_a_run_whose_data_hang_ends_at_the_second_signal(tmp_path):
    (tmp_path / "module.py").write_text(HANGING_RUN)
    recipe = {"model": "demo/dit", "validation": {"samples": 2, "timestep_bins": 1}, "stages": [{"resolution": 32, "steps": 2}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    process = once(tmp_path / "reads", started(tmp_path, "--import", "module.py", "distill", "recipe.yaml", "-o", "run"))
    for _ in range(2):
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
    status, said = ended(process)
    assert status == 143
    assert [line.partition(" ")[0] for line in said.splitlines() if "stop" in line] == ["stopping", "stopped"]
