"""Find out where a call's grid of image tokens can be read: sizes of inputs, numbers among them, position ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from edit_compile.errors import GridError
from edit_compile.ir.plan import Given, GridSource, PositionIds, Refusal, SitePlan, SizesOfInputs
from edit_compile.ir.plan_data import SizeAt
from edit_compile.ir.position_ids import MAX_ID_COLUMNS, grids_of_ids, roles_in_ids
from edit_compile.ir.size_expressions import evaluator, symbols_in
from edit_compile.ir.tokens import Grid, TokenKind, TokenLayout
from edit_compile.passes.axes.algebra import expression, hint, sources_of
from edit_compile.passes.capture import Capture
from edit_compile.passes.classify_tokens import TokenMap
from edit_compile.passes.graph_walk import shape_of
from edit_compile.passes.plan_sites import Candidate

MAX_NUMBERS = 8  # among which an image's height and width are looked for
PATCHES = (1, 2, 4, 8, 16, 32, 64)  # by how much a height in pixels may exceed one in tokens


@dataclass(frozen=True)
class _Numbers:
    """An image's sizes among the numbers of the inputs.

    Attributes:
        expressions: the grid, over number symbols.
        sizes: in the example.
        images: the sequence that holds them, or, if there are several images, the sequence of such sequences.
        several: whether there are several images, of which this is the first.
    """

    expressions: tuple[str, ...]
    sizes: tuple[int, ...]
    images: str | None
    several: bool = False


class GridFinder:
    """What is known of a model's inputs, and where its sites' grids can be read in them.

    Attributes:
        symbols: where the value of each size symbol is read.
    """

    def __init__(self, captured: Capture, tokens: TokenMap, inputs: Mapping[str, Any]) -> None:
        self.captured, self.tokens = captured, tokens
        self.leaves = {name + pytree.keystr(keys): leaf for name, value in inputs.items() for keys, leaf in _leaves(value)}
        numbers = [path for path, leaf in self.leaves.items() if type(leaf) is int and leaf > 0]
        self.numbers = {path: f"n{i}" for i, path in enumerate(numbers)}
        self.symbols: dict[str, SizeAt] = {symbol: (path, None) for path, symbol in self.numbers.items()}
        self.symbols |= self._sizes()

    def _sizes(self) -> dict[str, SizeAt]:
        """Find the inputs, tensors' dimensions or numbers, that are a symbol of the graph."""
        found: dict[str, SizeAt] = {}
        for node in self._inputs():
            name, value = self.captured.source(node).name, node.meta.get("val")
            sizes: Sequence[Any] = value.shape if isinstance(value, Tensor) else [value] if isinstance(value, torch.SymInt) else []
            for dim, size in enumerate(sizes):
                if name in self.leaves and expression(size).isidentifier():
                    found.setdefault(expression(size), (name, dim if isinstance(value, Tensor) else None))
        return found

    def _inputs(self) -> Iterator[fx.Node]:
        for node in self.captured.graph.nodes:
            if node.op == "placeholder" and self.captured.source(node).kind == "input":
                yield node

    def knows(self, expressions: Sequence[str]) -> bool:
        """Say whether expressions can be evaluated in a call."""
        try:
            for each in expressions:
                evaluator(each, set(self.symbols))
        except GridError:
            return False
        return True

    # -------------------------------------------------------------- before sites are compiled

    def with_known_grid(self, candidate: Candidate) -> Candidate:
        """Give a candidate the grid that its inputs tell, and drop one whose expressions cannot be evaluated in a call."""
        plan = candidate.plan
        if not candidate.choices:
            return candidate
        grid, sizes = plan.grid, plan.grid_sizes
        if grid is not None and not self.knows(grid.sizes):
            grid, sizes = None, ()
        if grid is None or self._depends_on_numbers(grid):
            numbers = self._numbers(image_tokens(plan))
            if numbers is not None and not numbers.several and (grid is None or numbers.sizes == sizes) and self._ids(plan) is None:
                grid, sizes = Grid(numbers.expressions), numbers.sizes
        if grid is None:
            sizes = self._sizes_in_ids(plan)
        return replace(candidate, plan=plan.model_copy(update={"grid": grid, "grid_sizes": sizes}))

    def _depends_on_numbers(self, grid: Grid) -> bool:
        """Say whether a grid follows from numbers among the inputs, or is as constant as they were in the capture."""
        names = set().union(*(symbols_in(size) for size in grid.sizes))
        return not names or any(self.symbols[name][1] is None for name in names)

    def _sizes_in_ids(self, plan: SitePlan) -> tuple[int, ...]:
        ids = self._ids(plan)
        grids = self._read(ids, plan) if ids is not None else ()
        return grids[0] if len(grids) == 1 and prod(grids[0]) == image_tokens(plan) else ()

    # -------------------------------------------------------------- after that

    def source(self, sites: Sequence[SitePlan]) -> GridSource:
        """Say where the model's finest grid comes from in a call."""
        rewritten = [site for site in sites if site.rewritten]
        with_grid = [site for site in rewritten if site.grid is not None]
        if with_grid:
            finest = max(with_grid, key=lambda site: (prod(site.grid_sizes), -len(site.grid_sizes)))
            assert finest.grid is not None
            needed = {name for site in with_grid if site.grid is not None for size in site.grid.sizes for name in symbols_in(size)}
            one = all(site.grid == finest.grid for site in with_grid)
            source = self._of_sizes(finest.grid.sizes, needed, self._sequence_of(needed) if one else None)
            return source.model_copy(update={"samples": tuple(self._samples({site.grid for site in with_grid if site.grid is not None}))})
        if not rewritten:
            return Given()
        site = max(rewritten, key=image_tokens)
        if (ids := self._ids(site)) is not None:
            return ids
        numbers = self._numbers(image_tokens(site))
        if numbers is not None:
            needed = {name for size in numbers.expressions for name in symbols_in(size)}
            return self._of_sizes(numbers.expressions, needed, numbers.images)
        return self._given(site)

    def _of_sizes(self, expressions: tuple[str, ...], needed: set[str], images: str | None) -> SizesOfInputs:
        return SizesOfInputs(expressions=expressions, symbols={name: self.symbols[name] for name in sorted(needed)}, images=images)

    def _samples(self, grids: Set[Grid]) -> Iterator[tuple[str, ...]]:
        """Yield the groups of inputs that are the images of one batch: the positions of all lie along one axis, each has own sizes."""
        axes = {axis for found in self.tokens.axes.values() if isinstance(found, tuple) for axis in found if axis and axis[0].composed_of}
        for grid in grids:
            sources = sources_of(axis for axis in axes if self.tokens.grid(axis) == grid) & self.tokens.image_inputs
            read = {self.symbols[name] for size in grid.sizes for name in symbols_in(size)}
            paths = {path for path, dim in read if dim is not None}
            dims = {dim for _, dim in read if dim is not None}
            beside = {self.captured.source(node).name for node in self._inputs() if node.name in sources and self._is_beside(node, read)}
            group = self._with_lists(paths | beside) if len(paths) == 1 and dims else ()
            if len(group) > 1 or not paths >= set(group):
                yield group

    def _is_beside(self, node: fx.Node, read: Set[SizeAt]) -> bool:
        """Say whether an input has the example's sizes of the inputs that a grid is read in, though not by the same symbols."""
        name, shape = self.captured.source(node).name, shape_of(node) or ()
        sizes = {dim: hint(leaf.shape[dim]) for path, dim in read if dim is not None and (leaf := self.leaves[path]) is not None}
        if name not in self.leaves or not sizes or len(shape) <= max(sizes) or any(hint(shape[dim]) != size for dim, size in sizes.items()):
            return False
        return all(self.symbols.get(expression(shape[dim]), (name, dim)) == (name, dim) for dim in sizes)

    def _with_lists(self, paths: Set[str]) -> tuple[str, ...]:
        """Replace inputs that make up a list by the list: a call's may be longer or shorter than the example's."""
        lists = {path: path.rpartition("[")[0] for path in paths if _in_sequence(path)}
        whole = {each for each in lists.values() if all(path in paths for path in self.leaves if path.startswith(f"{each}["))}
        return tuple(sorted({lists[path] if lists.get(path) in whole else path for path in paths}))

    def _sequence_of(self, symbols: set[str]) -> str | None:
        """Return the path of the sequence that all symbols are numbers of."""
        read = [self.symbols[name] for name in symbols]
        sequences = {path.rpartition("[")[0] if dim is None and _in_sequence(path) else "" for path, dim in read}
        sequence = sequences.pop() if len(sequences) == 1 else ""
        return self._list_of_images(sequence) if sequence else None

    def _list_of_images(self, sequence: str) -> str:
        """Return the sequence around a sequence of one image's sizes if it holds nothing else, so that it lists images, not samples."""
        around = sequence.rpartition("[")[0] if _in_sequence(sequence) else ""
        alone = around and all(path.startswith(f"{sequence}[") for path in self.leaves if path.startswith(f"{around}["))
        return around if alone else sequence

    def _given(self, site: SitePlan) -> Given:
        """Say how many image tokens a stated grid must have, if a call tells; the example's number says nothing of other calls."""
        length = image_length(site)
        if length.isdigit() or not self.knows([length]):
            length = self._counted_by_input(image_tokens(site)) or ""
        return Given(tokens=length, symbols={n: self.symbols[n] for n in symbols_in(length)}) if length else Given()

    def _counted_by_input(self, tokens: int) -> str | None:
        """Find the dimension of an input with the image that counts its tokens, where capture has made a constant of it."""
        for node in self._inputs():
            shape, name = shape_of(node) or (), self.captured.source(node).name
            if node.name in self.tokens.image_inputs and len(shape) == 3 and name in self.leaves and hint(shape[1]) == tokens:
                self.symbols["tokens"] = (name, 1)
                return "tokens"
        return None

    # -------------------------------------------------------------- position ids

    def _ids(self, plan: SitePlan) -> PositionIds | None:
        """Find the input that holds the image tokens' positions, alone or in one table with those of other tokens.

        It has a few numbers for every token, and feeds no Linear. Where the example has values, they must be positions.
        """
        for node in self._inputs():
            name, shape = self.captured.source(node).name, shape_of(node)
            if name not in self.leaves or shape is None or len(shape) not in (2, 3) or _feeds_linear(node):
                continue
            for tokens_last in (False, True):
                by_token, columns = (hint(shape[-1]), hint(shape[-2])) if tokens_last else (hint(shape[-2]), hint(shape[-1]))
                if 2 <= columns <= MAX_ID_COLUMNS:
                    found = self._positions(node, name, plan, by_token, tokens_last)
                    if found is not None:
                        return found
        return None

    def _positions(self, node: fx.Node, name: str, plan: SitePlan, count: int, tokens_last: bool) -> PositionIds | None:
        whole = PositionIds(input=name, tokens_last=tokens_last)
        tables = [whole] if count == image_tokens(plan) else list(self._joint_tables(whole, plan, count))
        ids = self.leaves[name]
        if ids.is_meta:
            return whole if count == image_tokens(plan) and node.name in self.tokens.image_inputs else None
        for table in tables:
            by_token = self._rows(table, plan)
            roles = roles_in_ids(by_token) if self._read(table, plan) else None
            if roles is not None:
                return table.model_copy(update={"rows_and_columns": roles})
        return None

    def _joint_tables(self, table: PositionIds, plan: SitePlan, count: int) -> Iterator[PositionIds]:
        """Yield the ways in which a table may hold the ids of all tokens of a layout."""
        for layout, sizes in ((plan.query_layout, plan.query_sizes), (plan.key_layout, plan.key_sizes)):
            if sum(sizes) == count and sum(s.kind is TokenKind.IMAGE for s in layout.segments) == 1:
                at = _image_at(layout)
                before = " + ".join(s.length for s in layout.segments[:at]) or "0"
                tokens = layout.segments[at].length
                if self.knows([before, tokens]):
                    symbols = {n: self.symbols[n] for n in symbols_in(before) | symbols_in(tokens)}
                    yield table.model_copy(update={"before": before, "tokens": tokens, "symbols": symbols})

    def _rows(self, table: PositionIds, plan: SitePlan) -> Tensor:
        """Cut the image tokens' ids out of a table in the example."""
        ids: Tensor = self.leaves[table.input]
        by_token = ids.transpose(-2, -1) if table.tokens_last else ids
        sizes = plan.query_sizes if sum(plan.query_sizes) == by_token.shape[-2] else plan.key_sizes
        layout = plan.query_layout if sum(plan.query_sizes) == by_token.shape[-2] else plan.key_layout
        start = sum(sizes[: _image_at(layout)]) if table.tokens is not None else 0
        return by_token[..., start : start + image_tokens(plan), :]

    def _read(self, table: PositionIds, plan: SitePlan) -> tuple[tuple[int, ...], ...]:
        if self.leaves[table.input].is_meta:
            return ()
        try:
            return grids_of_ids(self._rows(table, plan), table.input)
        except GridError:
            return ()

    # -------------------------------------------------------------- numbers

    def _numbers(self, tokens: int) -> _Numbers | None:
        """Find the numbers among the inputs whose product is so many tokens: of one image, or summed up over several.

        Numbers of pixels count too. None if there is more than one way.
        """
        for patch in PATCHES:
            found = [*self._of_one(tokens, patch), *self._of_several(tokens, patch)]
            if found:
                return found[0] if len({each.sizes for each in found}) == 1 else None
        return None

    def _of_one(self, tokens: int, patch: int) -> Iterator[_Numbers]:
        for parent, paths in self._sequences().items():
            for count in (2, 3):
                grid = self._grid(paths[-count:], patch)
                if len(paths) >= count and grid is not None and prod(grid) == tokens and (count == 2 or grid[0] > 1):
                    yield _Numbers(self._expressions(paths[-count:], patch), grid, self._list_of_images(parent))
        names = [path for path in self.numbers if not _in_sequence(path)][:MAX_NUMBERS]
        for count in (2, 3):
            for chosen in itertools.combinations(names, count):
                grid = self._grid(chosen, patch)
                if grid is not None and min(grid) > 1 and prod(grid) == tokens:
                    yield _Numbers(self._expressions(chosen, patch), grid, None)

    def _of_several(self, tokens: int, patch: int) -> Iterator[_Numbers]:
        parents: dict[str, list[list[str]]] = {}
        for sequence, paths in self._sequences().items():
            if _in_sequence(sequence):
                parents.setdefault(sequence.rpartition("[")[0], []).append(paths)
        for parent, images in parents.items():
            for count in (2, 3):
                grids = [self._grid(paths[-count:], patch) or () for paths in images if len(paths) >= count]
                whole = len(grids) == len(images) > 1 and all(grids) and sum(map(prod, grids)) == tokens
                if whole and (count == 2 or any(grid[0] > 1 for grid in grids)):
                    yield _Numbers(self._expressions(images[0][-count:], patch), grids[0], parent, several=True)

    def _sequences(self) -> dict[str, list[str]]:
        """List the sequences among the inputs that hold numbers alone, two to four of them: their elements' paths."""
        found: dict[str, list[str]] = {}
        for path, leaf in self.leaves.items():
            if _in_sequence(path):
                found.setdefault(path.rpartition("[")[0], []).append(path if type(leaf) is int and leaf > 0 else "")
        return {parent: paths for parent, paths in found.items() if 2 <= len(paths) <= 4 and all(paths)}

    def _grid(self, paths: Sequence[str], patch: int) -> tuple[int, ...] | None:
        """Return numbers as a grid, height and width in patches; None if these do not divide them."""
        *frames, height, width = (int(self.leaves[path]) for path in paths)
        return None if height % patch or width % patch else (*frames, height // patch, width // patch)

    def _expressions(self, paths: Sequence[str], patch: int) -> tuple[str, ...]:
        *frames, height, width = (self.numbers[path] for path in paths)
        return (*frames, *(size if patch == 1 else f"{size}//{patch}" for size in (height, width)))


def on_grid_of(site: SitePlan, source: GridSource, sites: Sequence[SitePlan]) -> SitePlan:
    """Keep a site whose grid is unknown where it cannot be the model's finest: it has another number of image tokens."""
    if not site.rewritten or site.grid is not None:
        return site
    same = [other for other in sites if other.rewritten and image_tokens(other) == image_tokens(site) and _is_finest(other, source, sites)]
    if not same:
        reason = "its image tokens are on a grid of their own, which does not follow from the sizes of the inputs"
        return site.kept(reason, Refusal(reason=reason))
    return site.model_copy(update={"grid": same[0].grid, "grid_sizes": same[0].grid_sizes})


def _is_finest(site: SitePlan, source: GridSource, sites: Sequence[SitePlan]) -> bool:
    if isinstance(source, SizesOfInputs) and any(other.grid is not None for other in sites if other.rewritten):
        return site.grid is not None and site.grid.sizes == source.expressions
    return image_tokens(site) == max(image_tokens(other) for other in sites if other.rewritten)


def image_tokens(site: SitePlan) -> int:
    """Count a site's image tokens in the example."""
    return site.query_sizes[_image_at(site.query_layout)]


def image_length(site: SitePlan) -> str:
    """Return the number of a site's image tokens as an expression."""
    return site.query_layout.segments[_image_at(site.query_layout)].length


def _image_at(layout: TokenLayout) -> int:
    return next(i for i, s in enumerate(layout.segments) if s.kind is TokenKind.IMAGE)


def _in_sequence(path: str) -> bool:
    """Say whether a path ends in a sequence's index, not in a name or a dict's key."""
    return path.endswith("]") and not path.endswith("']")


def _leaves(value: Any) -> Sequence[tuple[Any, Any]]:
    return pytree.tree_flatten_with_path(value)[0]


def _feeds_linear(node: fx.Node) -> bool:
    return any(user.target is torch.ops.aten.linear.default for user in node.users)
