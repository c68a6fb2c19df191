"""The steps that need a GPU, rehearsed on the CPU at small sizes: `benchmarks/gpu.sh`, its scheduler and every step."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as scheduler  # noqa: E402
from benchmarks.gpu import demo, versions, worker  # noqa: E402
from benchmarks.gpu.results import ATTEMPTS, Results, in_words, page  # noqa: E402
from benchmarks.gpu.step import NotDone, Step, Unit, Work  # noqa: E402
from benchmarks.gpu.steps import STEPS  # noqa: E402

BY_NAME = {step.name: step for step in STEPS}


def rehearsed(name: str, folder: Path, within: float = 600) -> tuple[Results, list[dict]]:
    """Run what is left of a step; returns the rows of all of it, none of whose units failed."""
    step, results = BY_NAME[name], Results(folder)
    work = folder / "work" / name.partition("-")[0]
    work.mkdir(parents=True, exist_ok=True)
    assert worker.run_units(step, results, Work(folder, work, True, time.monotonic() + within))
    ended = [results.state(name, unit.name).ended for unit in step.units(True)]
    assert [each["error"] for each in ended if each is not None] == [None] * len(step.units(True))
    return results, [row for each in ended for row in each["rows"]]


# ------------------------------------------------------------------ the scheduler


def step_of(**units) -> Step:
    return Step("a-step", "Some units", 1, lambda tiny: [Unit(name, run) for name, run in units.items()])


def run(step: Step, folder: Path, until: float = float("inf")) -> Results:
    results = Results(folder)
    worker.run_units(step, results, Work(folder, folder, True, until))
    return results


def test_a_unit_that_fails_is_written_down_and_the_next_one_runs(tmp_path: Path):
    calls: list[str] = []

    def fails(work):
        calls.append("fails")
        raise ValueError("no such kernel")

    def works(work):
        calls.append("works")
        return [{"px": 64, "ms": 1.5}]

    step = step_of(fails=fails, works=works)
    run(step, tmp_path)
    again = run(step, tmp_path)
    assert calls == ["fails", "works"]
    assert again.left(step, True) == []
    assert again.state("a-step", "fails").ended["error"] == "ValueError: no such kernel"
    assert "failed: fails" in in_words(step, again, True)
    text = page([step], again, False, ["torch 2"])
    assert "| px | ms |\n| ---: | ---: |\n| 64 | 1.5 |" in text
    assert "fails: **ValueError: no such kernel**" in text


def test_a_unit_that_is_not_done_goes_on_in_the_next_run_before_others(tmp_path: Path):
    steps: list[int] = []

    def in_parts(work):
        steps.append(len(steps))
        if len(steps) < 5:
            raise NotDone("not yet")
        return []

    step = step_of(parts=in_parts, other=lambda work: [])
    for number in range(4):
        results = run(step, tmp_path)
        results.give_up(step, True)
        assert results.left(step, True) == ["parts", "other"], number
    assert run(step, tmp_path).left(step, True) == []


def test_what_never_ends_is_given_up_after_some_attempts(tmp_path: Path):
    step = step_of(hangs=lambda work: [], other=lambda work: [])
    for _ in range(ATTEMPTS):
        results = Results(tmp_path)
        results.give_up(step, True)
        assert results.left(step, True) == ["hangs", "other"]
        results.add("begin", "a-step", "hangs")  # and the process is gone
    results = Results(tmp_path)
    results.give_up(step, True)
    assert results.left(step, True) == ["other"]
    assert "did not end" in results.state("a-step", "hangs").ended["error"]


def test_no_unit_begins_when_the_time_is_over(tmp_path: Path):
    assert run(step_of(late=lambda work: []), tmp_path, until=time.monotonic() + 1).left(step_of(late=lambda work: []), True) == ["late"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path):
    results = Results(tmp_path)
    results.add("end", "a-step", "one", rows=[], error=None)
    with results.path.open("a") as file:
        file.write('{"event": "end", "st')
    results.add("end", "a-step", "two", rows=[], error=None)
    assert Results(tmp_path).left(step_of(one=None, two=None), True) == []


def test_steps_are_processes_which_are_ended_with_their_children_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The worker is replaced with a program that writes a row, and hangs the first time, with a child."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, pathlib, subprocess, sys, time\n"
        "out = pathlib.Path(sys.argv[2]); mark = out / 'began'; lines = out / 'results.jsonl'\n"
        "def add(**more): print(json.dumps(dict(step='a-step', at='2026-01-01', error=None, **more)), file=lines.open('a'))\n"
        "if mark.exists(): add(event='end', unit='two', rows=[]); sys.exit(0)\n"
        "add(event='end', unit='one', rows=[{'x': 1}]); mark.write_text('')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); (out / 'child').write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    started = subprocess.Popen
    monkeypatch.setattr(
        scheduler.subprocess, "Popen", lambda command, **options: started([sys.executable, str(program), *command[3:]], **options)
    )
    monkeypatch.setattr(scheduler, "GRACE", 0.4)
    monkeypatch.setattr(scheduler, "SHORTEST", 0.1)
    step = Step("a-step", "Some units", 2 / 60, lambda tiny: [Unit("one", lambda work: []), Unit("two", lambda work: [])])
    out = tmp_path / "out"
    results = Results(out)
    results.add("run", tiny=True)
    scheduler._run_step(step, results, out, tmp_path, True, time.monotonic() + 60)
    assert Results(out).left(step, True) == ["two"]
    stat, within = Path(f"/proc/{(out / 'child').read_text()}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < within:
        time.sleep(0.05)
    assert time.monotonic() < within
    scheduler._run_step(step, results, out, tmp_path, True, time.monotonic() + 60)
    assert Results(out).left(step, True) == []


def test_a_machine_that_lacks_packages_is_told_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(versions, "NEEDED", (*versions.NEEDED, "a-package-that-is-nowhere"))
    monkeypatch.setattr(versions, "_gpu", lambda: "gpu none")
    assert scheduler.main([str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "a-package-that-is-nowhere missing (for everything)" in said
    assert "WHEELS=" in said


def test_a_rehearsal_and_measurements_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(versions, "_gpu", lambda: "gpu none")
    Results(tmp_path).add("run", tiny=False)
    assert scheduler.main([str(tmp_path), "--tiny"]) == 2
    assert "name another folder" in capsys.readouterr().out


def test_every_step_has_a_name_of_its_own_and_units(capsys, tmp_path: Path):
    assert len(BY_NAME) == len(STEPS)
    assert all(step.units(tiny) and step.minutes <= 9 for step in STEPS for tiny in (True, False))
    assert scheduler.main([str(tmp_path), "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BY_NAME)


# ------------------------------------------------------------------ steps


@pytest.mark.slow
def test_the_script_runs_a_step_and_says_what_is_left(tmp_path: Path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), "kernels", "--tiny"]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "torch " in said.stdout
    left = dict(line.split(maxsplit=1) for line in said.stdout.splitlines() if line.split(maxsplit=1)[0:1] and line.split()[0] in BY_NAME)
    assert left["kernels"] == "done"
    assert left["compile"].startswith("0 of ")
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["run", *["begin", "end"] * 4]


@pytest.mark.slow
def test_kernels(tmp_path: Path):
    results, rows = rehearsed("kernels", tmp_path)
    kinds = {"exact eta", "linear core", "compressor", "window of radius 4", "window of radius 4, and backward", "both compressors"}
    kinds |= {"Triton: linear_attention", "Triton: depthwise"}
    assert {row["what"] for row in rows} >= kinds
    assert all(row["ms"] > 0 for row in rows)
    assert all(row["relative error"] < 1e-4 for row in rows if "relative error" in row)
    assert "| window of radius 4 |" in page(STEPS, results, True, [])


@pytest.mark.slow
def test_compiled_code_has_the_softmax_kernel_that_was_preferred(tmp_path: Path):
    """Torch keeps compiled code by a graph in which attention has no kernel yet, and would give out that of another one."""
    program = (
        "import torch, torch.nn.functional as F\n"
        "from torch.nn.attention import SDPBackend, sdpa_kernel\n"
        "from torch.profiler import profile\n"
        "q = torch.randn(1, 2, 64, 32)\n"
        "for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):\n"
        "    torch.compiler.reset()\n"
        "    with sdpa_kernel(kernel), torch.no_grad():\n"
        "        attend = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q) + 1)\n"
        "        attend(q)\n"
        "        with profile() as found: attend(q)\n"
        "    print(any('flash_attention' in each.key for each in found.key_averages()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=scheduler._environment(tmp_path), capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.split() if line in ("True", "False")] == ["True", "False"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pixart-sigma", "flux-dev"])
def test_the_latency_table(model: str, tmp_path: Path):
    results, rows = rehearsed(f"latency-{model}", tmp_path)
    timed = [row for row in rows if "px" in row]
    assert {row["px"] for row in timed} == {16, 32}
    assert {"teacher", "bound"} < {row["model"] for row in timed}
    assert all(row["ms"] > 0 and row["problem"] is None for row in timed)
    fastest = {row["side"]: row["kernel"] for row in rows if row.get("fastest")}
    assert {row["px"]: row["softmax"] for row in timed if row["model"] == "teacher"} == fastest
    assert "| px | model |" in page(STEPS, results, True, [])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd3.5-medium"])
def test_training_steps(model: str, tmp_path: Path):
    _, rows = rehearsed(f"training-{model}", tmp_path)
    assert all(row["ms a step"] > 0 and row["counted GiB"] > 0 and "problem" not in row for row in rows)
    assert not list(tmp_path.glob("work/*/run"))


@pytest.mark.slow
def test_compile_and_export(tmp_path: Path):
    _, rows = rehearsed("compile", tmp_path)
    assert all(row.get("worst relative error", row.get("relative error")) < 1e-4 for row in rows)
    teacher, student = (next(row["graphs"] for row in rows if row["what"] == who and "graphs" in row) for who in ("teacher", "student"))
    assert 0 < student <= 2 * teacher  # a square comes first: its rows and columns are one size to torch, until they differ


@pytest.mark.slow
def test_marked_tests_are_found_and_skipped_here(tmp_path: Path):
    import torch

    _, rows = rehearsed("tests", tmp_path)
    files = {row["tests"].partition("::")[0] for row in rows}
    assert files == {"tests/test_gpu.py", "tests/designs/test_local_attention.py", "tests/composition/test_cuda_graphs.py"}
    assert all(row["failed"] == 0 and (row["skipped"] > 0) != torch.cuda.is_available() for row in rows)


@pytest.mark.slow
def test_the_demo_is_trained_in_parts_distilled_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "_MARGIN", 598.0)  # time for one step at a time
    step, results = BY_NAME["demo-teacher"], Results(tmp_path)
    folder = tmp_path / "work" / "demo"
    folder.mkdir(parents=True)
    worker.run_units(step, results, Work(tmp_path, folder, True, time.monotonic() + 598.5))
    assert results.left(step, True) == ["training"]
    assert (folder / "teacher" / "state.safetensors").exists()
    monkeypatch.setattr(demo, "_MARGIN", 0.0)
    _, (teacher,) = rehearsed("demo-teacher", tmp_path)
    assert teacher["stages"].endswith("3 steps of 2 at 16 px")
    _, rows = rehearsed("demo-student", tmp_path)
    assert rows[0]["after"] > 0
    _, rows = rehearsed("demo-gallery", tmp_path)
    assert {row["model"] for row in rows if "model" in row} == {"teacher", "untrained", "student"}
    assert (tmp_path / "demo-gallery-24.png").stat().st_size > 0
    assert (tmp_path / "demo-losses.png").exists()


@pytest.mark.slow
def test_the_teacher_has_about_thirty_million_parameters():
    import torch

    with torch.device("meta"):
        number = sum(p.numel() for p in demo.untrained(False).parameters())
    assert 28e6 < number < 36e6
