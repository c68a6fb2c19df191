"""Rows over seeds, what is said about what is missing, and the table in Markdown and on the terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from edit_compile.study.compare import teacher_row
from edit_compile.study.console import results_table
from edit_compile.study.measured import Measure, Measured, write_measured
from edit_compile.study.results import CellResult, Machine, Results, columns, markdown, notes, row_of, seeds_in_words

SIZE = "64 x 64"


def cell(seed, error, state="finished", **measures):
    numbers = {"error": Measure(values={"before": 0.5, "after": error}), "training": Measure(values={"seconds": 10.0 + seed})}
    flops = Measure(values={SIZE: 4.1e9, f"{SIZE}.teacher": 8.2e9, f"{SIZE}.ratio": 0.5})
    measured = Measured(measures={**numbers, "flops": flops, **measures} if state == "finished" else {})
    failed = "RuntimeError: no memory" if state == "failed" else None
    return CellResult(seed=seed, folder=f"cells/a/seed-{seed}", state=state, error=failed), measured


@pytest.fixture
def results(tmp_path):
    write_measured(tmp_path, Measured(measures={"error": Measure(values={"after": 0.0}), "adherence": Measure(reason="no demo")}))
    times = {f"{SIZE}.ratio": 0.8, f"{SIZE}.ratio.low": 0.7, f"{SIZE}.ratio.high": 0.95, f"{SIZE}.seconds": 0.1}
    latency = {"latency": Measure(values=times)}
    three = row_of("three", "distilled", [cell(0, 0.03, **latency), cell(1, 0.01, **latency), cell(2, 0.02)])
    two = row_of("two", "distilled", [cell(0, 0.0004), cell(1, 0.0, "failed"), cell(2, 0.0, "not begun")])
    rows = (teacher_row(tmp_path, [three, two]), three, two)
    machine = Machine(processor="a CPU", cores=2, threads=1, python="3.11", versions={"torch": "2.14"})
    options = {"command": "edit-compile compare study.yaml -o out", "budget": "160 steps", "seeds": (0, 1, 2), "samples": 50}
    return Results(model="demo/dit-64", machine=machine, rows=rows, **options)


def test_numbers_are_medians_with_the_least_and_the_greatest(results):
    teacher, three, _ = results.rows
    assert three.numbers["error.after"].model_dump() == {"median": 0.02, "least": 0.01, "greatest": 0.03}
    assert (teacher.numbers["error.after"].median, teacher.numbers[f"flops.{SIZE}"].median) == (0.0, 8.2e9)
    assert [seeds_in_words(row) for row in results.rows] == ["", "3", "1 of 3"]
    assert [one.error for one in results.failed] == ["RuntimeError: no memory"]
    texts = {column.title: [column.text(row) for row in results.rows] for column in columns(results.rows)}
    assert texts["error"] == [("0", ""), ("0.0200", "0.0100 to 0.0300"), ("4.0e-04", "")]
    assert texts[f"FLOPs at {SIZE}"] == [("8.2 G", ""), ("4.1 G", ""), ("4.1 G", "")]
    assert texts["of teacher's"] == [("-", ""), ("0.50x", ""), ("0.50x", "")]
    assert texts[f"time at {SIZE}, of teacher's"] == [("-", ""), ("0.80x", "0.70x to 0.95x"), ("-", "")]
    assert list(texts) == ["error before", "error", f"FLOPs at {SIZE}", "of teacher's", f"time at {SIZE}, of teacher's", "seconds"]


def test_results_are_read_as_they_were_written(results):
    assert Results.model_validate_json(results.model_dump_json(indent=2)) == results


def test_notes_say_what_failed_what_is_missing_and_why(results):
    assert notes(results) == ["two, seed 1 failed: RuntimeError: no memory", "not finished: two, seed 2", "adherence: no demo"]


def test_the_table_can_be_pasted(results):
    text = markdown(results, "gallery.png")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[3].startswith("| three | 3 | 0.5000 | 0.0200 (0.0100 to 0.0300) | 4.1 G | 0.50x | 0.80x (0.70x to 0.95x) | 11 (10 to 12) |")
    for words in ("`edit-compile compare study.yaml -o out`", "160 steps", "seeds 0, 1, 2", "50 held-out captions", "a CPU", "torch 2.14"):
        assert words in text
    assert text.rstrip().endswith("![gallery](gallery.png)")


def test_the_table_on_the_terminal(results):
    console = Console(width=160, highlight=False)
    with console.capture() as shown:
        console.print(results_table(results))
    lines = shown.get().splitlines()
    assert any(line.startswith("three") and "0.0200" in line for line in lines)
    assert any("0.0100-0.0300" in line for line in lines)
    assert "two, seed 1 failed: RuntimeError: no memory" in shown.get()
