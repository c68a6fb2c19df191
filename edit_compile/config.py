"""What the user chooses about a conversion: which design for which sites, and its options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, model_validator

from edit_compile.designs import AUTO, AUTOMATIC, AUTOMATIC_OPTIONS, KEEP, find_design
from edit_compile.designs.base import Design
from edit_compile.errors import ConfigError, suggestion
from edit_compile.frozen import Frozen


class Choice(NamedTuple):
    """One rule, its names looked up: sites at `paths` get `design` with `options`, a `design.Options`; None keeps them.

    What a design brings for sites of another kind is for those beside a site that has got the choice `brought_by`, whatever their paths.
    """

    paths: str
    design: type[Design] | None
    options: Any
    reason: str = ""
    brought_by: Choice | None = None


class _Data(Frozen):
    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ConfigError("; ".join(_in_words(problem, type(self)) for problem in error.errors())) from None

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class Rule(_Data):
    """Sites whose path matches a glob get a design.

    Raises:
        ConfigError: there is no such design, or it has no such option.
    """

    paths: str = "*"
    """The glob, over module paths."""
    design: str
    """A design's name, or "keep"."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the design."""
    reason: str = ""
    """Why, for the plan: it stands behind the design's own reason."""
    companions: bool = True
    """Whether what the design brings for sites of another kind comes with it."""

    def __init__(
        self,
        paths: str = "*",
        design: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        reason: str = "",
        companions: bool = True,
        **unknown: Any,
    ) -> None:
        named = {} if design is None else {"design": design}
        options = {} if options is None else options
        super().__init__(paths=paths, options=options, reason=reason, companions=companions, **named, **unknown)

    @model_validator(mode="after")
    def _known(self) -> Rule:
        self.choice()
        return self

    def choice(self) -> Choice:
        """Look the design up and check its options.

        Raises:
            ConfigError: there is no such design, or it has no such option.
        """
        if self.design == KEEP:
            if self.options:
                raise ConfigError(f"design={KEEP!r} has no options")
            return Choice(self.paths, None, None, self.reason)
        if self.design in AUTOMATIC_OPTIONS:
            raise ConfigError(
                f"design={self.design!r} is not for rules: give a rule for each of {', '.join(AUTOMATIC)}, the first that takes a site wins"
            )
        design = find_design(self.design)
        return Choice(self.paths, design, parse_options(design, self.options), self.reason)


class LinearizeConfig(_Data):
    """How a model is converted: by one design, or by rules of which the first that matches a site and takes it wins.

        LinearizeConfig(design="edit", reduction=4)
        LinearizeConfig(rules=[Rule("*.attn", "mm-edit", {"eta": "ratio"}), Rule("*.attn2", "edit")])

    Raises:
        ConfigError: an option or design is not known, or has an impossible value.
    """

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})  # the designs' options, which `options` gathers

    design: str = AUTO
    """A design's name, or "keep"; "auto" takes the first of the shipped ones that fits a site, "fast" its cheapest form of like quality."""
    include: tuple[str, ...] = ("*",)
    """Globs over module paths; a site is converted if it matches one of them."""
    exclude: tuple[str, ...] = ()
    """Globs over module paths; a site that matches one of them is left unchanged."""
    rules: tuple[Rule, ...] = ()
    """Which design goes where, instead of `design` and its options; the first that matches a site and takes it wins."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the design, each design's own; also given as keys beside it. With "auto" and "fast" an option goes to every design that has it."""

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        extra = {name: value for name, value in given.items() if name not in cls.model_fields}
        named = {name: value for name, value in given.items() if name in cls.model_fields}
        nested = named.get("options", {})
        return {**named, "options": {**nested, **extra}} if extra and isinstance(nested, Mapping) else named

    @model_validator(mode="after")
    def _known(self) -> LinearizeConfig:
        if self.rules and (self.design != AUTO or self.options):
            raise ConfigError("give either rules or a design and its options: a rule has a design and options of its own")
        self.choices()
        return self

    def choices(self) -> tuple[Choice, ...]:
        """List the designs to try at each site, in order.

        Raises:
            ConfigError: see `LinearizeConfig`.
        """
        if self.rules:
            chosen = ((rule.choice(), rule.companions) for rule in self.rules)
            return tuple(each for choice, companions in chosen for each in (_with_companions(choice) if companions else (choice,)))
        if self.design == KEEP:
            raise ConfigError(f"design={KEEP!r} converts nothing; use it in a rule")
        designs = [find_design(name) for name in (AUTOMATIC if self.design in AUTOMATIC_OPTIONS else (self.design,))]
        _check_names(self.options, designs, beside=tuple(LinearizeConfig.model_fields))
        given = {**AUTOMATIC_OPTIONS.get(self.design, {}), **self.options}
        own = ({name: value for name, value in given.items() if name in design.Options.model_fields} for design in designs)
        choices = (Choice("*", design, parse_options(design, options)) for design, options in zip(designs, own, strict=True))
        return tuple(each for choice in choices for each in _with_companions(choice))


def _with_companions(choice: Choice) -> tuple[Choice, ...]:
    """Return a choice, and after it those that its design brings."""
    if choice.design is None:
        return (choice,)
    try:
        brought = tuple(Choice("*", design, options, brought_by=choice) for design, options in choice.design.companions(choice.options))
    except Exception as error:  # whatever somebody else's design raises
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"`companions` of the design {choice.design.name!r} fails: {problem}") from error
    return (choice, *brought)


def parse_options(design: type[Design], options: Mapping[str, Any]) -> Any:
    """Check a design's options.

    Raises:
        ConfigError: one is not known or has an impossible value.
    """
    _check_names(options, [design])
    try:
        return design.Options(**options)
    except ValidationError as error:
        raise ConfigError("; ".join(_in_words(problem, design.Options) for problem in error.errors())) from None
    except Exception as error:  # whatever a validator of somebody else's raises
        problem = " ".join(str(error).split())
        raise ConfigError(f"the options of the design {design.name!r} cannot be checked: {type(error).__name__}: {problem}") from error


def _check_names(options: Iterable[str], designs: list[type[Design]], beside: tuple[str, ...] = ()) -> None:
    known = list(dict.fromkeys(name for design in designs for name in design.Options.model_fields))
    for name in options:
        if name not in known:
            raise ConfigError(_unknown(name, [*beside, *known]))


def _unknown(name: str, known: list[str]) -> str:
    if name in ("sites", "ranking"):
        made = "`edit-compile rank MODEL` makes one, and edit_compile.Ranking.read(FILE).config(SITES) reads it"
        return f"unknown option {name!r}: a ranking chooses sites; {made}"
    return f"unknown option {name!r}; {suggestion(name, known) if known else 'there are none'}"


def _in_words(problem: Any, model: type[Frozen]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(name, list(model.model_fields)) if len(problem["loc"]) == 1 else f"unknown option {name!r}"
    message = " ".join(problem["msg"].removeprefix("Value error, ").split())
    if problem["type"] == "missing":
        return f"{name} is missing: it has no default"
    return f"{name}={problem['input']!r}: {message[0].lower()}{message[1:]}" if name else message
