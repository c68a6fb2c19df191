"""What `sites:` says: which of the ranked sites to convert, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from edit_compile.errors import ConfigError

Quantity = Literal["all", "best", "flops", "time", "error"]
BUDGET_FORMS = "all, best N, flops <= 0.5x, time <= 0.7x or error <= 0.01"
_NUMBER = r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_BOUND = re.compile(rf"(flops|time|error)\s*<=\s*{_NUMBER}\s*(x?)", re.IGNORECASE)
_BEST = re.compile(r"best\s+(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A parsed `sites:`.

    Attributes:
        quantity: what is bounded; "all" for every site, "best" for a number of them.
        bound: a share of the whole model's FLOPs or time, the sum of errors, or a number of sites; 0 for "all".
        text: as it was given, in its usual spelling.
    """

    quantity: Quantity
    bound: Fraction
    text: str


def parse_budget(text: object) -> Budget:
    """Read what `sites:` says.

    Raises:
        ConfigError: it is none of the forms.
    """
    words = " ".join(str(text).split())
    if words.lower() == "all":
        return Budget("all", Fraction(0), "all")
    if (found := _BEST.fullmatch(words)) is not None:
        if not int(found[1]):
            raise ConfigError(f"sites: {words}: converts nothing; the least is best 1")
        return Budget("best", Fraction(found[1]), f"best {int(found[1])}")
    found = _BOUND.fullmatch(words)
    if found is None:
        raise ConfigError(f"sites: {words!r} is none of: {BUDGET_FORMS}")
    name, number, unit = found[1].lower(), found[2], found[3].lower()
    if (name == "error") == bool(unit):
        raise ConfigError(f"sites: {words}: {_unit_problem(name, number)}")
    bound = Fraction(number)
    if bound <= 0 or (unit and bound >= 1):
        raise ConfigError(f"sites: {words}: the bound is {'between 0 and 1, a share of the whole model' if unit else 'more than 0'}")
    quantity: Quantity = "flops" if name == "flops" else "time" if name == "time" else "error"
    return Budget(quantity, bound, f"{name} <= {number}{unit}")


def _unit_problem(name: str, number: str) -> str:
    if name == "error":
        return f"an error has no unit; write error <= {number}"
    return f"write {name} <= {number}x, a share of the whole model's {name}"
