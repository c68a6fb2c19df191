"""Writing at once or not at all."""

from __future__ import annotations

import pytest

from edit_compile.files import replacing, write_text


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
