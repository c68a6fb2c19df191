"""Which weights a converted model shares with the model it was made from, and which are its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edit_compile.errors import ConfigError, EditCompileError, RewriteError, some_of
from edit_compile.student.handle import ConvertedModel, unwrap
from edit_compile.student.lora import (
    adapt_teachers,
    has_foreign_adapters,
    lora_layers,
    lora_names,
    may_have_foreign_adapters,
    plain_name,
    without_lora,
)
from edit_compile.student.shared import has_values
from edit_compile.student.site import ConvertedSite, converted_sites
from edit_compile.torch_internals import is_lazy_copy, is_sharded, lazy_copies, watch_writes

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # what torch's wrappers call what they hold
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shared_copy(model: nn.Module, *, read_only: bool = False) -> nn.Module:
    """Copy a module tree over the same memory, until one of the two is written to: neither sees what is written to the other.

    The copy's parameters are frozen (see `unshare`). Tensors of a class of their own (quantized ones), and sparse ones, are copied.

    Args:
        read_only: neither is written to, and mapped files stay what they are.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    shared = [each for each in tensors if has_values(each) or (each.is_meta and type(each) in (Tensor, nn.Parameter))]
    memo: dict[int, Any] = {}
    for tensor, copied in zip(shared, [t.detach() for t in shared] if read_only else lazy_copies(shared), strict=True):
        memo[id(tensor)] = nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
    with torch.no_grad():
        return copy.deepcopy(model, memo)


