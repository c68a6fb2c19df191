"""What this package uses of torch beyond its public interface: one function each, checked on torch 2.11 and 2.14.

pyproject.toml pins torch below the first version on which they have not been checked.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

TRACES_CONTEXT_VARIABLES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)  # torch.compile follows `ContextVar.get`
TORCH_FOLDER = f"{Path(torch.__file__).parent}{os.sep}"  # the names of torch's own files begin with it
THIS_FILE = __file__
NO_BACKWARD = -1  # what `backward_id` gives outside a backward pass
ROOT_CALL = "_empty_nn_module_stack"  # the path that export notes for operations in no module's forward


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, as under FSDP2 (whose module is not imported for the question: it loads torch's compiler)."""
    return hasattr(tensor, "device_mesh")


def is_compiled_module(module: torch.nn.Module) -> bool:
    """Say whether a module is what torch.compile makes of one, a wrapper with a forward of its own; only if dynamo is loaded."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


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


def lerp_all_(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move tensors towards others in place: tensor + weight * (end - tensor)."""
    torch._foreach_lerp_(tensors, ends, weight)


@contextmanager
def recompile_limit(graphs: int) -> Iterator[None]:
    """Let torch.compile keep up to `graphs` graphs of one function inside."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=graphs):
        yield


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
