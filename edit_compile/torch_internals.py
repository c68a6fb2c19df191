"""What this package uses of torch beyond its public interface: one function each, checked on torch 2.11 and 2.14.

pyproject.toml pins torch below the first version on which they have not been checked.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import math
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

_FROM_2_14 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
TRACES_CONTEXT_VARIABLES = _FROM_2_14  # torch.compile follows `ContextVar.get`
FLEX_TILES_FIT_BLOCKS = _FROM_2_14  # FlexAttention's kernel makes its own choice of tiles fit a mask's blocks
TORCH_FOLDER = f"{Path(torch.__file__).parent}{os.sep}"  # the names of torch's own files begin with it
THIS_FILE = __file__
_FRAMES_OF_AN_OPERATION = 6  # from torch's operator out to the function of torch.distributed that calls it, and some
NO_BACKWARD = -1  # what `backward_id` gives outside a backward pass
ROOT_CALL = "_empty_nn_module_stack"  # the path that export notes for operations in no module's forward


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, as under FSDP2 (whose module is not imported for the question: it loads torch's compiler)."""
    return hasattr(tensor, "device_mesh")


def place_of_shard(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Tell where this process's part of a DTensor is in the whole: its first index and its size in each dimension, by the protocol of
    torch.distributed.checkpoint; and whether another process, before this one, has the same part.
    """
    chunk: Any = tensor.__create_chunk_list__()[0]  # type: ignore[attr-defined]
    coordinate, placements = tensor.device_mesh.get_coordinate(), tensor.placements  # type: ignore[attr-defined]
    is_copy = any(own and placement.is_replicate() for own, placement in zip(coordinate, placements, strict=True))
    return tuple(chunk.offsets), tuple(chunk.sizes), is_copy


def is_communication_error(error: BaseException) -> bool:
    """Say whether an operation of several processes failed: gloo, which has no error of its own, names its source file."""
    return isinstance(error, torch.distributed.DistError) or (type(error) is RuntimeError and "gloo" in str(error).lower())


def is_collective(frame: FrameType | None) -> bool:
    """Say whether a thread's innermost frames are of an operation of several processes, or of a backward pass, in which DDP waits."""
    inner: list[str] = []
    while frame is not None and len(inner) < _FRAMES_OF_AN_OPERATION:
        inner.append(frame.f_code.co_filename.removeprefix(TORCH_FOLDER))
        frame = frame.f_back
    return any(name.startswith(f"distributed{os.sep}") for name in inner) or inner[:1] == [f"autograd{os.sep}graph.py"]


def keep_graphs_in_order() -> None:
    """Have dynamo look through the graphs of what it compiled in the order in which they were made, in the whole process.

    It would move the one that fits to the front, also while other threads look through them: these would miss graphs, and compile them
    again, up to the limit of recompilations.
    """
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]


def keep_strides(options: dict[str, Any]) -> dict[str, Any]:
    """Have Inductor keep the strides of a graph's outputs that are views: options of torch.compile, completed.

    It would only keep their order otherwise, and fails to find it where a stride is a product of two sizes, such as the rows and
    columns of a grid (torch 2.14). Other backends, and versions without that option, get the options as they are.
    """
    if options.get("backend", "inductor") != "inductor":
        return options
    from torch._inductor import config, list_mode_options

    if not hasattr(config, "strict_output_strides"):
        return options
    completed = {"strict_output_strides": True, **(options.get("options") or {})}
    if options.get("options") is None and options.get("mode") is not None:  # torch takes one or the other
        completed |= list_mode_options(options["mode"], options.get("dynamic"))
        options = {name: value for name, value in options.items() if name != "mode"}
    return {**options, "options": completed}


