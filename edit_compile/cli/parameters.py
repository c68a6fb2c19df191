"""Options and arguments that several commands have, what they complete to, and what is checked of them before anything is loaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from edit_compile.adapters.model_names import architectures, check_name, is_on_hub, with_revision, without_address
from edit_compile.demo.names import SOURCES
from edit_compile.distillation.ranking.budget import BUDGET_FORMS
from edit_compile.distillation.recipe.names import find_recipe, is_recipe_file, model_of, shipped_recipes
from edit_compile.errors import CheckpointError, ConfigError, ModelNotFoundError
from edit_compile.extras import need

if TYPE_CHECKING:
    from edit_compile.config import LinearizeConfig

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_CHECKPOINT = "edit_compile.json"  # checkpoint_format.INDEX, whose import takes long


class Size(click.ParamType):  # type: ignore[type-arg]
    """`1024`, a square, or `HEIGHTxWIDTH`, in pixels; of videos `FRAMESxHEIGHTxWIDTH`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        numbers = str(value).lower().split("x")
        if len(numbers) > 3 or not all(number.isdecimal() and int(number) for number in numbers):
            self.fail(f"{value!r} is neither PX nor HEIGHTxWIDTH nor, of videos, FRAMESxHEIGHTxWIDTH", param, ctx)
        return tuple(map(int, numbers * 2 if len(numbers) == 1 else numbers))


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(name.strip() for name in str(value).split(",") if name.strip())


class TokenCount(click.ParamType):  # type: ignore[type-arg]
    """A number of image tokens, or one of the words for how to find it."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if not text.isdecimal() and text not in ("predicted", "measured"):
            self.fail(f"{value!r} is neither a number of image tokens nor 'predicted' or 'measured'", param, ctx)
        return int(text) if text.isdecimal() else text


class Name(click.ParamType):  # type: ignore[type-arg]
    """A name of one of these, or a path."""

    def __init__(self, name: str, known: Callable[[], Iterable[str]]) -> None:
        self.name, self.known = name, known

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete to the names, and let the shell complete to files."""
        return [CompletionItem(each) for each in self.known() if each.startswith(incomplete)] + [CompletionItem(incomplete, type="file")]


def _models() -> Iterable[str]:
    return (*SOURCES, *(f"arch/{name}" for name in architectures()), *shipped_recipes())


def _designs() -> Iterable[str]:
    from edit_compile.designs import AUTOMATIC_OPTIONS, design_names

    return (*AUTOMATIC_OPTIONS, *design_names())


MODEL, RECIPE, DESIGN = Name("model", _models), Name("recipe", shipped_recipes), Name("name", _designs)


class _DesignOption(click.Option):
    """`--design`, whose help names the designs that are registered when it is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from edit_compile.designs import design_names

        self.help = f"auto, fast (its cheapest form of like quality), or one of: {', '.join(design_names())}"
        return super().get_help_record(ctx)


revision_option = click.option("--revision", metavar="REV", help="branch, tag or commit of a model on the hub; MODEL@REV says the same")


def model_argument(resolve: Callable[[str], str], what: str) -> Decorator:
    """Add MODEL and --model, of which one must be given; the command gets what it stands for as `model`.

    Args:
        what: it may be, for the help.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapped(model: str | None, model_option: str | None, revision: str | None, **options: Any) -> Any:
            given = [name for name in (model, model_option) if name is not None]
            if len(given) != 1 or not given[0].strip():
                raise click.UsageError("give one model, as MODEL or as --model MODEL")
            return command(model=with_revision(resolve(given[0]), revision), **options)

        option = click.option("--model", "model_option", type=MODEL, metavar="MODEL", help=what)
        return click.argument("model", type=MODEL, required=False)(option(revision_option(wrapped)))

    return decorate


def any_model(name: str) -> str:
    """Return what a model is loaded by, converted or not: of a recipe its model, of a hub page's address the id.

    Raises:
        ModelNotFoundError: it cannot be a model; names the most similar one.
        RecipeError: it is a recipe's file that names no model.
    """
    name = without_address(name)
    if is_recipe_file(name) or (not Path(name).exists() and name in shipped_recipes()):
        return model_of(name)
    check_name(name, shipped_recipes())
    if name.startswith("timm/"):
        need("timm", name)
    return name


def original_model(name: str) -> str:
    """Return what an original model is loaded by, as `any_model`.

    Raises:
        ModelNotFoundError: it cannot be a model, or is a converted one.
    """
    name = any_model(name)
    folder = Path(name).expanduser()
    if (folder / _CHECKPOINT).is_file() and not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"{name} is a converted model, and this takes an original one, as {_base_in(folder)}; "
            f"sample, evaluate and distill --model take {name}"
        )
    return name


