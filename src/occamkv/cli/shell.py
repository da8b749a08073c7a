"""What all verbs share: the application, the two consoles, and how errors become exit codes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from occamkv.errors import NothingQuantized, OccamError
from occamkv.methods import Method, method

EXIT_BAD_INPUT = 2
EXIT_NOTHING_QUANTIZED = 3

app = typer.Typer(
    help="Hold the KV cache of a transformer in about 2 to 3 bits per value.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


def verb(name: str, *, group: typer.Typer = app) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a verb, of a group if need be; our errors become one line on stderr and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @group.command(name)
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except NothingQuantized as error:
                fail(str(error), EXIT_NOTHING_QUANTIZED)
            except OccamError as error:
                fail(str(error), EXIT_BAD_INPUT)
            except ModuleNotFoundError as error:
                fail(f"{error.name} is not installed. Run: pip install 'occamkv[hf,cli]'", EXIT_BAD_INPUT)

        return wrapped

    return register


def named(name: str, **overrides: Any) -> Method:
    """Return a method by name, with the overrides that were given; None stands for an option that was not."""
    return method(name, **{field: value for field, value in overrides.items() if value is not None})


def fail(message: str, code: int) -> None:
    """Print an error and leave with this exit code."""
    err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def check_writable(path: str | Path | None, *, stdout: bool = False) -> None:
    """Leave with an error unless a report can be written there, before any work is done for it.

    Args:
        path: Where; None if nothing is to be written.
        stdout: Whether `-` stands for stdout, as it does for JSON. For all else it is refused.
    """
    if path is None or (stdout and path == "-"):
        return
    target = Path(path)
    writable = os.access(target if target.exists() else target.parent, os.W_OK)
    if str(path) == "-" or target.is_dir() or not target.parent.is_dir() or not writable:
        more = ", or - for stdout" if stdout else "; stdout takes JSON alone (--json -)" if str(path) == "-" else ""
        fail(f"cannot write {str(path)!r}; allowed: a file in a folder that exists{more}.", EXIT_BAD_INPUT)


def write_json(data: dict[str, Any], path: str | Path) -> None:
    """Write a report to a file, or to stdout for `-`."""
    text = json.dumps(data, indent=1) + "\n"
    if path == "-":
        typer.echo(text, nl=False)
        return
    write_text(text, path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file; leave with an error if that fails."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"cannot write {str(path)!r}: {error.strerror}", EXIT_BAD_INPUT)


@contextmanager
def stages() -> Iterator[Any]:
    """Show one bar per stage on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        yield advance
