"""Commands that are killed, stopped by signals, or run out of disk, and go on: what they leave is what they leave undisturbed."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from attacks.processes import Wrong, command, forked
from attacks.workshop import workshop

KILLED, TIMES = 3, ("seconds", "seconds_per_step", "samples_per_second", "speeds", "folder", "mtime")
DISKS = 20  # sizes


def commands(folder: Path) -> dict[str, list[object]]:
    """List the commands that can be continued, each writing into a folder of its own below `folder`."""
    shop = workshop()
    rank = ["--candidates", "mm-edit, kv-compress", "--sites", "best 1", "--steps", 4, "--size", "64x96"]
    return {
        "convert": ["convert", "--model", shop / "model", "-o", folder / "out"],
        "cache": ["cache", shop / "cache.yaml", "-o", folder / "out", "--shard-size", 2],
        "distill": ["distill", shop / "run.yaml", "-o", folder / "out", "--resume"],
        "rank": ["rank", shop / "model", "--recipe", shop / "run.yaml", *rank, "-o", folder / "out"],
    }


def contents(folder: Path) -> dict[str, str]:
    """Hash what a command has left, without times, by file; pictures and texts for people are left out."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if not file.is_file() or file.suffix in (".png", ".md", ".html", ".yaml") or any(part.startswith(".") for part in Path(name).parts):
            continue
        content = file.read_bytes()
        if file.suffix in (".json", ".jsonl"):
            rows = [_without_times(json.loads(line)) for line in ([content] if file.suffix == ".json" else content.splitlines())]
            content = json.dumps(rows, sort_keys=True).replace(str(folder), "OUT").encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if key not in TIMES}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


@cache
def undisturbed(name: str) -> tuple[dict[str, str], float]:
    """Run a command to its end; returns what it leaves, and the seconds it takes."""
    folder = workshop() / f"undisturbed-{name}"
    ended = forked(command(*commands(folder)[name]), limit=1200)
    if ended.status != 0:
        raise SystemExit(f"{name} does not work here: {ended.last_line}")
    return contents(folder / "out"), ended.seconds


def _check_same(name: str, folder: Path, what: str) -> None:
    expected, found = undisturbed(name)[0], contents(folder / "out")
    different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if different:
        raise Wrong(f"{name}, {what}: {', '.join(different[:3])} differ")


def kills(number: int, folder: Path) -> str:
    name = list(commands(folder))[number % 4]
    seconds, rng = undisturbed(name)[1], random.Random(number)
    times = [rng.uniform(0, seconds) for _ in range(rng.randint(1, KILLED))]
    for at in times:
        ended = forked(command(*commands(folder)[name]), limit=20 * seconds + 60, at=at)
        if ended.status not in (0, None):
            raise Wrong(f"{name} after a kill: {ended.last_line}")
        if ended.status == 0:
            break
    ended = forked(command(*commands(folder)[name]), limit=20 * seconds + 60)
    if ended.status != 0 and not ("finished" in ended.last_line or "--overwrite" in ended.last_line):
        raise Wrong(f"{name} after {len(times)} kills: {ended.last_line}")
    what = f"killed after {', '.join(f'{at:.2f}' for at in times)} of {seconds:.1f} s"
    _check_same(name, folder, what)
    return f"{name}, {what}"


def signals(number: int, folder: Path) -> str:
    rng, seconds = random.Random(number), undisturbed("distill")[1]
    at, send = rng.uniform(0.05, seconds), rng.choice([signal.SIGINT, signal.SIGTERM])
    ended = forked(command(*commands(folder)["distill"]), limit=20 * seconds + 60, at=at, send=send)
    if ended.status not in (0, 128 + send) or "Traceback" in ended.said:
        raise Wrong(f"{send.name} after {at:.2f} s: status {ended.status}, {ended.last_line}")
    again = forked(command(*commands(folder)["distill"]), limit=20 * seconds + 60)
    if again.status != 0 and "finished" not in again.last_line:
        raise Wrong(f"resumed after {send.name} at {at:.2f} s: {again.last_line}")
    _check_same("distill", folder, f"{send.name} after {at:.2f} s")
    return f"{send.name} after {at:.2f} of {seconds:.1f} s: status {ended.status}"


def disks(number: int, folder: Path) -> str:
    undisturbed("distill")
    needed = sum(file.stat().st_size for file in (workshop() / "undisturbed-distill").rglob("*") if file.is_file())
    size = int(needed * (0.1 + 2 * number / DISKS)) + 4096
    disk = folder / "disk"
    disk.mkdir(parents=True)
    run_in_python = [sys.executable, "-c", "import sys; from edit_compile.cli import main; main(sys.argv[1:])"]
    arguments = [str(part) for part in commands(disk)["distill"]]
    # What is on the disk goes with the namespace: it is copied to where there is space, and continued there.
    shell = f'mount -t tmpfs -o size={size} none "$0" || exit 77; "$@"; status=$?; cp -r "$0/out" "$0/.."; exit $status'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, str(disk), *run_in_python, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode == 77:
        raise SystemExit("disks: this system does not let users mount a tmpfs in a namespace of their own")
    last = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("error: ")), "")
    if "Traceback" in done.stderr or (done.returncode != 0 and not last):
        raise Wrong(f"a disk of {size:,} bytes: status {done.returncode}, {done.stderr.strip()[-200:]}")
    again = forked(command(*commands(folder)["distill"]), limit=600)
    if again.status != 0 and "finished" not in again.last_line:
        raise Wrong(f"resumed after a disk of {size:,} bytes was full: {again.last_line}")
    _check_same("distill", folder, f"a disk of {size:,} bytes")
    return f"a disk of {size:,} of {needed:,} bytes: status {done.returncode}"
