"""Converted models with their code beside their weights, in diffusers' convention: they load where this package is not.

The code is one readable file: the original class of diffusers, with the generated forwards of its sites and what they use of this
package, copied. `auto_map` in the config, and for pipelines the entry in `model_index.json`, name it, so that diffusers asks for
`trust_remote_code=True`.
"""

from __future__ import annotations

import ast
import inspect
import json
import linecache
import re
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed
from torch import nn

from edit_compile.adapters.pipelines import PIPELINE_INDEX, denoiser_name, is_of_diffusers, with_denoiser
from edit_compile.errors import CheckpointError, some_of
from edit_compile.files import write_text
from edit_compile.ir.plan import Given, PositionIds, SizesOfInputs
from edit_compile.passes.site_graph import ADDED
from edit_compile.student import standalone_runtime
from edit_compile.student.grid_sources import _FromIds, _FromSizes
from edit_compile.student.handle import ConvertedModel, unwrap
from edit_compile.student.site import ConvertedSite, converted_sites
from edit_compile.student.source_export import SourceExport, literal
from edit_compile.version import __version__

MODULE = "linear_attention_model"  # the file's name, without its ending
_PREFIX = "Linear"
_CONFIG = "config.json"
_MODULE_STATE = frozenset({*vars(nn.Module()), "triton_kernel"})  # a kernel is chosen for one device
_TEACHER = re.compile(r"^    if \w+\.edit_teacher_is_on\(\):\n        return [^\n]*\n", re.M)
_DEFAULT = re.compile(r"_defaults\['(\w+)'\]")

_HEAD = '''\
"""{name}, whose softmax attention between image tokens was replaced.

Written by edit_compile {version}, which is not needed to run it:

    model = diffusers.AutoModel.from_pretrained(this_folder, trust_remote_code=True)

{sites} of its attention layers have other attention. It is for drawing; edit_compile.load reads the same folder for training.
"""

from __future__ import annotations

'''

_CARD = """\
---
library_name: diffusers
---

Softmax attention between image tokens was replaced by edit_compile, which is not needed to draw:

```python
from diffusers import {loader}

model = {loader}.from_pretrained("this folder", trust_remote_code=True)
```
"""

_MODEL = '''\
class {name}({original}):
    """{original} with other attention between image tokens."""

    @functools.wraps({original}.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        {make_linear}(self, SITES)

    @functools.wraps({original}.forward)
    def forward(self, *args, **kwargs):
        return {call_with_grids}(GRIDS, self, super().forward, args, kwargs)
'''


def standalone_class_name(model: ConvertedModel) -> str:
    """Return the name of a converted model's class in its own file."""
    return f"{_PREFIX}{type(model).__name__}"


def check_standalone(model: ConvertedModel) -> str:
    """Write the source of a converted model's class and of all that it needs but torch and diffusers, and make it without weights.

    Raises:
        CheckpointError: its class is not one of diffusers, or something in it cannot be written as source; says what.
    """
    _check(model)
    source = _Writer(model).text()
    _check_source(model, source)
    return source


def _check(model: ConvertedModel) -> None:
    if torch.distributed.is_initialized():
        raise CheckpointError("a standalone model is written by a process of its own: save without it, load that, and save it standalone")
    name, plan = type(model).__name__, model.edit_conversion.plan
    if not is_of_diffusers(type(model).__bases__[1]):
        raise CheckpointError(f"{name} is not a class of diffusers, so that no code of its own can be written beside its weights")
    if isinstance(plan.grid, Given):
        raise CheckpointError(f"{name}: the grid of its image tokens has to be stated with edit_compile.grid; a standalone model has none")
    if model.edit_conversion.lora is not None:
        raise CheckpointError("a standalone model has no LoRA: make it part of the weights first, edit_compile.merge_lora(model)")
    if plan.min_tokens:
        raise CheckpointError(f"a standalone model has no original attention to run below min_tokens={plan.min_tokens}: convert with 0")


