"""``unbackdoor inspect``: what a model file is, and whether loading it elsewhere would execute code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor import confinement
from unbackdoor.cli import defender, options, several
from unbackdoor.cli.output import emit, say, table
from unbackdoor.cli.progress import Display
from unbackdoor.text import printable as plain

if TYPE_CHECKING:
    from unbackdoor.opening.inspection import Inspection

UNSAFE = 1
UNREADABLE = 2
_MAX_LISTED = 10  # tensors, names and notes of each kind; --tensors and --json show all


def inspect(
    model: defender.Models,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor.", rich_help_panel="Output")
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell what a model file is: its format, what loading it would execute, its tensors, its architecture.

    Nothing in the file is executed, and no flag makes it so. The exit code is 1 where loading the file with
    other programs would execute code, and 2 where its weights cannot be read.

    Of a folder of models, of a pattern such as 'models/**/*.pth', or of several names, each is told in turn,
    and the exit code is that of the worst: 1, else 2, else 0.
    """
    confinement.start()  # its imports run beside ours
    import unbackdoor

    models, apart = several.models_of(model)
    with Display(quiet=quiet or as_json) as display:
        if apart:

            def work(path: Path) -> tuple[dict[str, Any], str, int]:
                inspection = unbackdoor.inspect(path, display)
                return inspection.to_dict(), _line(inspection), _code(inspection)

            if code := several.one_by_one(models, work, as_json=as_json):
                raise typer.Exit(code)
            return
        inspection = unbackdoor.inspect(models[0], display)
    if as_json:
        emit(inspection.to_dict())
    else:
        _show(inspection, everything=tensors)
    if code := _code(inspection):
        raise typer.Exit(code)


def _code(inspection: Inspection) -> int:
    if inspection.executes:
        return UNSAFE
    return 0 if inspection.problem is None else UNREADABLE


def _line(inspection: Inspection) -> str:
    from unbackdoor.opening.inspection import IN_WORDS

    words = f"{inspection.format}: {IN_WORDS[inspection.loading]}"
    return words if inspection.problem is None else f"{words} Not readable: {inspection.problem}"


def _show(inspection: Inspection, *, everything: bool) -> None:
    from unbackdoor.opening.inspection import IN_WORDS

    say(f"{inspection.path}: {inspection.format}, {inspection.size} bytes")
    say(f"sha256 {inspection.sha256}")
    say()
    say(IN_WORDS[inspection.loading])
    _list("It names", inspection.dangerous)
    _list(
        "Names beyond plain tensors",
        [name for name in inspection.foreign if name not in inspection.dangerous],
    )
    if inspection.problem is not None:
        say(f"Not readable: {inspection.problem}")
    for note in inspection.notes[:_MAX_LISTED]:
        say(f"Note: {note}")
    if inspection.not_finite:
        bad = [tensor.name for tensor in inspection.tensors if tensor.not_finite]
        say(f"Not finite: {inspection.not_finite} values are NaN or infinite")
        _list("In the tensors", bad)
    if inspection.beside:
        _list("Beside the weights", [f"{key} {value}" for key, value in inspection.beside.items()])
    _show_sets(inspection)
    if not inspection.tensors:
        return
    say()
    rows = inspection.tensors if everything else inspection.tensors[:_MAX_LISTED]
    table(
        f"{len(inspection.tensors)} tensors, {inspection.parameters} numbers",
        ("name", "shape", "type"),
        [(tensor.name, " x ".join(map(str, tensor.shape)) or "one number", tensor.dtype) for tensor in rows],
    )
    if len(rows) < len(inspection.tensors):
        say(f"and {len(inspection.tensors) - len(rows)} more; --tensors lists all")
    _show_graph(inspection)
    _show_guesses(inspection)


def _show_sets(inspection: Inspection) -> None:
    if len(inspection.sets) > 1:
        rows = [
            (s.key or "at the top", s.tensors, s.parameters, s.state if s.problem is None else "not readable")
            for s in inspection.sets
        ]
        table("Sets of weights; --weights KEY takes one", ("key", ">tensors", ">numbers", ""), rows)
    _list("Further tensors", inspection.other_tensors)


def _show_graph(inspection: Inspection) -> None:
    if inspection.program and not inspection.program_examined:
        say(f"Program: {inspection.program}; a scan reads its weights alone, and says so")
    if inspection.graph is None:
        return
    if len(inspection.graph.outputs) > 1:
        _list("Outputs", inspection.graph.outputs)
    for remark in inspection.graph.remarks:
        say(f"In the graph: {remark}")
    problem = inspection.graph.problem
    opens = "opens as it is" if problem is None else f"does not open: {plain(problem)}"
    say(f"Graph: {inspection.graph.operators} operators, {opens}")


def _show_guesses(inspection: Inspection) -> None:
    by_graph = inspection.graph is not None and inspection.graph.problem is None
    for candidate in [c for c in inspection.candidates if c.fits or not by_graph][:_MAX_LISTED]:
        fits = "fits" if candidate.fits else "is near"
        classes = f", {candidate.classes} classes" if candidate.classes else ""
        say(
            f"Architecture: {candidate.spec} {fits}{classes}"
            + (f" ({candidate.note})" if candidate.note else "")
        )
    if not inspection.candidates and not by_graph:
        say("Architecture: none that is known fits; name it with --architecture")
    if inspection.graph is not None and inspection.graph.input_shape is not None:
        say("Input: " + " x ".join(map(str, inspection.graph.input_shape)))
    elif inspection.channels:
        say(f"Input: {inspection.channels} colour channels")
    if inspection.normalisation is not None:
        mean, std = (
            ", ".join(f"{v:g}" for v in row)
            for row in (inspection.normalisation.mean, inspection.normalisation.std)
        )
        say(f"Normalisation: mean {mean}, deviation {std}, by {inspection.normalisation.source}")
    else:
        say("Normalisation: the file does not tell")


def _list(title: str, values: tuple[str, ...] | list[str]) -> None:
    if values:
        more = f" and {len(values) - _MAX_LISTED} more" if len(values) > _MAX_LISTED else ""
        say(f"{title}: " + ", ".join(plain(value[:200]) for value in values[:_MAX_LISTED]) + more)
