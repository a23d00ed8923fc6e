"""What the commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unbackdoor.text import json_text
from unbackdoor.text import printable as plain

if TYPE_CHECKING:
    from unbackdoor.bench.judge import Scores
    from unbackdoor.metrics import Rate


@dataclass
class Invocation:
    """What was called, and what standard output has got of it.

    Attributes:
        command: Its names, such as ``patch apply``.
        as_json: Whether the result was asked for as JSON.
        emitted: Whether it was printed.
        complaint: What was said last on standard error.
    """

    command: str = ""
    as_json: bool = False
    emitted: bool = False
    complaint: str = ""


invocation = Invocation()  # of this process; the application sets it before it calls a command
PIPED_WIDTH = 120  # columns where standard output is no terminal, so that its width is unknown
_WIDEST_PARAGRAPH = 100


def paragraph(text: object) -> str:
    """Return a text as one paragraph, wrapped to the terminal."""
    width = min(shutil.get_terminal_size((PIPED_WIDTH, 24)).columns, _WIDEST_PARAGRAPH)
    joined = plain(" ".join(str(text).split()))
    return textwrap.fill(joined, max(width, 20), break_long_words=False, break_on_hyphens=False)


def complain(text: object) -> None:
    """Print one paragraph on standard error."""
    invocation.complaint = str(text)
    print(paragraph(text), file=sys.stderr, flush=True)


def note(text: object, *, quiet: bool = False) -> None:
    """Print one paragraph on standard error unless the user asked for silence."""
    if not quiet:
        complain(text)


def say(text: object = "") -> None:
    """Print a line of the results."""
    _put(plain(text) + "\n")


def _put(text: str) -> None:
    """Write to standard output. A reader that closed the pipe, such as ``head``, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes what is left when it ends, and must not meet the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def emit(result: Mapping[str, Any]) -> None:
    """Print a result as JSON behind its header, the only thing on standard output."""
    from unbackdoor.report.json_output import with_header

    invocation.emitted = True
    _put(json_text(with_header(invocation.command, result)) + "\n")


def emit_failure(error: BaseException | None, exit_code: int) -> None:
    """Print, where JSON was asked for and no result was printed, why there is none.

    Args:
        error: What went wrong; None where it was said on standard error alone.
        exit_code: What the command ends with.
    """
    from unbackdoor.report.json_output import error_facts

    if invocation.as_json and not invocation.emitted:
        emit(error_facts(invocation.complaint if error is None else error, exit_code=exit_code))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; a column whose name starts with ``>`` is aligned to the right."""
    from rich import box  # late, because the first line of a command must not wait for it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=Text(plain(title)),
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in columns:
        grid.add_column(
            Text(column.removeprefix(">")),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(Text(plain(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    with console.capture() as capture:
        console.print(grid)
    _put(capture.get())


def scores_table(title: str, rows: Mapping[str, Scores]) -> None:
    """Print ACC, ASR and RA with their 95 % intervals, one row for each model."""
    cells = [
        (name, *(_with_interval(rate) for rate in (scores.acc, scores.asr, scores.ra)))
        for name, scores in rows.items()
    ]
    table(title, ("", ">ACC (95 % interval)", ">ASR (95 % interval)", ">RA (95 % interval)"), cells)


def _with_interval(rate: Rate) -> str:
    from unbackdoor.report import words

    text = words.rate(rate)
    return f"{text} ({words.interval(rate)})" if rate.total else text