def allow_graphs(options: dict[str, Any], graphs: int) -> dict[str, Any]:
    """Let torch.compile keep up to `graphs` graphs of a function, unless its options name a number: they are returned, completed.

    Before torch 2.14 there is no option for it, and the limit of the process is raised, if that is lower.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": graphs, **options}
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, graphs)
    return options


def is_quantized(tensor: Tensor) -> bool:
    """Say whether a tensor is of a class with operators of its own, as quantized weights are, but not a DTensor."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_sharded(tensor)


def is_compiled_module(module: torch.nn.Module) -> bool:
    """Say whether a module is what torch.compile makes of one, a wrapper with a forward of its own; only if dynamo is loaded."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def without_hooks(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module over the same weights and submodules, without the hooks around its own forward."""
    copied = copy.copy(module)
    hooks = [name for name in vars(torch.nn.Module()) if name.startswith(("_forward", "_backward"))]
    copied.__dict__ |= {name: OrderedDict() for name in hooks}
    return copied


class _AsWritten(torch.nn.Module):
    """Stands for what torch.compile makes of a module: calls the module as it was written, found by its name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__["_modules"]["_orig_mod"]
        return inner if name == "_orig_mod" else getattr(inner, name)


def open_compiled_modules(model: torch.nn.Module) -> None:
    """Have a model call what torch.compile has wrapped in it by its name: export notes no module that is called in another way."""
    for module in list(model.modules()):
        if is_compiled_module(module):
            module.__dict__.pop("forward", None)
            module.__class__ = _AsWritten


def compile_again(module: torch.nn.Module) -> None:
    """Have what torch.compile made of a module call the module that it holds now."""
    initialize: Any = vars(type(module))["_initialize"]
    initialize(module)


_ATTENTION = F.scaled_dot_product_attention


def attention_is_changed() -> bool:
    """Say whether `scaled_dot_product_attention` gives another result here than it should: by a mode that intercepts functions, or as it
    was replaced. Where torch.compile traces a call, any mode counts but a default device; while a model is captured, none.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_dynamo_compiling() and _intercepts_functions()
    if not torch._C._len_torch_function_stack() and F.scaled_dot_product_attention is _ATTENTION:
        return False
    equal, values = torch.zeros(1, 1, 2, 8, device="cpu"), torch.eye(2, 8, device="cpu")[None, None]
    try:
        return not torch.allclose(F.scaled_dot_product_attention(equal, equal, values), values.mean(-2, keepdim=True), atol=0.05)
    except Exception:  # of kernels that run on other devices only
        return False


def _intercepts_functions() -> bool:
    for place in range(torch._C._len_torch_function_stack()):
        if not isinstance(torch._C._get_function_stack_at(place), DeviceContext):
            return True
    return False


_replacing_attention = threading.RLock()


@contextmanager
def attention_replaced(function: Callable[..., Any]) -> Iterator[None]:
    """Put a function in the place of `F.scaled_dot_product_attention` inside, in all threads: one thread at a time does that.

    Args:
        function: is given what it replaces, and the arguments of a call.
    """
    with _replacing_attention, _patched(F, scaled_dot_product_attention=functools.partial(function, F.scaled_dot_product_attention)):
        yield


