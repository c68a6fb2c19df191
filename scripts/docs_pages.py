"""The pages of the documentation that are made of the code: an mkdocs hook.

A page for each command, of click's own help; the keys of recipes and studies, of their schemas, which editors can use too; the
options of designs, of their docstrings. Pages of files that stand outside of docs/, results and examples among them, and the links
to them: the same links lead to the files on a code host.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

import click
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
_FROM_README = re.compile(r"^\[[^\]]*\]\((?:\.\./)+README\.md#([^)]*)\)$", re.MULTILINE)  # a line that is a link to a section of it
_OUTSIDE = {  # patterns of files outside of docs/, and the folder of the site they go to
    "CHANGELOG.md": "",
    "CONTRIBUTING.md": "",
    "SECURITY.md": "",
    "benchmarks/results/*": "results",
    "examples/*": "examples",
    "integrations/comfyui/README.md": "comfyui",
    "edit_compile/recipes/*.yaml": "recipes",
    "edit_compile/recipes/studies/*.yaml": "recipes/studies",
}
_LANGUAGES = {".py": "python", ".yaml": "yaml"}
_AS_THEY_ARE = {".md", ".png"}


def outside_files() -> dict[str, str]:
    """Map files outside of docs/, as paths in the repository, to their pages, and pictures to their places on the site."""
    found = {}
    for pattern, folder in _OUTSIDE.items():
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix in {*_AS_THEY_ARE, *_LANGUAGES}:
                name = path.name if path.suffix in _AS_THEY_ARE else f"{path.stem}.md"
                found[path.relative_to(ROOT).as_posix()] = join(folder, name)
    return found


def generated_pages() -> dict[str, str]:
    """Return the pages that are made of the code, and the schemas, by their paths on the site."""
    from edit_compile.distillation.recipe.schema import Recipe
    from edit_compile.study.schema import Study

    recipe, study = Recipe.model_json_schema(), Study.model_json_schema()
    pages = {f"commands/{name}.md": command_page(name, command) for name, command in commands().items()}
    pages["commands/index.md"] = command_index()
    pages["reference/recipe.md"] = schema_page("Recipes", _ABOUT_RECIPES, recipe)
    pages["reference/study.md"] = schema_page("Studies", _ABOUT_STUDIES, study)
    pages["reference/recipe.schema.json"] = json.dumps(recipe, indent=1)
    pages["reference/study.schema.json"] = json.dumps(study, indent=1)
    pages["reference/design-options.md"] = design_options_page()
    return pages


# ------------------------------------------------------------------ hooks


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages into the navigation that `nav` names by their folder: `commands/*`."""
    pages = [*(f"commands/{name}.md" for name in commands()), *(uri for uri in outside_files().values() if uri.endswith(".md"))]
    config.nav = _expanded(config.nav, pages)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of the code, and those of files outside of docs/, with their pictures."""
    for uri, content in generated_pages().items():
        files.append(File.generated(config, uri, content=content))
    for source, uri in outside_files().items():
        files.append(File.generated(config, uri, content=_as_page(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages, and put in what is taken from the README."""
    uri = page.file.src_uri
    origin = next((source for source, made in outside_files().items() if made == uri), f"docs/{uri}")
    own = _with_links(markdown, origin, uri).replace("<!-- made of the recipes: samples -->", recipe_samples())
    return _FROM_README.sub(lambda found: _with_links(readme_section(found[1]), "README.md", uri), own)