def modules_outside(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules outside the converted sites by path, shared ones under each of theirs."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, ConvertedSite):
            yield from modules_outside(child, f"{path}.{name}" if path else name)


def shared_tensors(student: ConvertedModel, modules: Iterable[tuple[str, nn.Module]] | None = None) -> dict[str, Tensor]:
    """List the weights and buffers outside the sites that are to be the original's, under the names that they have there.

    Args:
        modules: those outside the sites, if they were listed before.
    """
    conversion, found = student.edit_conversion, {}
    for path, module in modules_outside(student) if modules is None else modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            plain = plain_name(student, f"{path}.{name}" if path else name)
            in_state = plain in conversion.fingerprint or name in module._non_persistent_buffers_set
            if tensor is not None and in_state and plain not in conversion.originals:
                found[plain] = tensor
    return found


def record_shared(student: ConvertedModel) -> None:
    """Take the weights and buffers outside the sites for the original's."""
    tensors, conversion = shared_tensors(student), student.edit_conversion
    conversion.shared.record(tensors, tables=tensors.keys() - conversion.fingerprint.keys())


class Changes(NamedTuple):
    """What is not the original's any more outside the sites.

    Attributes:
        gone: weights that are no longer in the model: their modules were replaced or parametrized, or removed.
        forwards: modules that run another module's method as their forward, where some LoRA libraries put theirs.
        written: weights and buffers that were changed without `unshare`: see `SharedWeights.written`.
    """

    gone: list[str]
    forwards: list[str]
    written: list[str]


def changes_of(student: ConvertedModel, *, thoroughly: bool = False) -> Changes:
    """Name what is not the original's any more outside the sites, in one walk over the modules: calls of the teacher wait for it."""
    modules, conversion = list(modules_outside(student)), student.edit_conversion
    tensors = shared_tensors(student, modules)
    missing = (name for name in conversion.shared.names() if name not in tensors and name not in conversion.originals)
    on_disk = any(is_on_disk(module) for _, module in modules)
    return Changes(
        [name for name in missing if not _has_tensor(student, name)],
        [path for path, module in modules if _runs_another(module)],
        [] if on_disk else conversion.shared.written(tensors, thoroughly=thoroughly),
    )


def _runs_another(module: nn.Module) -> bool:
    owner = getattr(vars(module).get("forward"), "__self__", module)
    return isinstance(owner, nn.Module) and owner is not module


def _has_tensor(model: nn.Module, name: str) -> bool:
    """Say whether a tensor is where its name says, also behind wrappers, or where FSDP1 puts views of its own."""
    owner, _, leaf = name.rpartition(".")
    try:
        module: nn.Module | None = model.get_submodule(owner)
    except AttributeError:
        return False
    while module is not None:
        if any(leaf in names for names in (module._parameters, module._buffers, vars(module))):
            return True
        if callable(getattr(module, leaf, None)):  # of torch's quantized modules, which pack what they hold
            return True
        module = next((module._modules[part] for part in _WRAPPED if part in module._modules), None)
    return False


def require_original_weights(student: ConvertedModel) -> None:
    """Refuse to run a student's weights as the original's that are not.

    Raises:
        EditCompileError: there are such.
    """
    gone, forwards, written = changes_of(student)
    if gone:
        raise EditCompileError(
            f"the teacher is not the original model: {some_of(gone)} outside the converted sites is not where it was, for its module was "
            "replaced or parametrized; undo that, or run the original model"
        )
    if forwards:
        raise EditCompileError(
            f"the teacher is not the original model: {some_of(forwards)} outside the converted sites runs another module's forward, as "
            "LoRA of some libraries does; take that off, or run the original model"
        )
    if written:
        raise EditCompileError(
            f"the teacher is not the original model: {some_of(written)} outside the converted sites were written to; call "
            "edit_compile.unshare(student) before LoRA is fused, weights are loaded or trained there, or run the original model"
        )


def moving(student: ConvertedModel, move: Callable[[], object]) -> None:
    """Move or cast a student, and go on telling what is written to the weights outside its sites."""
    shared, lost = student.edit_conversion.shared, changes_of(student).written
    move()
    moved = shared_tensors(student)
    watch_writes([tensor for tensor in moved.values() if has_values(tensor) and not is_lazy_copy(tensor)])
    shared.follow(moved, lost)


def unshare(student: Any, include: Iterable[str] = ("*",)) -> list[str]:
    """Give a converted model weights of its own outside its sites as well, so that they can be trained.

    `linearize` freezes them. The original weights are kept for `teacher`, which cannot run if these weights are written to without this.
    Call it before an optimizer, DDP or FSDP takes the parameters.

    Args:
        student: a converted model, or what holds one: a pipeline, DDP, torch.compile, PEFT.
        include: globs over names of parameters outside the sites.

    Returns:
        The names of all weights outside the sites that are the student's own now.

    Raises:
        ConfigError: a glob matches no weight outside the sites.
        EditCompileError: the student's weights are sharded or offloaded, have LoRA, or were written to before.
    """
    return own_weights(unwrap(student), include)


def own_weights(model: ConvertedModel, include: Iterable[str] = ("*",), *, read_only: bool = False) -> list[str]:
    """Do what `unshare` does.

    Args:
        read_only: nothing is written to the weights until they are sharded: their memory stays the original's.

    Raises:
        ConfigError, EditCompileError: as `unshare`.
    """
    sites = tuple(f"{path}." for path in converted_sites(model))
    shared = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point() and not n.startswith(sites)]
    for glob in (globs := (include,) if isinstance(include, str) else tuple(include)):
        if not any(fnmatchcase(name, glob) for name, _ in shared):
            raise ConfigError(f"{glob!r} matches no weight outside the converted sites; there are: {some_of(n for n, _ in shared)}")
    if lora_layers(model):
        raise EditCompileError("weights with LoRA cannot be unshared: call edit_compile.unshare before LoRA is added, or merge that first")
    originals = model.edit_conversion.originals
    if changed := [name for name in changes_of(model, thoroughly=True).written if any(fnmatchcase(name, glob) for glob in globs)]:
        raise EditCompileError(
            f"{some_of(changed)} were written to before, so that the original weights are not here any more: save the student, load it, "
            "and go on with that"
        )
    copies: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for name, parameter in shared:
        if name in originals or not any(fnmatchcase(name, glob) for glob in globs):
            continue
        if is_sharded(parameter) or parameter.is_meta:
            raise EditCompileError(f"{name} is sharded or offloaded; call edit_compile.unshare before wrapping the model")
        owner, _, leaf = name.rpartition(".")
        originals[name] = parameter
        values = parameter.detach()
        setattr(model.get_submodule(owner), leaf, copies.setdefault(id(parameter), nn.Parameter(values if read_only else values.clone())))
    return list(originals)


def forget_originals(model: nn.Module) -> None:
    """Let go of the values of the original weights that `unshare` keeps, of a model whose own are sharded: names and sizes stay.

    No teacher can be made of it any more: one that was made before has them.
    """
    originals = unwrap(model).edit_conversion.originals
    originals |= {name: nn.Parameter(original.detach().to("meta"), requires_grad=False) for name, original in originals.items()}