_HALVES = (torch.float16, torch.bfloat16)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor] | None:
    """Compute softmax attention by a kernel that keeps no scores in memory and returns the logarithm of its normaliser.

    As for `F.scaled_dot_product_attention`, `torch.nn.attention.sdpa_kernel` can rule its kernels out. They give the logarithm no gradient.

    Args:
        q, k, v: (B, H, N, D) and (B, H, M, D), M > 0.
        bias: added to the scores, (B or 1, H or 1, 1, M), in the type of `q`.

    Returns:
        The result, (B, H, N, D), and the logarithm, (B, H, N, 1), in float32 or higher; what they are where every key is masked differs
        from kernel to kernel. None where no kernel computes this, gradients are needed, or the graph is to run without torch's kernels.
    """
    one_type, width, aten = q.dtype == k.dtype == v.dtype, q.shape[-1], torch.ops.aten
    if not one_type or width != v.shape[-1] or q.shape[0] * q.shape[2] == 0 or needs_gradients(q, k, v, bias) or is_exported():
        return None
    kernels = _fused_kernels(q.device.type, q.device.index)
    if not kernels:
        return None
    q, k, v = _in_rows(q), _in_rows(k), _in_rows(v)
    if q.device.type == "cpu" and "flash" in kernels:
        y, logarithm = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    elif bias is None and "flash" in kernels and q.dtype in _HALVES and width % 8 == 0 and width <= 256:
        y, logarithm, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    elif "efficient" in kernels and (q.dtype == torch.float32 or q.dtype in _HALVES) and width % 8 == 0:
        if bias is not None:  # its rows must begin at multiples of 16 bytes
            keys = k.shape[2]
            bias = F.pad(bias, (0, -keys % 8))[..., :keys].expand(*q.shape[:3], keys)
        y, logarithm, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    else:
        return None
    return y, logarithm[:, :, : q.shape[2], None]  # some kernels fill its rows up


def _in_rows(x: Tensor) -> Tensor:
    """Have the numbers of each row one after the other: the kernels take that for granted, the one for CPUs without a check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Say whether what is computed of tensors here is differentiated."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


_torch_runs_exports = False


@contextmanager
def exporting_for_torch() -> Iterator[None]:
    """Let graphs that torch.export makes inside call torch's own fused kernels: it is torch that will run them."""
    with _patched(sys.modules[__name__], _torch_runs_exports=True):
        yield


def is_exporting() -> bool:
    """Say whether torch.export makes a graph: traced by torch.compile, torch 2.11 answers its own question always with yes."""
    return torch.compiler._is_exporting_flag if torch.compiler.is_dynamo_compiling() else torch.compiler.is_exporting()


def is_exported() -> bool:
    """Say whether a graph is made that other programs read: decomposed, as for ONNX, the kernel on CPUs loses its logarithm."""
    return (is_exporting() and not _torch_runs_exports) or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _fused_kernels(device: str, index: int | None) -> tuple[str, ...]:
    """List which of the kernels "flash" and "efficient" a device has and `torch.nn.attention.sdpa_kernel` allows."""
    flash: bool = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    efficient: bool = torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    if device == "cpu":
        return ("flash",) * flash
    if device != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(index) < (8, 0):
        return ()
    return ("flash",) * flash + ("efficient",) * efficient


_fused_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result, which loads dynamo


def has_autocast(device: str) -> bool:
    """Say whether a device has autocast; torch.compile takes it for a constant, for torch 2.11 cannot trace the question."""
    return torch.amp.is_autocast_available(device)


has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mark_dynamic(tensor: Tensor) -> None:
    """Keep all of a tensor's sizes symbolic from the first graph on, without an error where they cannot be; only if dynamo is loaded."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.maybe_mark_dynamic(tensor, list(range(tensor.ndim)))


def backward_id() -> int:
    """Tell the number of the backward pass that is running in this thread, `NO_BACKWARD` if none is. Nested ones have their own."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Call a function when the running backward pass has ended; never, if it fails."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def change_count(tensor: Tensor) -> int | None:
    """Count how often a tensor was written to; None for tensors of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


def lazy_copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors without copying their memory before one of the two is written to, in whatever way; kernels that take raw pointers
    count as writing. Tensors that share memory go on sharing theirs. Memory that is not torch's own, like a mapped file, is copied at once.
    """
    return _over_lazy_memory(tensors, foreign=_copied)


def watch_writes(tensors: list[Tensor]) -> None:
    """Have `is_lazy_copy` tell from now on whether tensors were written to, in place, as far as their memory is torch's own."""
    for tensor, watched in zip(tensors, _over_lazy_memory(tensors, foreign=lambda memory: memory), strict=True):
        if not tensor.is_inference():
            tensor.data = watched