class _Writer:
    """Writes one model's file."""

    def __init__(self, model: ConvertedModel) -> None:
        self.model, self.sites = model, converted_sites(model)
        designs = {type(_added(site)).__module__.partition(".")[0] for site in self.sites.values()}
        self.export = SourceExport(frozenset({"edit_compile", *designs} - {"torch", "diffusers"}))
        self.classes: dict[Any, tuple[str, str]] = {}  # by the site's class, its name here and its source
        self.makers: dict[str, str] = {}  # by what they return, the names of the functions

    def text(self) -> str:
        original = type(self.model).__name__
        for line in ("import functools", "from types import SimpleNamespace", f"from diffusers import {original}"):
            self.export.add_import(line)
        make_linear, call_with_grids = map(self.export.name_of, (standalone_runtime.make_linear, standalone_runtime.call_with_grids))
        self.export.name_of(standalone_runtime.assembled)
        for site in self.sites.values():
            self._add_class(site)
            for module in _added(site).modules():
                if not _is_plain(module):
                    self.export.add_module_class(type(module))
        grids = self._grids()
        self.export.settle()  # which attributes of the modules are looked up
        rows = [self._row(path, site) for path, site in self.sites.items()]
        makers = [f"def {name}():\n    return {code}" for code, name in self.makers.items()]
        definitions = self.export.text()
        parts = [
            *(source for _, source in self.classes.values()),
            *makers,
            "SITES = [\n" + "".join(f"    {row},\n" for row in rows) + "]",
            f"GRIDS = {grids}",
            _MODEL.format(
                name=standalone_class_name(self.model), original=original, make_linear=make_linear, call_with_grids=call_with_grids
            ),
        ]
        counted = f"{sum(site.kind == 'attention' for site in self.model.edit_conversion.plan.rewritten)}"
        head = _HEAD.format(name=original, version=__version__, sites=counted)
        return head + definitions + "\n\n\n" + "\n\n\n".join(parts)

    # -------------------------------------------------------------- sites

    def _row(self, path: str, site: ConvertedSite) -> str:
        code = self._module(_added(site), f"{path}.edit", 1)
        maker = self.makers.setdefault(code, f"added_{len(self.makers)}")
        return f"({path!r}, {self.classes[type(site)][0]}, {maker}, {site.edit_grid_index})"

    def _add_class(self, site: ConvertedSite) -> None:
        kind: Any = type(site)
        if kind in self.classes:
            return
        _, original = kind.__bases__
        forward = inspect.unwrap(kind.forward)
        source = "".join(linecache.getlines(forward.__code__.co_filename))
        source = _TEACHER.sub("", source)
        defaults = {name: p.default for name, p in inspect.signature(original.forward).parameters.items()}
        source = _DEFAULT.sub(lambda found: literal(defaults[found[1]], self.export.name_of, f"{original.__name__}.forward"), source)
        source = re.sub(r"return _run\((\w+), ", r"return \1._run(", source)
        source = self._with_names(source, forward.__globals__)
        name = f"{kind.__name__}{len(self.classes) or ''}"
        bases = f"{self.export.add_module_class(standalone_runtime.LinearSite)}, {self.export.name_of(original)}"
        body = re.sub(r"\n{3,}", "\n\n", source.strip())
        self.classes[kind] = (name, f"class {name}({bases}):\n{textwrap.indent(body, '    ')}")

    def _with_names(self, source: str, scope: dict[str, Any]) -> str:
        """Replace the names of a generated source's own scope by those in the file."""
        tree = ast.parse(source)
        self.export.add_code(tree)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        local = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        replaced: dict[str, str] = {}
        for name in sorted({node.id for node in names} & scope.keys() - local):
            value = scope[name]
            if isinstance(value, ModuleType) or callable(value):
                replaced[name] = self.export.name_of(value)
            elif isinstance(value, float):
                replaced[name] = literal(value, self.export.name_of, name)
        for name in sorted(local & set(replaced.values())):
            source = re.sub(rf"(?<![\w.]){name}\b", f"{name}_0", source)
        for name, written in replaced.items():
            source = re.sub(rf"(?<![\w.]){name}\b", written, source)
        return source

    # -------------------------------------------------------------- modules

    def _module(self, module: nn.Module, where: str, depth: int) -> str:
        """Write the expression that makes a module: torch's by their constructors, others of their attributes."""
        kind = type(module)
        if _is_plain(module):
            return self._constructor(module, where)
        every = self._has_foreign_methods(kind)
        own = {name: value for name, value in vars(module).items() if name not in _MODULE_STATE}
        attributes = {name: value for name, value in own.items() if every or name in self.export.attributes}
        written = {name: literal(value, self.export.name_of, f"{where}.{name}") for name, value in attributes.items()}
        if buffers := [name for name, buffer in module._buffers.items() if buffer is not None]:
            raise CheckpointError(f"{where}.{buffers[0]} is a buffer, which cannot be written as source")
        for name, parameter in (*module._parameters.items(), *module._buffers.items()):
            written[name] = "None" if parameter is None else f"nn.Parameter(torch.empty({tuple(parameter.shape)}))"
        for name, child in module._modules.items():
            written[name] = "None" if child is None else self._module(child, f"{where}.{name}", depth + 1)
        given = [f"{name}={code}" if name.isidentifier() else f"**{{{name!r}: {code}}}" for name, code in written.items()]
        inner = "".join(f"{'    ' * (depth + 1)}{argument},\n" for argument in given)
        name = self.export.add_module_class(kind)
        return f"assembled(\n{'    ' * (depth + 1)}{name},\n{inner}{'    ' * depth})" if inner else f"assembled({name})"

    def _has_foreign_methods(self, kind: type[nn.Module]) -> bool:
        """Say whether a class inherits methods, of torch's Conv2d for example, whose source is not copied and may look up anything."""
        bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
        return any(base.__module__.partition(".")[0] not in self.export.owned for base in bases)

    def _constructor(self, module: nn.Module, where: str) -> str:
        parameters = list(inspect.signature(type(module)).parameters.values())
        given = []
        for parameter in parameters:
            if parameter.name in ("device", "dtype") or not hasattr(module, parameter.name):
                continue
            value = getattr(module, parameter.name)
            value = value is not None if isinstance(value, torch.Tensor) or parameter.name == "bias" else value
            if value != parameter.default:
                given.append(f"{parameter.name}={literal(value, self.export.name_of, where)}")
        return f"nn.{type(module).__name__}({', '.join(given)})"

    # -------------------------------------------------------------- grids

    def _grids(self) -> str:
        """Write the expression that makes the grid source."""
        plan, source = self.model.edit_conversion.plan, self.model.edit_conversion.runtime.source
        self.export.add_code(ast.parse("source.sizes"))
        fields = {name: getattr(plan.grid, name) for name in type(plan.grid).model_fields if name != "kind"}
        data = ", ".join(f"{name}={literal(value, self.export.name_of, name)}" for name, value in fields.items())
        if isinstance(plan.grid, PositionIds):
            return f"{self._called(_FromIds)}(SimpleNamespace({data}))"
        assert isinstance(plan.grid, SizesOfInputs)
        assert isinstance(source, _FromSizes)
        sites = ", ".join(f"SimpleNamespace(grid=SimpleNamespace(sizes={grid!r}))" for grid in source.grids)
        return f"{self._called(_FromSizes)}(\n    SimpleNamespace({data}),\n    SimpleNamespace(rewritten=[{sites}]),\n)"

    def _called(self, kind: type) -> str:
        name = self.export.name_of(kind)
        self.export.add_constructed(kind)
        return name


