"""Studies end to end: cells that are done once, resumed, refused and retried, and what is written about them."""

from __future__ import annotations

import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

import data_files
import edit_compile as ec
import pipelines
from edit_compile.cli import main
from edit_compile.distillation import distill, load_recipe
from edit_compile.files import claimed
from edit_compile.study import compare as comparison
from edit_compile.study.compare import compare, read_results
from edit_compile.study.drawn import Drawn
from edit_compile.study.measure import Measurer
from edit_compile.study.measured import Measurement, Measurements, identity_of_run, read_measured
from edit_compile.study.schema import Measures

pytestmark = pytest.mark.usefixtures("compiled_once")

SET = {
    "layerwise": {"steps": 4, "global_batch_size": 2},
    "stages.0.global_batch_size": 2,
    "stages.0.steps": 8,
    "validation": {"samples": 4, "timestep_bins": 1, "batch_size": 4},
    "samples": {"count": 1, "steps": 1},
}
MEASURE = {"samples": 3, "sampling_steps": 2, "flops": [32], "gallery": 2}


def write(folder, **content):
    path = folder / "study.yaml"
    common = {"recipe": "demo-dit", "set": SET, "seeds": [0], "budget": {"steps": 3}, "measure": MEASURE}
    path.write_text(yaml.safe_dump(common | content, sort_keys=False))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def failing(recipe, *args, **kwargs):
    raise RuntimeError("no memory\nat all")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study of two configurations, the second of which fails, as the command line does it."""
    folder = tmp_path_factory.mktemp("study")
    changes = {"eight": {"convert.reduction": 8}, "fails": {"convert.reduction": 2}}
    path = write(folder, configurations=changes)
    real = comparison.distill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            comparison,
            "distill",
            lambda recipe, *args, **kwargs: (failing if recipe.convert.options["reduction"] == 2 else real)(recipe, *args, **kwargs),
        )
        return path, folder / "out", CliRunner().invoke(main, ["compare", str(path), "-o", str(folder / "out")])


def test_results_are_typed_and_complete(done):
    _, folder, _ = done
    results = read_results(folder)
    content = json.loads((folder / "results.json").read_text())
    assert content["version"] == 2
    assert [(row.title, row.kind) for row in results.rows] == [
        ("teacher", "teacher"),
        ("eight", "distilled"),
        ("fails", "distilled"),
    ]
    teacher, eight, _ = results.rows
    (cell,) = eight.cells
    assert (cell.state, cell.seed, cell.folder) == ("finished", 0, "cells/eight/seed-0")
    run = json.loads((folder / cell.folder / "result.json").read_text())
    assert cell.numbers["error.after"] == run["held_out_error"]["after"]["total"]
    assert teacher.numbers["error.after"].median == teacher.numbers["frechet.teacher"].median == 0
    for row in (teacher, eight):
        assert {"adherence.colour_and_place", "adherence.shape", "frechet.real", "flops.32 x 32"} <= row.numbers.keys()
    assert eight.numbers["frechet.teacher"].median > 0
    ratio = eight.numbers["flops.32 x 32"].median / teacher.numbers["flops.32 x 32"].median
    assert eight.numbers["flops.32 x 32.ratio"].median == pytest.approx(ratio)
    assert eight.numbers["parameters.added"].median > 0
    assert not any(name.startswith("latency") for name in eight.numbers)
    assert results.machine.versions["torch"]


def test_a_cell_is_a_run_of_as_many_steps_as_the_budget_says(done):
    _, folder, _ = done
    cell = folder / "cells" / "eight" / "seed-0"
    rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["steps"]) for row in rows if row["step"] == row["steps"]] == [("layerwise fit", 1), ("stage 0", 2)]
    assert ec.load(cell)


def test_a_failed_cell_does_not_stop_the_others(done):
    _, folder, result = done
    assert result.exit_code == 1
    assert "error: 1 of the cells failed" in result.stderr
    (cell,) = read_results(folder).failed
    assert cell.error == "RuntimeError: no memory at all"
    assert "Traceback" in json.loads((folder / cell.folder / "error.json").read_text())["traceback"]


def test_tables_and_gallery(done):
    path, folder, result = done
    markdown = (folder / "results.md").read_text()
    head, _, *rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")[1:4]] == ["", "seeds", "error before"]
    assert {line.count("|") for line in rows} == {head.count("|")}
    for words in ("| teacher |", "edit-compile compare", "budget: 3 steps", "torch ", "fails, seed 0 failed"):
        assert words in markdown
    assert "eight" in result.stdout
    width, height = size_of(folder / "gallery.png")
    assert width > 2 * 160
    assert height > 2 * 160
    assert (folder / "study.yaml").read_text() == path.read_text()
    printed = CliRunner().invoke(main, ["compare", str(path), "-o", str(folder), "--table", "--json"])
    assert (printed.exit_code, json.loads(printed.stdout)) == (0, json.loads((folder / "results.json").read_text()))


def test_what_is_done_is_not_done_again_and_what_failed_is(done, monkeypatch):
    path, folder, _ = done
    before, tried = contents(folder / "cells" / "eight"), []

    def run(recipe, *args, **kwargs):
        tried.append(recipe.convert.options)
        return failing(recipe)

    monkeypatch.setattr(comparison, "distill", run)
    monkeypatch.setattr(comparison.Measurer, "_with_drawn_demo", lambda *args, **options: pytest.fail("drawn again"))
    assert len(compare(path, output=folder).failed) == 1
    assert tried == [{"reduction": 2}]
    assert contents(folder / "cells" / "eight") == before


def test_a_changed_configuration_is_refused_unless_it_failed(done, tmp_path, monkeypatch):
    _, folder, _ = done
    monkeypatch.setattr(comparison, "distill", failing)
    changed = write(tmp_path, configurations={"eight": {"convert.reduction": 2}})
    with pytest.raises(
        ec.StudyError, match=r"another recipe: convert\.options\.reduction \(8 then, 2 now\).*'eight' another name"
    ) as caught:
        compare(changed, output=folder)
    assert "\n" not in str(caught.value)
    (folder / "cells" / "fails" / "seed-0" / "recipe.yaml").write_text((folder / "cells" / "eight" / "seed-0" / "recipe.yaml").read_text())
    mended = write(tmp_path, configurations={"fails": {"convert.reduction": 2}})
    assert len(compare(mended, output=folder).failed) == 1
    assert not (folder / "cells" / "fails" / "seed-0" / "recipe.yaml").exists()


def test_cells_in_other_hands_are_left_to_them(tmp_path, monkeypatch):
    path, said = write(tmp_path, configurations={"a": {}}), []
    monkeypatch.setattr(comparison.Measurer, "measure_teacher", lambda self: None)
    with claimed(tmp_path / "out" / "locks" / "a, 0") as mine:
        assert mine
        results = compare(path, output=tmp_path / "out", say=said.append)
    assert results.rows[1].cells[0].state == "not begun"
    assert any("left to other processes: a, seed 0" in line for line in said)
    with claimed(tmp_path / "out" / "locks" / "a, 0") as mine:
        assert mine


def test_only_and_what_the_command_line_refuses(done, tmp_path, monkeypatch):
    path, folder, _ = done

    def error(*arguments):
        result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "no configuration 'nine'; there are: eight, fails" in error(path, "-o", folder, "--only", "nine")
    assert "not the folder of a finished run: it has no recipe.yaml" in error(folder, folder / "cells")
    assert "no study" in error("nothing-of-the-kind")
    assert "nothing was compared there" in error(path, "-o", folder / "else", "--table")
    assert "is a file" in error(path, "-o", path)
    assert "cannot be written: No such file or directory; choose another folder" in error(path, "-o", "/proc/nowhere")
    assert "a run is given twice" in error(folder / "cells/eight/seed-0", folder / "cells/eight/seed-0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo-dit").mkdir(parents=True)
    assert "runs/demo-dit is not the folder of a finished run: it has no recipe.yaml" in error("demo-dit")
    assert "runs/demo-mm-dit does not exist yet: `edit-compile distill demo-mm-dit` makes it" in error("demo-dit", "demo-mm-dit")


@pytest.mark.parametrize(
    ("raised", "said"),
    [(KeyboardInterrupt(), "stopped"), (ec.Interrupted("stopped at step 3"), "stopped at step 3")],
    ids=["measuring", "training"],
)
def test_an_interrupted_comparison_says_how_to_continue(monkeypatch, raised, said):
    def stops(*args, **kwargs):
        raise raised

    monkeypatch.setattr(comparison.Request, "run", stops)
    for options in (("study.yaml", "--only", "two words", "-o", "out"), ("one", "two", "--samples", "500", "--latency", "64", "-o", "out")):
        command = shlex.join(["edit-compile", "--import", "json", "compare", *options]).replace("--latency 64", "--latency 64x64")
        found = CliRunner().invoke(main, shlex.split(command)[1:])
        assert (found.exit_code, found.stderr) == (130, f"{said}. To continue: {command}\n")
    found = CliRunner().invoke(main, ["compare", "one", "two", "--table", "--samples", "3"])
    assert (found.exit_code, "have no effect" in found.stderr) == (2, True)


def test_options_without_effect_are_refused(tmp_path):
    path = write(tmp_path, configurations={"a": {}})
    with pytest.raises(ec.StudyError, match="samples and latency are for runs"):
        compare(path, samples=3)
    with pytest.raises(ec.StudyError, match="only: it selects configurations of a study"):
        compare(tmp_path, tmp_path, only=["a"])


def test_what_the_teacher_drew_must_be_readable(tmp_path):
    """Without it a student would be compared with itself: the best number possible."""
    recipe = load_recipe("demo-dit")
    measurer = Measurer("demo/dit", recipe, Measures(samples=2), None, (), tmp_path / "teacher", tmp_path / "lock")
    measures = {kind: Measurement(settings=settings) for kind, settings in measurer.wanted().items()}
    measured = Measurements(model=measurer.teacher_identity, measures=measures)
    assert not measured.lacks(measurer.wanted())
    Drawn(("a",), (np.zeros((2, 2, 3), np.float32),)).save(tmp_path / "teacher", measured.model)
    assert not measurer._lacks_drawn(tmp_path / "teacher", measured)
    (tmp_path / "teacher" / "drawn.safetensors").write_bytes(b"damaged")
    assert measurer._lacks_drawn(tmp_path / "teacher", measured)
    with pytest.raises(ec.StudyError, match="what the teacher drew cannot be read; remove the folder"):
        measurer._with_drawn_demo(tmp_path / "student", measured, None)


def test_a_run_that_fails_is_a_row_that_says_why(tmp_path):
    """A damaged result, and a base model that is gone: neither ends the comparison of the others."""
    measurer = Measurer("demo/dit", load_recipe("demo-dit"), Measures(), None, (), tmp_path / "teacher", tmp_path / "lock")
    comparing = comparison.RunComparison([], comparison.Request(()), print)
    (tmp_path / "result.json").write_text("{}")
    row = comparing._row("damaged", tmp_path, measurer)
    assert (row.cells[0].state, row.numbers) == ("failed", {})
    assert "result.json cannot be read (KeyError: 'held_out_error'): damaged, or of another version" in row.cells[0].error
    (tmp_path / "result.json").unlink()
    measurer._of_conversion = lambda: [("parameters", {}, lambda subject, settings: ec.load_model(str(tmp_path / "gone")))]
    assert "gone does not exist" in comparing._row("gone", tmp_path, measurer).cells[0].error


@pytest.mark.slow
def test_a_cell_goes_on_where_it_was(done, tmp_path, monkeypatch):
    """Stopped within a cell, a rerun ends with the student that an undisturbed one has."""
    _, folder, _ = done
    path = write(tmp_path, configurations={"eight": {"convert.reduction": 8}}, untrained=True)

    class Stopped(BaseException):
        pass

    def stop(row):
        if row["phase"] == "stage 0":
            raise Stopped

    monkeypatch.setattr(comparison, "distill", partial(distill, report=stop))
    with pytest.raises(Stopped):
        compare(path, output=tmp_path / "out")
    cell = Path("cells", "eight", "seed-0")
    assert list((tmp_path / "out" / cell / "checkpoints").iterdir())
    phases = []
    monkeypatch.setattr(comparison, "distill", partial(distill, report=lambda row: phases.append(row["phase"])))
    _, untrained, eight = compare(path, output=tmp_path / "out").rows
    assert phases == ["stage 0", "stage 0"]
    errors = [json.loads((place / cell / "result.json").read_text())["held_out_error"] for place in (folder, tmp_path / "out")]
    assert errors[0] == errors[1]
    assert untrained.title == "eight, untrained"
    assert untrained.numbers["error.after"] == eight.numbers["error.before"]
    assert {"adherence.shape", "frechet.teacher"} <= untrained.numbers.keys()


@pytest.mark.slow
def test_runs_that_are_there(done, tmp_path):
    _, folder, _ = done
    first, second = (shutil.copytree(folder / "cells" / "eight" / "seed-0", tmp_path / name) for name in ("first", "second"))
    (second / "measured.json").unlink()
    result = CliRunner().invoke(main, ["compare", str(first), str(second), "-o", str(tmp_path / "out"), "--samples", "3"])
    assert result.exit_code == 0, result.stderr
    results = read_results(tmp_path / "out")
    assert [row.title for row in results.rows] == ["teacher", "first", "second"]
    for run, row in zip((first, second), results.rows[1:], strict=True):
        assert row.numbers["error.after"].median == read_measured(run, identity_of_run(run)).measures["error"].values["after"]
        assert {"frechet.real", "adherence.shape", "flops.32 x 32"} <= row.numbers.keys()
    assert results.rows[1].numbers == results.rows[2].numbers
    assert size_of(tmp_path / "out" / "gallery.png")[0] > 3 * 160


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # trained norms are in float32: right, but not fused
def test_any_model_can_be_studied(tmp_path):
    """A pipeline that is no demo: what cannot be measured is a dash with a reason, and the gallery is the recipe's own."""
    pipelines.PIPELINES["sd3"]().save_pretrained(tmp_path / "pipeline")
    data_files.folder_of(tmp_path / "images", [(48, 48)] * 4)
    stage = {"resolution": 48, "steps": 2, "global_batch_size": 2}
    validation = {"samples": 2, "batch_size": 2, "timestep_bins": 1}
    data = {"kind": "images", "path": str(tmp_path / "images")}
    recipe = {"model": str(tmp_path / "pipeline"), "data": data, "stages": [stage], "validation": validation, "samples": {"steps": 2}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    measure = {"flops": [48, [32, 64]], "gallery": 2}
    content = {"recipe": "own.yaml", "set": {}, "configurations": {"two": {"convert.reduction": 2}}, "budget": {"seconds": 0.1}}
    path = write(tmp_path, **content, measure=measure, latency={"sizes": [48], "runs": 3})
    results = compare(path, output=tmp_path / "out")
    teacher, two = results.rows
    assert two.cells[0].state == "finished", two.cells[0].error
    assert "demo models only" in two.reasons["adherence"]
    assert {"flops.48 x 48", "flops.32 x 64.ratio", "latency.48 x 48.ratio", "parameters.added"} <= two.numbers.keys()
    assert two.numbers["latency.48 x 48.ratio.low"].median <= two.numbers["latency.48 x 48.ratio"].median
    assert not any(name.startswith(("adherence", "frechet")) for name in two.numbers)
    assert teacher.numbers["flops.48 x 48"].median > 0
    assert size_of(tmp_path / "out" / "gallery.png")[1] > 2 * 160
    assert "adherence: is measured of the demo models only" in (tmp_path / "out" / "results.md").read_text()