def _copied(memory: Tensor) -> Tensor:
    """Copy a tensor at once, into memory of torch's own whose writes are told if the device can do that."""
    copied = memory.clone()
    try:
        return torch._lazy_clone(copied)
    except RuntimeError:
        return copied


@torch.inference_mode(False)
def _over_lazy_memory(tensors: list[Tensor], foreign: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Make tensors like those given over lazy copies of all of their memory, or what is made of it if it is not torch's own."""
    memory: dict[int, Tensor] = {}
    found = []
    for tensor in tensors:
        storage, empty = tensor.untyped_storage(), tensor.detach().new_empty(0)
        if storage._cdata not in memory:
            whole = empty.set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))
            try:
                memory[storage._cdata] = torch._lazy_clone(whole)
            except RuntimeError:
                memory[storage._cdata] = foreign(whole)
        made = memory[storage._cdata].untyped_storage()
        found.append(tensor.detach().new_empty(0).set_(made, tensor.storage_offset(), tensor.shape, tensor.stride()))
    return found


def memory_id(tensor: Tensor) -> int:
    """Tell tensors by the memory that they are in. Unlike `data_ptr`, this writes nothing: a lazy copy stays one."""
    return int(tensor.untyped_storage()._cdata)


def is_lazy_copy(tensor: Tensor) -> bool:
    """Say whether nothing has been written to a tensor since `lazy_copies` made it or copied it."""
    is_lazy: Callable[[Tensor], bool] = getattr(torch._C, "_is_cow_tensor")  # noqa: B009 (no type checker sees it)
    return is_lazy(tensor)


