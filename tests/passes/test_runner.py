"""The runner: every pass in order, each with a record of what it did."""

from __future__ import annotations

import logging

import pytest

import toy
from edit_compile.config import LinearizeConfig
from edit_compile.passes.analysis import PASSES, Analysis, analyse
from edit_compile.passes.capture import capture


def test_every_pass_runs_in_order_and_is_recorded(caplog):
    captured = capture(toy.Toy(blocks=1, by_hand=True), toy.inputs())
    with caplog.at_level(logging.DEBUG, "edit_compile"):
        analysis = analyse(captured, LinearizeConfig())
    assert [record.name for record in analysis.records] == [name for name, _ in PASSES]
    assert [record.found for record in analysis.records] == [1, 1, 1, 1]
    assert analysis.records[-1].nodes == len(captured.graph.nodes)
    assert all(record.milliseconds > 0 for record in analysis.records)
    assert [site.path for site in analysis.sites] == ["blocks.0.attn"]
    assert analysis.classified.pictures == {"x"}
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.name == "edit_compile.passes.analysis"] == [name for name, _ in PASSES]


def test_what_no_pass_has_found_yet_is_not_there():
    with pytest.raises(AssertionError, match="classify_tokens has not run"):
        _ = Analysis(None, LinearizeConfig()).classified
