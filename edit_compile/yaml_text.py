"""YAML as users write it: what is wrong with a text is said in one line, and hostile ones take neither time nor memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_CHARACTERS, _NODES, _DEPTH = 1_000_000, 100_000, 50


def parse_yaml(text: str) -> Any:
    """Read a text.

    Raises:
        ValueError: it cannot be read; a predicate in one line, such as "is not valid YAML: ...".
    """
    return parse_with_node(text)[0]


def parse_with_node(text: str) -> tuple[Any, yaml.Node | None]:
    """Read a text; returns also its tree, whose nodes know their lines.

    Raises:
        ValueError: as `parse_yaml`.
    """
    if len(text) > _CHARACTERS:
        raise ValueError(f"cannot be read: it has more than {_CHARACTERS:,} characters")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and _size(node, {}, ()) > _NODES:
            raise ValueError(f"with its aliases it has more than {_NODES:,} values")
        return yaml.safe_load(text), node
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"cannot be read: it is nested more than {_DEPTH} levels deep") from None
    except Exception as error:  # constructors raise whatever their conversions do: of !!bool what is none, of dates that do not exist
        said = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise ValueError(f"cannot be read: {' '.join(said.split())}") from None


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ValueError: it cannot be read; a predicate in one line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(4 * _CHARACTERS + 1)
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}") from None


def _size(node: yaml.Node, known: dict[yaml.Node, int], above: tuple[yaml.Node, ...]) -> int:
    """Count the values of a tree, each as often as aliases repeat it."""
    if node in above:
        raise ValueError("an alias is inside of what it stands for")
    if len(above) > _DEPTH:
        raise RecursionError
    if node not in known:
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = inside if isinstance(node, yaml.CollectionNode) else ()
        known[node] = 1 + sum(_size(part, known, (*above, node)) for part in inside)
    return known[node]