def _base_in(folder: Path) -> str:
    """Return what a checkpoint says of its base, in words."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        base = json.loads((folder / _CHECKPOINT).read_bytes())["base"]
        if isinstance(base, str):
            return base
    return "the one that it was made from"


def converted_model(name: str) -> str:
    """Return the folder of a converted model: of a recipe the folder that `distill` writes, of a hub page's address the id.

    Raises:
        ModelNotFoundError: there is no such folder, and it is not a hub id.
    """
    name = without_address(name)
    is_recipe = is_recipe_file(name)
    if not is_recipe and (is_on_hub(name) or name in SOURCES or Path(name).expanduser().exists()):
        return name
    run = Path("runs") / (Path(name).stem if is_recipe else name)
    if run.is_dir():
        return str(run)
    if is_recipe or name in shipped_recipes():
        raise ModelNotFoundError(f"{run} does not exist yet: `edit-compile distill {name}` makes it")
    places = dict.fromkeys((Path(name).parent, Path("runs"), Path("converted")))
    there = [str(path) for place in places for path in sorted(place.glob("*")) if path.is_dir()]
    similar = get_close_matches(name, there, 1)
    hint = f": did you mean {similar[0]}?" if similar else ""
    raise ModelNotFoundError(f"{name} does not exist; give the folder of a converted model or of a finished run, or a hub id{hint}")


original_model_argument = model_argument(original_model, "hub id or page, folder, config.json, demo/NAME, arch/NAME, timm/NAME or a recipe")
converted_model_argument = model_argument(
    converted_model,
    "the folder of a checkpoint, its pipeline or a finished run, the hub id of one, or a recipe whose run is in runs/",
)


_CONVERSION_OPTIONS = (
    original_model_argument,
    click.option("--design", cls=_DesignOption, type=DESIGN, metavar="NAME", default="auto", show_default=True),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="an option of the designs, as in YAML; repeatable"),
    click.option("--include", multiple=True, metavar="GLOB", help="over module paths; repeatable; default: *"),
    click.option("--exclude", multiple=True, metavar="GLOB", help="over module paths; repeatable"),
    click.option(
        "--example-inputs",
        "inputs_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="YAML with the arguments of one forward, x: {shape: [2, 4, 12, 20]}; pipelines and known models need none",
    ),
    click.option("--ranking", type=click.Path(path_type=Path), metavar="FILE", help="convert the sites that a ranking chooses; see `rank`"),
    click.option("--sites", metavar="BUDGET", help=f"which of them: {BUDGET_FORMS}; default: all"),
)


def conversion_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the model's name and the options of a conversion; call the command with `model`, `config` and `example_inputs`.

    Both come as functions: what makes them imports torch.
    """

    @functools.wraps(command)
    def wrapped(
        model: str,
        design: str,
        settings: tuple[str, ...],
        include: tuple[str, ...],
        exclude: tuple[str, ...],
        inputs_file: Path | None,
        ranking: Path | None,
        sites: str | None,
        **options: Any,
    ) -> Any:
        _check_design(design)
        if inputs_file is not None and not inputs_file.is_file():
            raise ConfigError(f"--example-inputs {inputs_file}: there is no such file")
        asked = {"design": None if design == "auto" else design, "include": include or None, "exclude": exclude or None}
        given = {name: value for name, value in {**asked, "ranking": ranking, "sites": sites}.items() if value is not None}
        config = functools.partial(_config, **given, **_settings(settings))
        return command(model=model, config=config, example_inputs=functools.partial(_example_inputs, inputs_file), **options)

    return _with(_CONVERSION_OPTIONS, wrapped)


def _with(options: Sequence[Decorator], command: Callable[..., Any]) -> Callable[..., Any]:
    """Add options to a command, in this order."""
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def _check_design(name: str) -> None:
    """Refuse an unknown design, with the most similar ones."""
    from edit_compile.designs import AUTOMATIC_OPTIONS, KEEP, design_names, find_design

    if name not in (*AUTOMATIC_OPTIONS, KEEP, *design_names()):
        find_design(name)


def _example_inputs(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    from edit_compile.adapters.input_file import read_example_inputs

    return read_example_inputs(file)


def _settings(settings: tuple[str, ...]) -> dict[str, Any]:
    from edit_compile.yaml_text import parse_yaml

    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {setting!r}: write KEY=VALUE")
        if name in ("design", "include", "exclude", "ranking", "sites"):
            raise ConfigError(f"--set {setting}: this is the option --{name}")
        try:
            found[name] = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"--set {setting}: the value {error}") from None
    return found


def _config(**options: Any) -> LinearizeConfig:
    from edit_compile.config import LinearizeConfig

    if "ranking" not in options and "sites" not in options:
        return LinearizeConfig(**options)
    from edit_compile.distillation.ranking.ranking import resolve_ranking

    return resolve_ranking(options)


dtype_option = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True, help="type to load weights in"
)


def recipe_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add RECIPE, --model and --set; call the command with `recipe`, a name or file that is there, and `overrides`."""

    @functools.wraps(command)
    def wrapped(recipe: str, model_option: str | None, revision: str | None, overrides: tuple[str, ...], **options: Any) -> Any:
        find_recipe(recipe)
        if revision is not None and model_option is None:
            raise click.UsageError("--revision is of --model; in a recipe, write model: ORG/NAME@REVISION")
        chosen = [] if model_option is None else [("model", with_revision(any_model(model_option), revision))]
        return command(recipe=recipe, overrides=(*chosen, *overrides), **options)

    model = click.option("--model", "model_option", type=MODEL, metavar="MODEL", help="instead of the recipe's model")
    return _with((click.argument("recipe", type=RECIPE), model, revision_option, overrides_option), wrapped)


overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the recipe, for example stages.0.steps=500; repeatable"
)


def read_list(option: str, text: str) -> list[Any]:
    """Read an option's list, in YAML, with or without its brackets.

    Raises:
        ConfigError: it is not YAML.
    """
    from edit_compile.yaml_text import parse_yaml

    try:
        return list(parse_yaml(text if text.lstrip().startswith("[") else f"[{text}]"))
    except ValueError as error:
        raise ConfigError(f"{option} {text} {error}") from None


def check_folder(folder: Path, option: str = "-o") -> None:
    """Refuse a folder that cannot be written, before anything is loaded. What is made to find out is removed again.

    Args:
        option: with which another one can be chosen.

    Raises:
        CheckpointError: it is a file, or cannot be made or written.
    """
    import tempfile

    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder; choose another with {option}")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}; choose another folder with {option}") from None
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