def lerp_all_(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move tensors towards others in place: tensor + weight * (end - tensor)."""
    torch._foreach_lerp_(tensors, ends, weight)


def drop_size_checks(program: ExportedProgram) -> None:
    """Drop the checks of example sizes that export adds to the module it decomposes: they refer to names it does not define."""
    program._guards_code = []


_UNKNOWN_SIZE = 100_003  # a prime: what stands in for the first size that only the data tells


def known_size(size: int | torch.SymInt) -> int | None:
    """Return the value of a size in the example that was captured; None for one that only the data tells."""
    if not isinstance(size, torch.SymInt):
        return size
    try:
        hint: Any = size.node.hint
    except Exception:  # torch raises various ones
        return None
    return int(hint) if hint is not None and not _unbacked(size) else None


def _unbacked(size: torch.SymInt) -> list[Any]:
    """List the symbols of a size that only the data tells."""
    return [symbol for symbol in size.node.expr.free_symbols if str(symbol).startswith("u")]


def size_hint(size: torch.SymInt) -> int:
    """Return the value that a symbolic size has in the example that was captured.

    One that only the data tells gets a number of its own, far from all others: the same wherever it is computed from the same.
    """
    known = known_size(size)
    if known is not None:
        return known
    expr: Any = size.node.expr
    shapes: Any = size.node.shape_env
    for symbol in _unbacked(size):
        expr = expr.subs(symbol, _UNKNOWN_SIZE + 2 * int(str(symbol)[1:]))
    for symbol in expr.free_symbols:
        expr = expr.subs(symbol, shapes.backed_var_to_val[symbol])
    return int(expr)


def size_expression(size: torch.SymInt) -> str:
    """Return a symbolic size as an expression in the symbols of a captured graph."""
    return str(size.node.expr)


def conditions_on(sizes: Mapping[str, torch.SymInt]) -> list[str]:
    """List the conditions on numbers, and on nothing else, under which a captured graph is valid, as Python expressions.

    Those of torch's own that tell sizes 0 and 1 from others are left out: graphs hold for these too where the model does.

    Args:
        sizes: by the code that reads it, each number that the graph takes; of one capture.
    """
    from torch.utils._sympy.printers import PythonPrinter

    if not sizes:
        return []
    code = {size.node.expr: reading for reading, size in sizes.items() if size.node.expr.is_symbol}
    written = PythonPrinter()
    written._print_Symbol = lambda symbol: code[symbol]
    found = []
    shapes: Any = next(iter(sizes.values())).node.shape_env
    for guard in shapes.guards:
        symbols = guard.expr.free_symbols
        small = guard.expr.is_Relational and guard.expr.lhs.is_symbol and guard.expr.rhs in (-1, 0, 1, 2)
        if symbols and symbols <= set(code) and not small:
            found.append(written.doprint(guard.expr))
    return list(dict.fromkeys(found))


def broken_condition(inputs: Mapping[str, Tensor], sizes: list[tuple[int, ...]]) -> str | None:
    """Find a condition on sizes that a captured graph holds under, and that other sizes of its inputs break; None if there is none.

    Args:
        inputs: of the graph by name, as they were captured.
        sizes: other ones for each.
    """
    import sympy

    values: dict[Any, int] = {}
    named: dict[Any, Any] = {}
    shapes: Any = None
    for (name, tensor), others in zip(inputs.items(), sizes, strict=True):
        for dim, (size, other) in enumerate(zip(tensor.shape, others, strict=True)):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                values[size.node.expr], shapes = other, size.node.shape_env
                named.setdefault(size.node.expr, sympy.Symbol(f"{name}.shape[{dim}]"))
    for guard in shapes.guards if shapes is not None else ():
        known = bool(guard.expr.free_symbols) and guard.expr.free_symbols <= values.keys()
        if known and not isinstance(guard.expr, sympy.Ne) and guard.expr.subs(values) == sympy.false:  # of !=, sizes met one special size
            return str(guard.expr.subs(named))
    return None


def equations_of_sizes(inputs: Sequence[Tensor], name: Callable[[int, int], str]) -> list[str]:
    """List what a captured graph takes for granted of its inputs' open sizes, as Python expressions: which equal others, or are computed of
    them, and the equations under which it was captured, such as that one is even.

    Args:
        inputs: as they were captured.
        name: writes the size of an input's dimension, by the numbers of both.
    """
    import sympy
    from torch.utils._sympy.printers import PythonPrinter

    open_sizes: dict[str, Any] = {
        name(number, dim): size
        for number, tensor in enumerate(inputs)
        for dim, size in enumerate(tensor.shape)
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols
    }
    code: dict[Any, str] = {}
    for own, size in open_sizes.items():
        if size.node.expr.is_symbol:
            code.setdefault(size.node.expr, own)
    written = PythonPrinter()
    written._print_Symbol = lambda symbol: code[symbol]
    found = []
    for own, size in open_sizes.items():
        if size.node.expr.free_symbols <= code.keys() and code.get(size.node.expr) != own:
            found.append(f"{own} == {written.doprint(size.node.expr)}")
    for size in list(open_sizes.values())[:1]:
        guards = [guard.expr for guard in size.node.shape_env.guards]
        equations = [expr for expr in guards if isinstance(expr, sympy.Eq) and expr.free_symbols and expr.free_symbols <= code.keys()]
        found += map(written.doprint, equations)
    return list(dict.fromkeys(found))


def writes_into_operand(target: object) -> bool:
    """Say whether an operator of a graph writes into one of its operands."""
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))


# ------------------------------------------------------------------ while a model is captured


_DATA: Any = getattr(Tensor.data, "__get__")  # noqa: B009 (of a descriptor made when torch is loaded)


class _MakesConstants(TorchFunctionMode):
    """Makes tensors of plain numbers on the CPU, in full precision, and brings them to their device and dtype after."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and args and _plain_numbers(args[0]):
            return _constant(args[0], kwargs.pop("dtype", None), kwargs.pop("device", None))
        if func is Tensor.new_tensor and len(args) == 2 and _plain_numbers(args[1]):
            like, data = args
            return _constant(data, kwargs.pop("dtype", None) or like.dtype, kwargs.pop("device", None) or like.device)
        if func == _DATA:
            return args[0].detach()  # an alias, too, and one that a graph can hold
        return func(*args, **kwargs)


def _plain_numbers(data: Any) -> bool:
    return all(isinstance(leaf, bool | int | float | complex) for leaf in pytree.tree_leaves(data))


def _constant(data: Any, dtype: torch.dtype | None, device: Any) -> Tensor:
    made = torch.tensor(data, dtype=torch.float64 if dtype is not None and dtype.is_floating_point else dtype, device="cpu")
    return made.to(device=device or torch.get_default_device(), dtype=dtype)


@contextmanager
def constants_with_content() -> Iterator[None]:
    """Keep the content of tensors that a forward makes of plain numbers, and their casts in the graph, inside.

    Those that it makes of open sizes, which export cannot make on the meta device, are stacked.
    """
    import torch._refs

    with _MakesConstants(), _patched(torch._refs, tensor=_of_sizes):
        yield


def _of_sizes(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    """Make what `torch.tensor` makes, of numbers that may be open sizes."""
    if dtype is None:
        numbers = pytree.tree_leaves(data)
        whole, truth = (all(isinstance(each, kind) for each in numbers) for kind in (int | torch.SymInt, bool | torch.SymBool))
        dtype = torch.bool if truth else torch.int64 if whole else torch.get_default_dtype()
    if isinstance(data, list | tuple):
        return torch.stack([_of_sizes(each, dtype=dtype, device=device) for each in data])
    if isinstance(data, Tensor):
        return data.detach().to(device, dtype, copy=True)
    return torch.scalar_tensor(data, dtype=dtype, device=device or torch.get_default_device())


@contextmanager
def eager_instead_of_compiled() -> Iterator[None]:
    """Run what torch.compile has wrapped as it was written, inside."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def autocast_without_effect() -> Iterator[None]:
    """Enter regions of autocast without effect in this thread, as decorators too; devices that have none are taken for the CPU."""
    from torch.amp.autocast_mode import autocast

    here = threading.get_ident()
    original: Any = autocast
    make, enter, leave = original.__init__, original.__enter__, original.__exit__

    def made(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    def entered(self: Any) -> Any:
        return self if threading.get_ident() == here else enter(self)

    def left(self: Any, *error: Any) -> Any:
        return None if threading.get_ident() == here else leave(self, *error)

    with _patched(autocast, __init__=made, __enter__=entered, __exit__=left):
        yield


@contextmanager
def export_unseen() -> Iterator[None]:
    """Answer code outside torch that asks whether it is being exported with no, so that it does what it does in a call."""
    original = torch.compiler.is_exporting

    def is_exporting() -> bool:
        asks = str(sys._getframe(1).f_globals.get("__name__"))
        return asks.partition(".")[0] == "torch" and original()

    with _patched(torch.compiler, is_exporting=is_exporting):
        yield


@contextmanager
def _patched(target: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes inside; those that were not there are gone after."""
    own = {name: vars(target)[name] for name in attributes if name in vars(target)}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in attributes:
            setattr(target, name, own[name]) if name in own else delattr(target, name)


_LN2, _LOG10_2 = math.log(2), math.log10(2)
_log2: Callable[[Any], Any] = getattr(torch, "_sym_log2")  # noqa: B009 (made when torch is loaded: no type checker sees it)
_SYMBOLIC: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(torch, f"_sym_{name}") for name in ("sqrt", "sin", "cos", "tan", "tanh", "sinh", "cosh", "log2")},
    "log": lambda x: _log2(x) * _LN2,
    "log10": lambda x: _log2(x) * _LOG10_2,
    "exp": lambda x: math.e ** torch.sym_float(x),
}
_OF_MATH: dict[str, Callable[..., Any]] = {
    **_SYMBOLIC,
    "pow": lambda x, y: torch.sym_float(x) ** y,
    "isqrt": lambda x: torch.sym_int(torch.sym_sqrt(x)),
}
_OF_NUMPY: dict[str, Callable[[Any], Any]] = {
    **_SYMBOLIC,
    "ceil": lambda x: torch.sym_float(math.ceil(x)),
    "floor": lambda x: torch.sym_float(math.floor(x)),
    "rint": lambda x: torch.sym_float(round(x)),
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1 / x,
}


