"""Copying definitions, with all that they use, from modules into one file that stands alone."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

from torch import nn

from edit_compile.errors import CheckpointError

_IGNORED = re.compile(r" +# (type: ignore|noqa)[^\n]*")  # for tools that check this package
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__", "__call__")
Key = tuple[str, str]  # a module and a name in it


@cache
def _source(module: str) -> tuple[list[bytes], dict[str, ast.stmt]]:
    """Return a module's lines, and by name the top-level statement that binds it.

    Raises:
        CheckpointError: it has no file, as a notebook's has none.
    """
    try:
        text = inspect.getsource(importlib.import_module(module))
    except (OSError, TypeError) as error:
        raise CheckpointError(f"{module} has no file whose code could be copied: {error}; put what it defines into a module") from error
    bound: dict[str, ast.stmt] = {}
    for statement in ast.parse(text).body:
        for name in _bound_by(statement):
            bound.setdefault(name, statement)
    return text.encode().splitlines(), bound


def _bound_by(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        yield from (node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


@dataclass
class _Piece:
    """A definition that is copied.

    Attributes:
        statement: as it stands in its module.
        uses: by the names in it, what they stand for: another definition, or an import.
        eager: what must be defined before it.
    """

    statement: ast.stmt
    uses: dict[str, Key | str] = field(default_factory=dict)
    eager: set[str] = field(default_factory=set)


@dataclass
class SourceExport:
    """Gathers definitions for one file.

    Attributes:
        owned: the packages whose source is copied; all others are imported.
        attributes: names that the copied code looks up in objects: classes keep the methods that have them.
    """

    owned: frozenset[str]
    attributes: set[str] = field(default_factory=lambda: {"forward"})
    _imports: dict[str, str] = field(default_factory=dict)
    _pieces: dict[Key, _Piece] = field(default_factory=dict)
    _classes: dict[type, set[str]] = field(default_factory=dict)
    _called: set[type] = field(default_factory=set)
    _modules: set[type] = field(default_factory=set)

    def name_of(self, value: Any) -> str:
        """Add a function or a class, and return its name in the file."""
        if isinstance(value, ModuleType):
            return self._imported(f"import {value.__name__}", value.__name__)
        module, name = value.__module__, value.__qualname__
        if not self._is_owned(module):
            return self._imported(f"from {module} import {name}", name)
        self._add((module, name))
        return self._written((module, name))

    def add_module_class(self, kind: type[nn.Module]) -> str:
        """Add the class of a module that is made without its constructor, and return its name."""
        self._modules.add(kind)
        return self.name_of(kind)

    def add_constructed(self, kind: type) -> None:
        """Add the class of an object that is made by its constructor."""
        self.name_of(kind)
        self._called.add(kind)

    def add_code(self, tree: ast.AST) -> None:
        """Take note of what code looks up in objects."""
        self.attributes |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    def text(self) -> str:
        """Write imports and definitions, each after what it needs to be executed."""
        self.settle()
        written: dict[Key, str] = {}
        begun: set[Key] = set()

        def write(key: Key) -> None:
            if key not in begun and self._is_kept(key):
                begun.add(key)
                for used in self._needs(key):
                    write(used)
                written[key] = self._piece_text(key)

        for key in list(self._pieces):
            write(key)
        definitions = list(dict.fromkeys(written.values()))  # a statement may bind several names
        return _IGNORED.sub("", "\n\n\n".join([self._import_lines(), *definitions]))

    def settle(self) -> None:
        """Find out which methods of the classes are needed, and what these use."""
        while self._grow():
            pass

    def add_import(self, line: str) -> None:
        """Add `import MODULE` or `from MODULE import NAME`."""
        self._imported(line, line.split()[-1])

    def _import_lines(self) -> str:
        plain = sorted(line for line in self._imports.values() if line.startswith("import "))
        named: dict[str, set[str]] = {}
        for line in self._imports.values():
            if line.startswith("from "):
                module, _, names = line.removeprefix("from ").partition(" import ")
                named.setdefault(module, set()).add(names)
        return "\n".join([*plain, *(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items()))])

    def _needs(self, key: Key) -> list[Key]:
        """List the definitions that one uses, first those without which it cannot be executed."""
        piece = self._pieces[key]
        kind = self._class_at(key)
        used = [each for each in piece.uses.values() if not isinstance(each, str)]
        eager = [each for name, each in piece.uses.items() if name in piece.eager and not isinstance(each, str)]
        return [*(_key(base) for base in (kind.__mro__[1:] if kind else ()) if base in self._classes), *eager, *used]

    # -------------------------------------------------------------- gathering

    def _is_owned(self, module: str) -> bool:
        return module.partition(".")[0] in self.owned

    def _imported(self, line: str, name: str) -> str:
        if self._imports.setdefault(name, line) != line:
            raise CheckpointError(f"a file that stands alone would need both `{self._imports[name]}` and `{line}`")
        return name

    def _written(self, key: Key) -> str:
        """Return the name that a definition has in the file: its own, numbered if others have it."""
        same = [module for module, name in self._pieces if name == key[1]]
        number = same.index(key[0])
        return key[1] if number == 0 and key[1] not in self._imports else f"{key[1]}_{number + 1}"

    def _add(self, key: Key) -> None:
        if key in self._pieces:
            return
        module, name = key
        statement = _source(module)[1].get(name)
        if statement is None:
            raise CheckpointError(f"{module}.{name} is not defined at the top of its module, and cannot be copied into a file of its own")
        self._pieces[key] = _Piece(statement)
        value = getattr(importlib.import_module(module), name, None)
        if isinstance(value, type) and isinstance(statement, ast.ClassDef):
            self._classes[value] = set()
            for base in value.__bases__:
                if self._is_owned(base.__module__):
                    self._add((base.__module__, base.__qualname__))
            has_fields = hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__")
            fields = [node for node in statement.body if isinstance(node, ast.AnnAssign)] if has_fields else []
            self._use(key, [*statement.decorator_list, *fields], eager=True)
        else:
            self._use(key, [statement], eager=not isinstance(statement, ast.FunctionDef))

    def _use(self, key: Key, nodes: list[Any], *, eager: bool = False) -> None:
        """Add what nodes of a definition use."""
        piece = self._pieces[key]
        for node in nodes:
            self.add_code(node)
            local = _local_names(node)
            called = {each.func.id for each in ast.walk(node) if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)}
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom | ast.Import) and inner is not node:
                    raise CheckpointError(f"{key[0]}.{key[1]} imports inside of a function, and cannot be copied into a file of its own")
                if not isinstance(inner, ast.Name) or inner.id in local or not isinstance(inner.ctx, ast.Load):
                    continue
                found = self._resolve(key[0], inner.id)
                if found is None:
                    continue
                piece.uses[inner.id] = found
                if eager:
                    piece.eager.add(inner.id)
                value = getattr(importlib.import_module(found[0]), found[1], None) if not isinstance(found, str) else None
                if inner.id in called and isinstance(value, type):
                    self._called.add(value)

    def _resolve(self, module: str, name: str) -> Key | str | None:
        """Find what a name in a module stands for: a definition that is copied, or what is imported."""
        statement = _source(module)[1].get(name)
        if statement is None and (hasattr(builtins, name) or not hasattr(importlib.import_module(module), name)):
            return None  # a builtin, or one of a type checker's imports: annotations are not evaluated
        if isinstance(statement, ast.Import | ast.ImportFrom):
            alias = next(each for each in statement.names if (each.asname or each.name).partition(".")[0] == name)
            as_name = f" as {alias.asname}" if alias.asname else ""
            if isinstance(statement, ast.Import):
                return self._imported(f"import {alias.name}{as_name}", name)
            if not self._is_owned(statement.module or ""):
                return self._imported(f"from {statement.module} import {alias.name}{as_name}", name)
            return self._resolve(str(statement.module), alias.name)
        self._add((module, name))
        return module, name

    def _grow(self) -> bool:
        """Keep the methods of classes that have become needed; returns whether there were any."""
        grown = False
        for kind in [*self._classes]:
            if not (kind in self._called or kind in self._modules or hasattr(kind, "_fields")):
                continue
            for name in sorted(self.attributes.difference(_CONSTRUCTORS) | (set(_CONSTRUCTORS) if kind in self._called else set())):
                grown |= self._keep(kind, name)
        return grown

    def _keep(self, kind: type, name: str) -> bool:
        """Keep a method of a class, or of that base which has it; and of the next one too, if it calls that."""
        grown = False
        for owner in kind.__mro__:
            if name not in vars(owner):
                continue
            if owner not in self._classes:
                return grown
            nodes = _members(self._class_statement(owner), name)
            if nodes and name not in self._classes[owner]:
                self._classes[owner].add(name)
                self._use(_key(owner), nodes)
                grown = True
            if not any(isinstance(each, ast.Name) and each.id == "super" for node in nodes for each in ast.walk(node)):
                return grown
        return grown

    def _class_statement(self, kind: type) -> ast.ClassDef:
        statement = self._pieces[_key(kind)].statement
        assert isinstance(statement, ast.ClassDef)
        return statement

    def _class_at(self, key: Key) -> type | None:
        return next((kind for kind in self._classes if _key(kind) == key), None)

    # -------------------------------------------------------------- writing

    def _is_kept(self, key: Key) -> bool:
        """Say whether a definition is written: a class that only passes on what its bases have is not."""
        kind = self._class_at(key)
        if kind is None:
            return True
        return bool(self._classes[kind]) or kind in self._called or kind in self._modules or issubclass(kind, tuple | BaseException)

    def _piece_text(self, key: Key) -> str:
        lines, _ = _source(key[0])
        piece = self._pieces[key]
        here = {name: self._written(used) for name, used in piece.uses.items() if not isinstance(used, str)}
        names = {name: written for name, written in here.items() if written != name}
        statement = piece.statement
        if not isinstance(statement, ast.ClassDef):
            names |= {name: self._written((key[0], name)) for name in _bound_by(statement) if (key[0], name) in self._pieces}
            return re.sub(rf"^def {key[1]}\b", f"def {self._written(key)}", _lines_of(lines, statement, names), flags=re.M)
        kind = self._class_at(key)
        assert kind is not None
        decorators = [f"@{ast.unparse(node)}" for node in statement.decorator_list]
        bases = ", ".join(dict.fromkeys(self._bases(kind)))
        head = [*decorators, f"class {self._written(key)}({bases}):" if bases else f"class {self._written(key)}:"]
        body = [_lines_of(lines, node, names) for node in statement.body if self._is_in_class(kind, node)]
        return "\n".join([*head, "\n\n".join(_joined(body)) if body else "    pass"])

    def _is_in_class(self, kind: type, node: ast.stmt) -> bool:
        if isinstance(node, ast.Expr):
            return True  # its docstring
        if isinstance(node, ast.AnnAssign) and (hasattr(kind, "_fields") or hasattr(kind, "__dataclass_fields__")):
            return True
        names = {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set(_bound_by(node))
        return bool(names & self._classes[kind])

    def _bases(self, kind: type) -> Iterator[str]:
        for base in kind.__bases__:
            if base in self._classes and self._is_kept(_key(base)):
                yield self._written(_key(base))
            elif base in self._classes:
                yield from self._bases(base)
            elif base is tuple:
                yield self._imported("from typing import NamedTuple", "NamedTuple")
            elif base.__module__ == "builtins" and base is not object:
                yield base.__name__
            elif getattr(nn, base.__name__, None) is base:
                self._imported("from torch import nn", "nn")
                yield f"nn.{base.__name__}"
            elif base.__module__ not in ("builtins", "abc", "typing"):
                yield self._imported(f"from {base.__module__} import {base.__qualname__}", base.__qualname__)


def _key(kind: type) -> Key:
    return kind.__module__, kind.__qualname__


def _members(statement: ast.ClassDef, name: str) -> list[ast.stmt]:
    """Return the statements of a class's body that define a name."""
    return [
        node
        for node in statement.body
        if (isinstance(node, ast.FunctionDef) and node.name == name) or (not isinstance(node, ast.FunctionDef) and name in _bound_by(node))
    ]


