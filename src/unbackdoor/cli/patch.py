"""``unbackdoor patch``: a repair as a small file that can be applied and reverted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, note, say

if TYPE_CHECKING:
    from unbackdoor.weights.patch import Direction

patch = typer.Typer(no_args_is_help=True, help="Make, apply and revert repairs as small files.")

_In = Annotated[Path, typer.Argument(metavar="MODEL", help="Weights file.", show_default=False)]
_Patch = Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.", show_default=False)]
_Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="KEY",
        help="Which of several sets of weights in a file, such as state_dict_ema; inspect lists them.",
        show_default="the only one, or the one that the patch fits",
    ),
]
_Out = Annotated[
    Path, typer.Option("--out", help="File to write.", show_default=False, rich_help_panel="Output")
]


@patch.command()
def make(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Weights of the original.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Weights of the repair.")],
    out: _Out,
    weights: _Weights = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the difference between two models with the same tensors."""
    import unbackdoor

    options.require_writable((out,), force=force, inputs=(before, after))
    made = unbackdoor.patch.make(before, after, weights=weights)
    made.save(out, force=force)
    facts = {"patch": str(out), **made.to_dict(), "bytes": out.stat().st_size}
    if as_json:
        emit(facts)
    else:
        say(f"{out}: {facts['changed']:,} numbers in {facts['tensors']} tensors, {facts['bytes']:,} bytes")


@patch.command()
def apply(
    model: _In,
    patch_file: _Patch,
    out: _Out,
    weights: _Weights = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write MODEL with the patch applied; refused unless it was made for exactly these weights."""
    _use(model, patch_file, out, "apply", weights, force, as_json)


@patch.command()
def revert(
    model: _In,
    patch_file: _Patch,
    out: _Out,
    weights: _Weights = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write MODEL as it was before the patch; refused unless it is exactly what the patch leads to."""
    _use(model, patch_file, out, "revert", weights, force, as_json)


def _use(
    model: Path,
    patch_file: Path,
    out: Path,
    direction: Direction,
    weights: str | None,
    force: bool,
    as_json: bool,
) -> None:
    import unbackdoor
    from unbackdoor.opening.write_back import require_format

    require_format(out)
    options.require_writable((out,), force=force, inputs=(options.existing_model(model), patch_file))
    use = unbackdoor.patch.apply if direction == "apply" else unbackdoor.patch.revert
    done = use(model, patch_file, weights=weights)
    done.save(out, force=force)
    if left := done.left_behind:
        note(f"mind: the further weights of the file ({', '.join(left)}) are not in what was written")
    if as_json:
        emit({"model": str(out), **done.to_dict()})
    else:
        say(f"{out}: {done.patch.changed:,} numbers changed; SHA-256 of the weights {done.sha256}")
