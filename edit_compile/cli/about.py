"""`edit-compile recipe` and `env`."""

from __future__ import annotations

from typing import Any

import click

from edit_compile.cli.command import Command, print_json
from edit_compile.cli.parameters import RECIPE, overrides_option
from edit_compile.distillation.recipe.names import about, find_recipe, model_of, shipped_recipes
from edit_compile.errors import RecipeError
from edit_compile.progress import working


@click.command(
    cls=Command,
    examples="""recipe
recipe sd3.5-medium > recipe.yaml
recipe sd3.5-medium --explain --set stages.0.steps=500""",
)
@click.argument("name", type=RECIPE, required=False)
@click.option("--explain", is_flag=True, help="print every key with its value, and above it what it means")
@overrides_option
def recipe(name: str | None, explain: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe, a shipped one or a file, to begin one of your own; without NAME, list the shipped ones."""
    if name is None:
        if explain or overrides:
            raise click.UsageError("--explain and --set are for a recipe: give its NAME")
        _list(as_json)
        return
    path = find_recipe(name)
    if not (explain or overrides or as_json):
        from edit_compile.yaml_text import read_text

        try:
            click.echo(read_text(path), nl=False)
        except ValueError as error:
            raise RecipeError(f"{path} {error}") from None
        return
    with working("importing PyTorch"):
        from edit_compile.distillation.recipe.explain import explain as explained
        from edit_compile.distillation.recipe.load import load_recipe
    resolved = load_recipe(path, overrides)
    if as_json:
        print_json(resolved.model_dump(mode="json"))
    else:
        click.echo(explained(resolved) if explain else _in_yaml(resolved.model_dump(mode="json")), nl=False)


def _in_yaml(content: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(content, sort_keys=False))


def _list(as_json: bool) -> None:
    found = {name: {"model": model_of(name), "about": about(name)} for name in shipped_recipes()}
    if as_json:
        print_json(found)
        return
    width = max(map(len, found))
    for name, said in found.items():
        click.echo(f"{name:{width}}  {said['about']}")


@click.command(cls=Command, examples="env\nenv --json")
def env(as_json: bool) -> None:
    """Print the versions, devices and backends that a bug report needs."""
    from edit_compile.report.environment import environment, environment_lines

    with working("importing PyTorch"):
        found = environment()
    if as_json:
        print_json(found)
    else:
        click.echo("\n".join(environment_lines(found)))