def is_symbolic(value: object) -> bool:
    """Say whether a number is symbolic."""
    return isinstance(value, torch.SymInt | torch.SymFloat)


@contextmanager
def symbolic_math() -> Iterator[None]:
    """Have functions of `math` and numpy's on one number keep sizes symbolic inside; left alone, they fail or take the example's."""

    def on_sizes(plain: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            open_sizes = any(map(is_symbolic, args)) and (len(args) == 1 or plain is math.pow)
            return symbolic(*args) if open_sizes else plain(*args)

        return functools.update_wrapper(function, plain)

    methods: dict[str, Any] = {name: lambda size, run=run: run(size) for name, run in _OF_NUMPY.items()}  # what numpy calls on objects
    functions = {name: on_sizes(getattr(math, name), symbolic) for name, symbolic in _OF_MATH.items()}
    with _patched(torch.SymInt, **methods), _patched(torch.SymFloat, **methods), _patched(math, **functions):
        yield


@contextmanager
def counting_plain_numbers(count: list[int]) -> Iterator[None]:
    """Count in `count[0]` how often a symbolic number is made a plain one inside, by `int`, `float` or `len`; torch's own do not count."""

    def counted(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def function(size: Any) -> Any:
            count[0] += not sys._getframe(1).f_code.co_filename.startswith(TORCH_FOLDER)
            return convert(size)

        return function

    length: Callable[[Tensor], int] = Tensor.__len__

    def counted_length(tensor: Tensor) -> int:
        count[0] += is_symbolic(tensor.shape[0]) and not sys._getframe(1).f_code.co_filename.startswith(TORCH_FOLDER)
        return length(tensor)

    with ExitStack() as stack:
        for kind in (torch.SymInt, torch.SymFloat):
            found = {name: counted(vars(kind)[name]) for name in ("__int__", "__float__") if name in vars(kind)}
            stack.enter_context(_patched(kind, **found))
        stack.enter_context(_patched(Tensor, __len__=counted_length))
        yield


@contextmanager
def hashable_sizes() -> Iterator[None]:
    """Let symbolic sizes be hashed inside, as the numbers that they are in the example, which fixes them to these."""
    with _patched(torch.SymInt, __hash__=lambda size: hash(int(size))):
        yield


def symbolic_int() -> Any:
    """Make a stand-in for `int` whose calls keep symbolic numbers symbolic."""
    return _number_type(int, torch.sym_int)


def symbolic_float() -> Any:
    """Make a stand-in for `float` whose calls keep symbolic numbers symbolic."""
    return _number_type(float, torch.sym_float)


def symbolic_len(sized: Any) -> Any:
    """Do what `len` does, but keep a tensor's symbolic: `len` itself returns plain numbers alone."""
    return sized.shape[0] if isinstance(sized, Tensor) and sized.ndim else len(sized)


def _number_type(plain: type, symbolic: Callable[[Any], Any]) -> Any:
    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return symbolic(args[0]) if len(args) == 1 and is_symbolic(args[0]) else plain(*args, **kwargs)

        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, plain)

        def __subclasscheck__(cls, kind: type) -> bool:
            return issubclass(kind, plain)

        def __eq__(cls, other: object) -> bool:
            return other is plain or other is cls

        def __hash__(cls) -> int:
            return hash(plain)

    return Meta(plain.__name__, (plain,), {})


_ANALYSIS = ("evaluate_expr", "_maybe_evaluate_static", "simplify", "replace", "produce_guards_verbose")  # where sympy is called from


_BETWEEN_READINGS = 0.05  # seconds


@dataclass(frozen=True)
class _Reading:
    """What a thread's clock of computing said, and when, by the time of day; both in seconds."""

    at: float
    seconds: float


class SymbolicAnalysis:
    """The questions to a graph's symbolic sizes, of one thread.

    Attributes:
        thread: whose.
        seconds: of computing, for all that are answered.
        began: when the one that is being answered began, by the time of day; None between questions.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.seconds = 0.0
        self.began: float | None = None
        self.computed = _Reading(time.monotonic(), _computed(self.thread))

    def begin(self) -> None:
        """Note that a question is asked.

        Most are answered in microseconds, in which the clock of computing cannot be read: it is read now and then.
        """
        now = time.monotonic()
        if now - self.computed.at > _BETWEEN_READINGS:
            self.computed = _Reading(now, _computed(self.thread))
        self.began = now

    def end(self) -> None:
        """Note that it is answered."""
        assert self.began is not None
        now = time.monotonic()
        taken = now - self.began
        if taken > _BETWEEN_READINGS / 10:
            before, self.computed = self.computed, _Reading(now, _computed(self.thread))
            taken = min(taken, self.computed.seconds - before.seconds)
        self.seconds += taken
        self.began = None

    def seconds_so_far(self) -> float:
        """Return the seconds of computing, with those of a question that is not answered yet. Any thread may ask."""
        began, computed = self.began, self.computed
        if began is None:
            return self.seconds
        return self.seconds + min(time.monotonic() - began, _computed(self.thread) - computed.seconds)


def _computed(thread: int) -> float:
    """Return the seconds that a thread has computed; where the system does not tell, the time of day."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    except (AttributeError, OSError):
        return time.monotonic()


@contextmanager
def timing_symbolic_analysis(report: Callable[[float], None]) -> Iterator[SymbolicAnalysis]:
    """Measure symbolic analysis inside, in this thread.

    Args:
        report: called in this thread after each question with the seconds so far. It may raise, which ends the capture.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    found = SymbolicAnalysis()

    def timed(question: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(question)
        def asked(*args: Any, **kwargs: Any) -> Any:
            if found.began is not None or threading.get_ident() != found.thread:  # part of a question, or another's
                return question(*args, **kwargs)
            found.begin()
            try:
                return question(*args, **kwargs)
            finally:
                found.end()
                report(found.seconds)

        return asked

    with _patched(ShapeEnv, **{name: timed(vars(ShapeEnv)[name]) for name in _ANALYSIS if name in vars(ShapeEnv)}):
        yield found


_PURE = (f"{os.sep}sympy{os.sep}", f"torch{os.sep}utils{os.sep}_sympy{os.sep}")  # folders of functions that leave nothing half done


def raise_in_sympy(thread: int, error: type[BaseException]) -> bool:
    """Raise an exception in another thread if it is computing with symbols right now, and not otherwise; say whether.

    Looking into a thread that exports keeps its tensors alive longer and makes constants of them: what it exports is spoilt.
    """
    frame = sys._current_frames().get(thread)
    if frame is None or not any(part in frame.f_code.co_filename for part in _PURE):
        return False
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
    return True


def withdraw(thread: int) -> None:
    """Take back an exception that was to be raised in a thread and has not been."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)


class SymbolicShapes:
    """Makes symbolic sizes, and tensors of such sizes, that belong together. A context, in which they are made."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._shapes = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._shapes)

    def __enter__(self) -> SymbolicShapes:
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def symbol(self, name: str, value: int) -> Any:
        """Make a size that is `value` in the example."""
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        source = ConstantSource(name)
        symbol = self._shapes.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        return self._shapes.create_symintnode(symbol, hint=value, source=source)

    def tensor(self, sizes: list[Any], like: Tensor) -> Tensor:
        """Make a tensor without content, of these sizes and of the dtype and device of another."""
        return torch.empty(sizes, dtype=like.dtype, device=like.device)