class OriginalWeights:
    """Gives the teacher of a model that was unshared: a copy of the module tree, over the same weights but those trained.

    Putting the original weights into the model itself for a while would put them into every other call that is running.
    """

    def __init__(self, adapters: bool = False) -> None:
        self.adapters = adapters
        self.made: tuple[Any, nn.Module] | None = None  # and what it was made of: replaced at once, for threads may meet here

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return the copy; a new one whenever the model was moved or cast.

        Raises:
            EditCompileError: the trained weights are sharded or offloaded.
        """
        state, made = [(id(t), t.device, t.dtype) for t in itertools.chain(model.parameters(), model.buffers())], self.made
        if made is None or made[0] != state:
            self.made = made = (state, with_original_weights(model, self.adapters))
        return made[1]


def original_below(model: nn.Module) -> nn.Module | None:
    """Return the model whose forward, as the teacher, runs below a converted model's `min_tokens`: itself, unless it was unshared.

    None if there is none: adapters are on it that are not its own, and may be in the sites, whose teachers do not have them; or weights
    outside the sites were written to, as by fusing LoRA. Compiled as a whole, a model is asked for adapters alone.
    """
    assert isinstance(model, ConvertedModel)
    conversion = model.edit_conversion
    if may_have_foreign_adapters(model) if torch.compiler.is_compiling() else has_foreign_adapters(model) or any(changes_of(model)):
        return None
    if not conversion.originals:
        return model
    conversion.original = conversion.original or OriginalWeights()
    return conversion.original(model)


def with_original_weights(model: nn.Module, adapters: bool = False) -> nn.Module:
    """Copy the module tree of a converted model over the same weights and the same handle, with the original weights outside the sites.

    Args:
        adapters: with the adapters that PEFT put into the model, on the original weights of the sites too.

    Raises:
        EditCompileError: the trained weights are sharded or offloaded.
    """
    assert isinstance(model, ConvertedModel)
    conversion = model.edit_conversion
    own = {plain_name(model, name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    memo: dict[int, Any] = {id(conversion): conversion, id(conversion.runtime): conversion.runtime}
    memo |= {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    for site in converted_sites(model).values():
        memo[id(site.edit_teacher)] = site.edit_teacher
    for name, original in conversion.originals.items():
        parameter = own[name]
        if is_sharded(parameter) or parameter.is_meta:
            raise EditCompileError(
                f"{name} was trained, and is sharded or offloaded now: the teacher cannot take its place; "
                "run the original model as the teacher"
            )
        memo[id(parameter)] = nn.Parameter(original.detach().to(parameter), requires_grad=False)
    copied = copy.deepcopy(model, memo)
    if adapters:
        adapt_teachers(copied)
    return copied


def separate_teacher(student: nn.Module) -> nn.Module:
    """Copy the module tree of a converted model over the same weights, the original ones outside the sites, with a handle of its own.

    Weights that `unshare` gives the student afterwards are not the copy's. Moving the student moves what they share.
    """
    assert isinstance(student, ConvertedModel)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(student.parameters(), student.buffers())}
    for site in converted_sites(student).values():
        memo[id(site.edit_teacher)] = site.edit_teacher
    own = {plain_name(student, name): p for name, p in student.named_parameters(remove_duplicate=False)}
    memo |= {id(own[name]): original for name, original in student.edit_conversion.originals.items()}
    teacher = copy.deepcopy(student, memo)
    teacher.edit_conversion.originals = {}
    return teacher


def original_state(student: ConvertedModel) -> dict[str, Tensor]:
    """Make the state dict of the model that a student was made from."""
    sites, originals = converted_sites(student), student.edit_conversion.originals
    prefixes = tuple(f"{path}." for path in sites)
    state = {name: t for name, t in without_lora(student, student.state_dict()).items() if not name.startswith(prefixes)}
    for path, site in sites.items():
        state |= {f"{path}.{name}": tensor for name, tensor in site.edit_teacher.state_dict().items()}
    return state | {name: original.detach().to(state[name]) for name, original in originals.items()}


def trained_tensors(student: ConvertedModel, also: Iterable[str] = ()) -> dict[str, Tensor]:
    """List what is a student's own: the state of its sites, what was unshared, and LoRA.

    The names are those of its state dict, but for unshared weights that LoRA renames (see `student.lora`).

    Args:
        also: names of other weights to list.
    """
    prefixes, unshared = tuple(f"{path}." for path in converted_sites(student)), {*student.edit_conversion.originals, *also}
    adapters, named = lora_names(student), ((plain_name(student, name), name, t) for name, t in student.state_dict().items())
    return {plain: t.detach() for plain, name, t in named if plain.startswith(prefixes) or plain in unshared or name in adapters}


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Look at all numbers that are here.

    Raises:
        RewriteError: a tensor holds NaN or infinity; says which.
    """
    for name, tensor in tensors:
        known = tensor.dtype in _NUMBERS and tensor.numel() and has_values(tensor)
        if known and not all(bound.isfinite() for bound in torch.aminmax(tensor.detach())):
            raise RewriteError(f"{what}: the weight {name} holds NaN or infinity; load the weights again, or restore an earlier state")


def is_on_disk(module: nn.Module) -> bool:
    """Ask diffusers' group offloading, whose parameters hold anything while their values are in a file."""
    registry = vars(module).get("_diffusers_hook")
    hook = registry.get_hook("group_offloading") if registry is not None else None
    return getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None
