"""Rows over seeds, what is said about what is missing, and the table in Markdown and on the terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from edit_compile.bench.machine import Machine
from edit_compile.study.compare import teacher_row
from edit_compile.study.console import results_table
from edit_compile.study.measured import Measurement, Measurements, read_measured, write_measured
from edit_compile.study.results import CellResult, Results, columns, markdown, notes, row_of, seeds_in_words

SIZE = "64 x 64"


def cell(seed, error, state="finished", **measures):
    numbers = {"error": Measurement(values={"before": 0.5, "after": error}), "training": Measurement(values={"seconds": 10.0 + seed})}
    flops = Measurement(values={SIZE: 4.1e9, f"{SIZE}.teacher": 8.2e9, f"{SIZE}.ratio": 0.5})
    measured = Measurements(model="a", measures={**numbers, "flops": flops, **measures} if state == "finished" else {})
    failed = "RuntimeError: no memory" if state == "failed" else None
    return CellResult(seed=seed, folder=f"cells/a/seed-{seed}", state=state, error=failed), measured


@pytest.fixture
def results():
    of_teacher = {"error": Measurement(values={"after": 0.0}), "adherence": Measurement(reason="no demo")}
    times = {f"{SIZE}.ratio": 0.8, f"{SIZE}.ratio.low": 0.7, f"{SIZE}.ratio.high": 0.95, f"{SIZE}.seconds": 0.1}
    latency = {"latency": Measurement(values=times)}
    three = row_of("three", "distilled", [cell(0, 0.03, **latency), cell(1, 0.01, **latency), cell(2, 0.02)])
    two = row_of("two", "distilled", [cell(0, 0.0004), cell(1, 0.0, "failed"), cell(2, 0.0, "not begun")])
    rows = (teacher_row(Measurements(model="b", measures=of_teacher), [three, two]), three, two)
    machine = Machine(processor="a CPU", cores=2, threads=1, python="3.11", versions={"torch": "2.14"})
    options = {"command": "edit-compile compare study.yaml -o out", "budget": "160 steps", "seeds": (0, 1, 2), "samples": 50}
    return Results(model="demo/dit-64", machine=machine, rows=rows, **options)


def test_numbers_are_medians_with_the_least_and_the_greatest(results):
    teacher, three, _ = results.rows
    assert three.numbers["error.after"].model_dump() == {"median": 0.02, "least": 0.01, "greatest": 0.03, "count": 3}
    assert (teacher.numbers["error.after"].median, teacher.numbers[f"flops.{SIZE}"].median) == (0.0, 8.2e9)
    assert [seeds_in_words(row) for row in results.rows] == ["", "3", "1 of 3"]
    assert [one.error for one in results.failed] == ["RuntimeError: no memory"]
    texts = {column.title: [column.text(row) for row in results.rows] for column in columns(results.rows)}
    assert texts["error"] == [("0", ""), ("0.0200", "0.0100 to 0.0300"), ("4.0e-04", "")]
    assert texts[f"FLOPs at {SIZE}"] == [("8.2 G", ""), ("4.1 G", ""), ("4.1 G", "")]
    assert texts["of the teacher's"] == [("-", ""), ("0.50x", ""), ("0.50x", "")]
    assert texts[f"time at {SIZE}, of teacher's"] == [("-", ""), ("0.80x, 2 seeds", "0.70x to 0.95x"), ("-", "")]
    assert list(texts) == ["error before", "error", f"FLOPs at {SIZE}", "of the teacher's", f"time at {SIZE}, of teacher's", "seconds"]


def test_results_are_read_as_they_were_written(results):
    assert Results.model_validate_json(results.model_dump_json(indent=2)) == results


def test_notes_say_what_failed_what_is_missing_and_why(results):
    assert notes(results) == ["two, seed 1 failed: RuntimeError: no memory", "not finished: two, seed 2", "adherence: no demo (teacher)"]


def test_the_table_can_be_pasted(results):
    text = markdown(results, "gallery.png")
    assert text.startswith(results._repr_markdown_().rstrip())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[3].startswith(
        "| three | 3 | 0.5000 | 0.0200 (0.0100 to 0.0300) | 4.1 G | 0.50x | 0.80x, 2 seeds (0.70x to 0.95x) | 11 (10 to 12) |"
    )
    for words in ("`edit-compile compare study.yaml -o out`", "160 steps", "seeds 0, 1, 2", "50 held-out captions", "a CPU", "torch 2.14"):
        assert words in text
    assert text.rstrip().endswith("![gallery](gallery.png)")


@pytest.mark.parametrize("width", [30, 60, 80, 160])
def test_the_table_on_the_terminal(results, width):
    console = Console(width=width, highlight=False)
    with console.capture() as shown:
        console.print(results_table(results))
    lines, words = shown.get().splitlines(), " ".join(shown.get().split())
    assert all(len(line) <= width for line in lines)
    assert "…" not in words
    assert any(line.startswith("three") and "0.0200" in line for line in lines)
    for number in ("0.0100-0.0300", "4.1 G", "0.50x", "0.70x-0.95x", "10-12"):
        assert number in words
    assert "two, seed 1 failed: RuntimeError: no memory" in words


def test_what_was_measured_of_fewer_seeds_says_so():
    drawn = {"adherence": Measurement(values={"shape": 0.5})}
    row = row_of("one", "distilled", [cell(0, 0.1, **drawn), cell(1, 0.2), cell(2, 0.3, **drawn)])
    texts = {column.title: column.text(row) for column in columns([row])}
    assert (texts["error"], texts["shape"]) == (("0.2000", "0.1000 to 0.3000"), ("50.0%, 2 seeds", ""))


def test_what_was_measured_of_another_model_or_otherwise_does_not_count(tmp_path):
    settings = {"samples": 100}
    measured = Measurements(model="first").with_measure("adherence", Measurement(settings=settings, values={"shape": 0.5}))
    write_measured(tmp_path, measured)
    assert read_measured(tmp_path, "first") == measured
    assert read_measured(tmp_path, "second") == Measurements(model="second")
    assert measured.lacks({"adherence": settings, "flops": {}}) == ["flops"]
    assert measured.only({"adherence": settings}) == measured
    other = measured.only({"adherence": {"samples": 400}})
    assert (other.numbers(), other.reasons()) == ({}, {"adherence": "measured with other settings; compare again"})
    assert measured.only({}).measures == {}
    (tmp_path / "measured.json").write_text("{")
    assert read_measured(tmp_path, "first").measures == {}