def _local_names(node: ast.AST) -> set[str]:
    """Return the names that are bound inside of functions."""
    found: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg):
            found.add(inner.arg)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            found.add(inner.id)
    return found


def _lines_of(lines: list[bytes], node: ast.stmt, names: dict[str, str]) -> str:
    """Return a statement's lines, decorators included, with names replaced."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    found = lines[first - 1 : node.end_lineno]
    replaced = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name) and inner.id in names]
    for inner in sorted(replaced, key=lambda each: -each.col_offset):  # from the right: what is left of one stays in its place
        line, start = found[inner.lineno - first], inner.col_offset
        found[inner.lineno - first] = line[:start] + names[inner.id].encode() + line[start + len(inner.id.encode()) :]
    return b"\n".join(found).decode()


def _joined(body: list[str]) -> Iterator[str]:
    """Join the lines of attributes that follow each other."""
    together: list[str] = []
    for part in body:
        if part.lstrip().startswith(("def ", "@", "class ", '"""')):
            if together:
                yield "\n".join(together)
            together = []
            yield part
        else:
            together.append(part)
    if together:
        yield "\n".join(together)


def literal(value: Any, name_of: Callable[[Any], str], where: str) -> str:
    """Write a value as source.

    Raises:
        CheckpointError: it is neither a number, a word, nothing, a function, nor a collection of these.
    """
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else f"float({str(value)!r})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{name_of(type(value))}({', '.join(literal(each, name_of, where) for each in value)})"
    if isinstance(value, tuple):
        return f"({', '.join(literal(each, name_of, where) for each in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(literal(each, name_of, where) for each in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k, name_of, where)}: {literal(v, name_of, where)}" for k, v in value.items()) + "}"
    if inspect.isfunction(value) and value.__name__.isidentifier():
        return name_of(value)
    raise CheckpointError(f"{where} holds a {type(value).__name__}, which cannot be written as source")
