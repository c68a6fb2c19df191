"""YAML as users write it, and as nobody should: one line each, soon."""

from __future__ import annotations

import pytest

from edit_compile.yaml_text import parse_with_node, parse_yaml, read_text

BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "^is not valid YAML: while parsing"),
        ("? [a]\n: b", "^is not valid YAML: while constructing"),
        ("!!python/object:os.system x", "^is not valid YAML: could not determine a constructor"),
        ("a\x00b", "^is not valid YAML: "),
        ("seed: 2001-13-45", "^cannot be read: month must be"),
        ("!!bool foo", "^cannot be read: KeyError"),
        ("!!timestamp foo", "^cannot be read: AttributeError"),
        ("!!int foo", "^cannot be read: invalid literal"),
        (BOMB, "^cannot be read: with its aliases it has more than 100,000 values"),
        ("&a [*a]", "^cannot be read: an alias is inside of what it stands for"),
        ("a: &b {c: {d: *b}}", "^cannot be read: an alias is inside"),
        ("[" * 60 + "]" * 60, "^cannot be read: it is nested more than 50 levels deep"),
        ("[" * 2000, "^cannot be read: it is nested"),
        ("x" * 1_000_001, "^cannot be read: it has more than 1,000,000 characters"),
    ],
    ids=lambda value: value[:20],
)
def test_what_cannot_be_read_is_said_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)


def test_what_can_be_read():
    content, node = parse_with_node("a: &x [1, {b: null}]\nc: [*x, *x]\n")
    assert content == {"a": [1, {"b": None}], "c": [[1, {"b": None}]] * 2}
    assert [key.start_mark.line for key, _ in node.value] == [0, 1]
    assert parse_yaml("") is None


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"a: \xff")
    for name in ("latin", "nothing", "."):
        with pytest.raises(ValueError, match=r"^cannot be read: "):
            read_text(tmp_path / name)
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_text(tmp_path / "text") == "a: 1"
