"""``unbackdoor inspect``: what a model file is, and whether loading it elsewhere would execute code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, plain, say, table
from unbackdoor.cli.progress import Display

if TYPE_CHECKING:
    from unbackdoor.opening.inspection import Inspection

UNSAFE = 1
UNREADABLE = 2
_SHOWN = 10  # tensors, names and notes of each kind; --tensors and --json show all


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The file.", show_default=False)],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor.", rich_help_panel="Output")
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell what a model file is: its format, what loading it would execute, its tensors, its architecture.

    Nothing in the file is executed, and no flag makes it so. The exit code is 1 where loading the file with
    other programs would execute code, and 2 where its weights cannot be read.
    """
    import unbackdoor

    with Display(quiet=quiet or as_json) as display:
        found = unbackdoor.inspect(model, display)
    if as_json:
        emit(found.to_dict())
    else:
        _show(found, everything=tensors)
    if found.executes:
        raise typer.Exit(UNSAFE)
    if found.problem is not None:
        raise typer.Exit(UNREADABLE)


def _show(found: Inspection, *, everything: bool) -> None:
    from unbackdoor.opening.inspection import IN_WORDS

    say(f"{found.path}: {found.format}, {found.size} bytes")
    say(f"sha256 {found.sha256}")
    say()
    say(IN_WORDS[found.loading])
    _list("It names", found.dangerous)
    _list("Names beyond plain tensors", [name for name in found.foreign if name not in found.dangerous])
    if found.problem is not None:
        say(f"Not readable: {found.problem}")
    for note in found.notes[:_SHOWN]:
        say(f"Note: {note}")
    if found.not_finite:
        bad = [tensor.name for tensor in found.tensors if tensor.not_finite]
        say(f"Not finite: {found.not_finite} values are NaN or infinite")
        _list("In the tensors", bad)
    if found.beside:
        _list("Beside the weights", [f"{key} {value}" for key, value in found.beside.items()])
    if not found.tensors:
        return
    say()
    rows = found.tensors if everything else found.tensors[:_SHOWN]
    table(
        f"{len(found.tensors)} tensors, {found.parameters} numbers",
        ("name", "shape", "type"),
        [(tensor.name, " x ".join(map(str, tensor.shape)) or "one number", tensor.dtype) for tensor in rows],
    )
    if len(rows) < len(found.tensors):
        say(f"and {len(found.tensors) - len(rows)} more; --tensors lists all")
    _show_graph(found)
    _show_guesses(found)


def _show_graph(found: Inspection) -> None:
    if found.graph is None:
        return
    problem = found.graph.problem
    opens = "opens as it is" if problem is None else f"does not open: {plain(problem)}"
    say(f"Graph: {found.graph.operators} operators, {opens}")


def _show_guesses(found: Inspection) -> None:
    by_graph = found.graph is not None and found.graph.problem is None
    for candidate in [c for c in found.candidates if c.fits or not by_graph][:_SHOWN]:
        fits = "fits" if candidate.fits else "is near"
        classes = f", {candidate.classes} classes" if candidate.classes else ""
        say(
            f"Architecture: {candidate.spec} {fits}{classes}"
            + (f" ({candidate.note})" if candidate.note else "")
        )
    if not found.candidates and not by_graph:
        say("Architecture: none that is known fits; name it with --architecture")
    if found.graph is not None and found.graph.input_shape is not None:
        say("Input: " + " x ".join(map(str, found.graph.input_shape)))
    elif found.channels:
        say(f"Input: {found.channels} colour channels")
    if found.normalisation is not None:
        mean, std = (
            ", ".join(f"{v:g}" for v in row) for row in (found.normalisation.mean, found.normalisation.std)
        )
        say(f"Normalisation: mean {mean}, deviation {std}, by {found.normalisation.source}")
    else:
        say("Normalisation: the file does not tell")


def _list(title: str, values: tuple[str, ...] | list[str]) -> None:
    if values:
        more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
        say(f"{title}: " + ", ".join(plain(value[:200]) for value in values[:_SHOWN]) + more)
