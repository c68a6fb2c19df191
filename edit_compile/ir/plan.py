"""Plans: for every attention site, what will be done or why it is kept. Plain data that is printed, saved, loaded, compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from edit_compile.errors import PlanError
from edit_compile.frozen import first_problem
from edit_compile.ir import plan_table
from edit_compile.ir.plan_data import (
    KEEP,
    PLAN_VERSION,
    Given,
    GridSource,
    MaskKind,
    PassRecord,
    PlanData,
    PositionIds,
    Refusal,
    SiteKind,
    SitePlan,
    SizesOfInputs,
)

__all__ = ["KEEP", "PLAN_VERSION", "Given", "GridSource", "MaskKind", "PassRecord", "Plan", "PositionIds", "Refusal"]
__all__ += ["SiteKind", "SitePlan", "SizesOfInputs"]


class Plan(PlanData):
    """The plan of a whole model: a sequence of its sites, by path too; prints as a table."""

    def __iter__(self) -> Iterator[SitePlan]:  # type: ignore[override]
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, site: object) -> bool:
        return site in self.sites or any(each.path == site for each in self.sites)

    def __getitem__(self, path: str | int) -> SitePlan:
        """Find the first site at a path, or the site of a number in order of execution.

        Raises:
            KeyError: there is none at the path; lists the nearest ones.
            IndexError: there are not that many.
        """
        if isinstance(path, int):
            return self.sites[path]
        found = next((site for site in self.sites if site.path == path), None)
        if found is None:
            near = get_close_matches(path, [site.path for site in self.sites], 3, 0)
            raise KeyError(f"no site at {path!r}; near it: {', '.join(near)}")
        return found

    def __str__(self) -> str:
        return plan_table.render(self)

    def __rich_console__(self, console: Any, options: Any) -> Iterable[str]:
        yield plan_table.markup(self, options.max_width)

    def _repr_html_(self) -> str:
        return plan_table.html(self)

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan.

        Raises:
            PlanError: it is not one, or of a version this release does not know.
        """
        version = _version_of(text)
        if version not in (None, PLAN_VERSION):
            raise PlanError(f"the plan has version {version}, this release reads version {PLAN_VERSION}: make it again")
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(f"not a plan: {first_problem(error)}") from None
        plan.check()
        return plan

    def check(self) -> None:
        """Check what the types do not say.

        Raises:
            PlanError: a site is named twice.
        """
        paths = [site.path for site in self.rewritten]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise PlanError(f"the plan rewrites the site {twice} twice")


def _version_of(text: str | bytes) -> Any:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content.get("version") if isinstance(content, dict) else None
