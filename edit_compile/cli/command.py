"""What all commands have in common: errors in one line, progress, and how signals end them."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

import click

from edit_compile.errors import EditCompileError, Interrupted
from edit_compile.progress import listening
from edit_compile.stop_signals import stopped_status, stopping_on_signals

if TYPE_CHECKING:
    from edit_compile.ir.plan import Plan
    from edit_compile.progress import Listener

HELP_NAMES = {"help_option_names": ["-h", "--help"]}
_LINE, _QUIET, _VERBOSE = f"{__name__}.line", f"{__name__}.quiet", f"{__name__}.verbose"


class Command(click.Command):
    """A command with -h, -q, -v and --json, whose errors are one line each, and which shows on a terminal how far it is."""

    def __init__(self, name: str | None, *, examples: str, **options: Any) -> None:
        """
        Args:
            examples: command lines, without the program's name.
        """
        lines = "\n".join(f"  edit-compile {line}" for line in examples.strip().splitlines())
        super().__init__(name, epilog=f"\b\nExamples:\n{lines}", context_settings=HELP_NAMES, **options)
        self.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="print JSON on stdout and nothing else"),
            _flag("quiet", "-q", _QUIET, "print results and errors only"),
            _flag("verbose", "-v", _VERBOSE, "print what is done, with times, and where errors come from"),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        with _errors_in_one_line(), _said(), listening(_display()):
            return super().invoke(ctx)


def _flag(name: str, short: str, key: str, help_text: str) -> click.Option:
    def keep(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[key] = value

    return click.Option([short, f"--{name}"], is_flag=True, expose_value=False, callback=keep, help=help_text)


def is_quiet() -> bool:
    """Say whether -q was given."""
    return bool(click.get_current_context().meta.get(_QUIET))


def _display() -> Listener | None:
    """Make what shows progress: all the time on a terminal, now and then elsewhere, never with -q."""
    if is_quiet() or os.environ.get("RANK", "0") != "0":
        return None
    if not sys.stderr.isatty():
        from edit_compile.report.progress_lines import ProgressLines

        return ProgressLines(say)
    from edit_compile.report.progress_display import ProgressDisplay

    return ProgressDisplay()


class _Echo(logging.Handler):
    """Writes to what stderr is at the time, so that lines appear above those of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


@contextmanager
def _said() -> Iterator[None]:
    """Let the package say less or more than warnings, as -q and -v ask for."""
    own, meta = logging.getLogger("edit_compile"), click.get_current_context().meta
    level, handler = own.level, _Echo()
    if meta.get(_QUIET):
        own.setLevel(logging.ERROR)
    if meta.get(_VERBOSE):
        own.setLevel(logging.DEBUG)
        own.addHandler(handler)
    try:
        yield
    finally:
        own.setLevel(level)
        own.removeHandler(handler)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (EditCompileError, OSError) as error:  # OSError: a full disk, a folder that is gone: names the file
        _end(str(error))
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        _end(f"{str(error).partition('. ')[0]}; choose a smaller size or batch, or another device")
    except click.UsageError as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # not in older versions
            raise
        context = error.ctx
        command = "edit-compile" if context is None or context.parent is None else f"edit-compile {context.info_name}"
        _end(f"{error.format_message()} (help: {command} -h)", error.exit_code)


def _end(message: str, status: int = 1) -> NoReturn:
    """Print an error, in one line, and end the command."""
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(_VERBOSE):
        click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)


@contextmanager
def _stops_in_one_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        sys.exit(stopped_status())


class Group(click.Group):
    """Ends in one line when a signal stops it, and remembers what the command line was, to name the command that continues it."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        if args is None:  # a process of its own
            os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries; the hub's, of downloads, stay where there is a terminal
        with stopping_on_signals(program=args is None):
            return super().main(args, *others, **options)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _stops_in_one_line(), _errors_in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _stops_in_one_line(), _errors_in_one_line():
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_LINE] = tuple(args)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and (near := get_close_matches(args[0], self.list_commands(ctx), 1)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


@contextmanager
def continuable(command: str, *, speaks: bool = True) -> Iterator[None]:
    """End the command that is running in one line, which says how to continue, where a signal stops what is inside.

    Args:
        command: that continues.
        speaks: whether this process prints the line.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stopped:
        if speaks:
            click.echo(f"{str(stopped) or 'stopped'}. To continue: {command}", err=True)
        sys.exit(stopped_status())


def same_command(*more: str, without: str = "") -> str:
    """Spell the command that is running, with all of its options, and more if they are not among them."""
    given = [part for part in click.get_current_context().meta[_LINE] if part != without]
    return shlex.join(["edit-compile", *given, *(part for part in more if part not in given)])


def say(line: str) -> None:
    """Print a line on stderr, on a terminal folded between words, unless -q was given."""
    if is_quiet():
        return
    if sys.stderr.isatty():
        line = textwrap.fill(line, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    click.echo(line, err=True)


def print_json(content: Any) -> None:
    """Print the one thing on stdout that `--json` asks for."""
    click.echo(json.dumps(content, indent=2))


def show_plan(plan: Plan, as_json: bool, more: dict[str, Any]) -> None:
    """Print a plan as a table, or as JSON with more."""
    if as_json:
        from edit_compile.report.tables import plan_summary

        print_json({**more, **plan_summary(plan)})
    else:
        print_table(plan)


def print_table(table: Any) -> None:
    """Print what rich can render on stdout."""
    from edit_compile.report.terminal import make_console

    make_console().print(table)