def readme_section(anchor: str) -> str:
    """Return what stands below a heading of the README."""
    parts = re.split(r"^## (.*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    anchors = [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in parts[1::2]]
    return dict(zip(anchors, parts[2::2], strict=True))[anchor].strip()


def _with_links(markdown: str, origin: str, uri: str) -> str:
    """Make the links of a file of the repository, `origin`, those of the page `uri`."""
    outside = outside_files()

    def linked(link: re.Match[str]) -> str:
        place = normpath(join(dirname(origin), link[2]))
        target = place.removeprefix("docs/") if place.startswith("docs/") else outside.get(place)
        if "://" in link[2] or target is None:
            return link[0]
        return f"{link[1]}({relpath(target, dirname(uri) or '.')}{link[3] or ''})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(linked, part) for part in parts)


def _expanded(nav: Any, pages: list[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _expanded(content, pages) for title, content in nav.items()}
    if not isinstance(nav, list):
        return nav
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and entry.endswith("/*"):
            found += [page for page in pages if dirname(page) == entry[:-2] and not page.endswith("index.md")]
        else:
            found.append(_expanded(entry, pages))
    return found


def _as_page(path: Path) -> str | bytes:
    if path.suffix == ".png":
        return path.read_bytes()
    text = path.read_text()
    return text if path.suffix == ".md" else f"# {path.name}\n\n```{_LANGUAGES[path.suffix]}\n{text}```\n"


# ------------------------------------------------------------------ commands


def commands() -> dict[str, click.Command]:
    """Return the commands by name."""
    from edit_compile.cli import main

    context = click.Context(main, info_name="edit-compile")
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None and not command.hidden}


def command_index() -> str:
    """Make the page of all commands."""
    from edit_compile.cli import main

    rows = [f"| [`{name}`]({name}.md) | {_cell(command.get_short_help_str(1000))} |" for name, command in commands().items()]
    with click.Context(main, info_name="edit-compile") as context:
        options = _option_table(main, context)
    parts = [
        "# Commands",
        _paragraphs(main.help),
        "```console\n$ edit-compile COMMAND --help\n```",
        "\n".join(["| command | what it does |", "|---|---|", *rows]),
        "Options before the command:",
        options,
    ]
    return "\n\n".join(parts) + "\n"


def command_page(name: str, command: click.Command) -> str:
    """Make a command's page, of what its `--help` says."""
    from edit_compile.cli import main

    with click.Context(command, info_name=name, parent=click.Context(main, info_name="edit-compile")) as context:
        usage = " ".join(command.collect_usage_pieces(context))
        parts = [
            f"# {name}",
            f"```console\n$ edit-compile {name} {usage}\n```",
            _paragraphs(command.help),
            _option_table(command, context),
            _paragraphs(command.epilog),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _option_table(command: click.Command, context: click.Context) -> str:
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [f"| `{_cell(record[0])}` | {_cell(record[1])} |" for record in records if record and record[1]]
    return "\n".join(["| option | |", "|---|---|", *rows])


def _paragraphs(text: str | None) -> str:
    """Return a help text in Markdown: what click keeps as it is written (after a line with \\b alone) is code."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n")) if text else []
    written = (f"```text\n{_dedented(each)}\n```" if "\b" in each else " ".join(each.split()).replace("<", "&lt;") for each in paragraphs)
    return "\n\n".join(each for each in written if each)


def _dedented(paragraph: str) -> str:
    lines = [line for line in paragraph.splitlines() if line.strip() != "\b"]
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[indent:] for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ------------------------------------------------------------------ schemas

_ABOUT_RECIPES = """A recipe is a YAML file: what to distil, on which data, and how. `edit-compile distill RECIPE` runs it. Keys
that are not known are errors, and `--set KEY=VALUE` changes any of them: `--set stages.0.steps=500`. Bold keys have no default.

[recipe.schema.json](recipe.schema.json) is the same for editors. Those with the YAML language server take it from the first line
of a recipe, where it names a copy of the file:

```yaml
# yaml-language-server: $schema=recipe.schema.json
```

The file of your own installation, with the kinds of data of all installed packages:

```python
import json
from pathlib import Path

import edit_compile as ec

Path("recipe.schema.json").write_text(json.dumps(ec.Recipe.model_json_schema()))
```
"""
_ABOUT_STUDIES = """A study is a YAML file: configurations of one model that are compared over the same seeds at the same budget.
`edit-compile compare STUDY` runs it; see [Comparing designs](../guides/comparing-designs.md). Bold keys have no default.

[study.schema.json](study.schema.json) is the same for editors.
"""


def schema_page(title: str, about: str, schema: dict[str, Any]) -> str:
    """Make the page of a JSON schema: a table of keys for it, and for each of its parts."""
    parts = [f"# {title}", about, *_sections(schema)]
    return "\n\n".join(parts) + "\n"


def _sections(schema: dict[str, Any]) -> Iterator[str]:
    yield _key_table(schema)
    for name, part in schema.get("$defs", {}).items():
        yield f"## {_heading(name)}\n\n{_first_paragraph(part)}\n\n{_key_table(part)}"
    kinds = {part["properties"]["kind"]["const"]: part for part in schema["properties"].get("data", {}).get("oneOf", ())}
    if kinds:
        yield "## Kinds of data\n\n`data: {kind: ...}` selects one of these."
    for kind, part in sorted(kinds.items()):
        yield f"### {kind}\n\n{_first_paragraph(part)}\n\n{_key_table(part)}"


def _heading(title: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", title).capitalize()


def _first_paragraph(part: dict[str, Any]) -> str:
    return " ".join(part.get("description", "").split("\n\n")[0].split())


def _key_table(part: dict[str, Any]) -> str:
    required, rows = part.get("required", []), []
    for name, value in part["properties"].items():
        shown = f"**`{name}`**" if name in required else f"`{name}`"
        default = "" if "default" not in value else f"`{json.dumps(value['default'])}`"
        rows.append(f"| {shown} | {_type(value)} | {_cell(default)} | {_cell(value.get('description', ''))} |")
    return "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])


def _type(value: dict[str, Any]) -> str:
    """Say in words what a value may be."""
    if "$ref" in value:
        name = _heading(value["$ref"].rsplit("/", 1)[1])
        return f"[{name.lower()}](#{name.lower().replace(' ', '-')})"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(each) for each in value["anyOf"]))
    if "oneOf" in value:
        return "[a kind of data](#kinds-of-data)"
    kind = value.get("type", "anything")
    if kind == "array":
        items = value["prefixItems"] if "prefixItems" in value else [value.get("items", {})]
        return f"list of {' and '.join(dict.fromkeys(_type(each) for each in items))}"
    words = {"object": "mapping", "integer": "whole number", "boolean": "true or false", "string": "text", "null": "null"}
    return words.get(str(kind), str(kind)) + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    names = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {value[name]:g}" for name, sign in names.items() if name in value]
    return f" ({', '.join(found)})".replace("<", "&lt;") if found else ""


def recipe_samples() -> str:
    """Make the table of how many samples the phases of the shipped full-size recipes take."""
    rows = []
    for path in sorted(ROOT.glob("edit_compile/recipes/*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if recipe["model"].startswith("demo/"):
            continue
        cells = [_samples(phase) for phase in recipe["stages"]]
        rows.append(f"| `{path.stem}` | {_samples(recipe['layerwise'])} | {', then '.join(cells)} |")
    return "\n".join(["| recipe | layerwise fit | stages |", "|---|---|---|", *rows])


def _samples(phase: dict[str, Any]) -> str:
    size = phase.get("resolution")
    sides = "x".join(map(str, [*([phase["frames"]] if "frames" in phase else []), *(size if isinstance(size, list) else [size])]))
    return f"{phase['steps'] * phase['global_batch_size']:,}" + (f" at {sides} px" if size else "")


# ------------------------------------------------------------------ designs


def design_options_page() -> str:
    """Make the page of all designs and their options, of their docstrings."""
    from edit_compile.designs import design_names, find_design

    parts = ["# Options of designs", _ABOUT_OPTIONS]
    for name in design_names():
        design = find_design(name)
        described = _attributes(design.Options)
        rows = []
        for option, field in design.Options.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = default.model_dump() if hasattr(default, "model_dump") else default
            about_it = field.description or described.get(option, "")
            rows.append(f"| `{option}` | `{_cell(json.dumps(shown))}` | {_cell(about_it)} |")
        table = "\n".join(["| option | default | |", "|---|---|---|", *rows]) if rows else "No options."
        parts.append(f"## {name}\n\n{_about(design.__doc__ or '')}\n\n{table}")
    return "\n\n".join(parts) + "\n"


_ABOUT_OPTIONS = """What each design is, and which attention it takes, is in [Designs](../concepts.md#designs). Options are given as
`--set KEY=VALUE` on the command line, as keys of `convert:` in a recipe, and in Python as `ec.LinearizeConfig(design="edit", reduction=8)`
or, for some of the sites, `ec.Rule("*.attn", "edit", {"reduction": 8})`."""


def _attributes(options: type) -> dict[str, str]:
    """Read the `Attributes:` of a class and of those that it inherits from: lines of `name, name: what`, deeper ones go on."""
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__):
        text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=    \S)", text.partition("\n\n")[0]):
            names, colon, description = entry.partition(":")
            found |= {name.strip(): description for name in names.split(",")} if colon else {}
    return found


def _about(docstring: str) -> str:
    """Return the first paragraph of a docstring, with the formula below it if it ends in a colon."""
    first, *more = inspect.cleandoc(docstring).split("\n\n")
    formula = f"\n\n```text\n{inspect.cleandoc(more[0])}\n```" if first.endswith(":") and more else ""
    return _cell(first) + formula
