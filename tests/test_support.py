"""The support matrix: a sample of it is held here; `make support` tries all of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import support  # noqa: E402
from tiny_models import CONFIGURATIONS  # noqa: E402
from tiny_models.base import EITHER, KEEP, REWRITE  # noqa: E402

SAMPLE = {  # one of a kind each, and the last stage that there is time for
    "PixArtTransformer2DModel": "bf16",
    "SD3Transformer2DModel": "compile",
    "Flux2Transformer2DModel": "second size",
    "QwenImageTransformer2DModel": "second size",
    "SanaTransformer2DModel": "compile",
    "WanTransformer3DModel": "second size",
    "timm vit_tiny_patch16_224/registers": "plan",
}


def row_of(name: str, until: str) -> dict[str, Any]:
    row: dict[str, Any] = {"stages": {}, "seconds": {}}
    support.Trial(CONFIGURATIONS[name], row, until, "eager").run()
    return row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_goes_through_all_stages(name: str) -> None:
    row = row_of(name, SAMPLE[name])
    last = SAMPLE[name] if row["rewritten"] else "original"
    assert list(row["stages"]) == list(support.STAGES[: support.STAGES.index(last) + 1])


@pytest.mark.filterwarnings("ignore")
def test_a_plan_other_than_declared_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "SanaTransformer2DModel"
    monkeypatch.setitem(CONFIGURATIONS[name].sites, "*.attn1", REWRITE)
    with pytest.raises(support.Wrong, match=r"^plan: transformer_blocks\.0\.attn1 keep .*already linear"):
        row_of(name, "plan")


def test_every_configuration_is_of_a_class_that_there_is() -> None:
    known = {*dir(diffusers)}
    for name, one in CONFIGURATIONS.items():
        assert name.partition("/")[0] in known or name.startswith(("timm ", "transformers ")), name
        assert one.sizes[0] != one.sizes[1], name
        assert all(word.partition(":")[0] in (REWRITE, KEEP, EITHER) for word in one.sites.values()), name


def test_rows_are_written_and_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "support.md"
    arguments = ["DiTTransformer2DModel", "--until", "original", "--rows", str(rows), "--write", str(page)]
    assert support.main(arguments) == 0
    assert support.main(arguments) == 0
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert row["name"] == "DiTTransformer2DModel"
    assert row["stages"] == {"original": "yes"}
    assert "1 of 1 right" in capsys.readouterr().out
    assert "| DiTTransformer2DModel | yes, up to original |" in page.read_text()
    assert "| FluxTransformer2DModel | not run |" in page.read_text()


@pytest.mark.slow
def test_a_configuration_that_takes_too_long_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert support.main(["DiTTransformer", "--limit", "0.01", "--rows", str(tmp_path / "rows.jsonl")]) == 1
    assert "no answer in 0 s" in capsys.readouterr().out