def _added(site: ConvertedSite) -> nn.Module:
    """Return the module that conversion added to a site."""
    return cast("nn.Module", getattr(site, ADDED))


def _is_plain(module: nn.Module) -> bool:
    """Say whether a module is one of torch's that its constructor's arguments describe."""
    return getattr(nn, type(module).__name__, None) is type(module) and not list(module.children())


def write_standalone(student: Any, folder: Path) -> None:
    """Write a converted model with its code, or the pipeline that holds it, as diffusers reads it where this package is not.

    Raises:
        CheckpointError: the folder holds another model, or the model cannot stand alone; nothing was written.
    """
    model, name = unwrap(student), None if isinstance(student, nn.Module) else denoiser_name(student)
    place = folder if name is None else folder / name
    if (place / _CONFIG).is_file() and "auto_map" not in json.loads((place / _CONFIG).read_bytes()):
        raise CheckpointError(f"{place} holds another model already; choose another folder")
    source = check_standalone(model)
    if name is not None:
        with_denoiser(student, None).save_pretrained(folder)
    kind: Any = type(model)
    _, original = kind.__bases__
    original.save_pretrained(model, place)
    _write_code(model, place, source)
    if name is not None:
        index = json.loads((folder / PIPELINE_INDEX).read_text()) | {name: [MODULE, standalone_class_name(model)]}
        write_text(folder / PIPELINE_INDEX, json.dumps(index, indent=2) + "\n")
    if not (folder / "README.md").exists():
        write_text(folder / "README.md", _CARD.format(loader="AutoModel" if name is None else "DiffusionPipeline"))


def _check_source(model: ConvertedModel, source: str) -> None:
    """Make the source's model without weights, and compare the names and shapes of its weights with a converted model's.

    Raises:
        CheckpointError: it cannot be made, or has others.
    """
    module = ModuleType(f"{MODULE}_{id(source)}")
    sys.modules[module.__name__] = module  # dataclasses look there
    try:
        exec(compile(source, f"{MODULE}.py", "exec"), vars(module))
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the original class, which was made before
            made = getattr(module, standalone_class_name(model)).from_config(dict(cast("Any", model).config))
    except Exception as error:  # whatever the code of a design may raise where it is alone
        raise CheckpointError(f"{type(model).__name__} cannot stand alone: its source fails, {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[module.__name__]
    here, there = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (model, made))
    if differs := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        raise CheckpointError(f"{type(model).__name__} cannot stand alone: its source has other weights at {some_of(differs)}")


def _write_code(model: ConvertedModel, folder: Path, source: str) -> None:
    """Write a model's source beside its config, and into the config which class of it is the model's."""
    name = standalone_class_name(model)
    write_text(folder / f"{MODULE}.py", source)
    config = json.loads((folder / _CONFIG).read_text())
    config.pop("_name_or_path", None)  # a path of this machine, or the original's name
    config |= {"_class_name": name, "auto_map": {"AutoModel": f"{MODULE}.{name}"}}
    write_text(folder / _CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
