"""``unbackdoor patch``: a repair as a small file that can be applied and reverted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, say

if TYPE_CHECKING:
    from torch import Tensor

patch = typer.Typer(no_args_is_help=True, help="Make, apply and revert repairs as small files.")

_In = Annotated[Path, typer.Argument(metavar="MODEL", help="Weights file.", show_default=False)]
_Patch = Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.", show_default=False)]
_Out = Annotated[
    Path, typer.Option("--out", help="File to write.", show_default=False, rich_help_panel="Output")
]


@patch.command()
def make(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Weights of the original.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Weights of the repair.")],
    out: _Out,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the difference between two models with the same tensors."""
    from unbackdoor.weights.patch import make_patch, write_patch

    options.require_writable((out,), force=force, inputs=(before, after))
    one, other = (_state(path) for path in (before, after))
    made = make_patch(one, other)
    write_patch(out, made)
    facts = {
        "patch": str(out),
        "before_sha256": made.before,
        "after_sha256": made.after,
        "tensors": len(made.entries),
        "changed": made.changed,
        "bytes": out.stat().st_size,
    }
    if as_json:
        emit(facts)
    else:
        say(f"{out}: {made.changed:,} numbers in {len(made.entries)} tensors, {facts['bytes']:,} bytes")


@patch.command()
def apply(
    model: _In, patch_file: _Patch, out: _Out, force: options.Force = False, as_json: options.AsJson = False
) -> None:
    """Write MODEL with the patch applied; refused unless it was made for exactly these weights."""
    _use(model, patch_file, out, "apply", force, as_json)


@patch.command()
def revert(
    model: _In, patch_file: _Patch, out: _Out, force: options.Force = False, as_json: options.AsJson = False
) -> None:
    """Write MODEL as it was before the patch; refused unless it is exactly what the patch leads to."""
    _use(model, patch_file, out, "revert", force, as_json)


def _use(model: Path, patch_file: Path, out: Path, direction: Any, force: bool, as_json: bool) -> None:
    from unbackdoor.opening.write_back import require_format, write_weights
    from unbackdoor.weights.patch import in_file_names, read_patch, use_patch
    from unbackdoor.weights.read import read_contents

    require_format(out)
    source = options.existing_model(model)
    options.require_writable((out,), force=force, inputs=(source, patch_file))
    change = read_patch(patch_file)
    contents = read_contents(source)
    # The card's own format calls the tensors by the network's names.
    state = use_patch(change, in_file_names(change, contents.state(source)), direction)
    write_weights(out, state, nest=contents.nest, prefix=contents.prefix, source=source)
    digest = change.after if direction == "apply" else change.before
    if as_json:
        emit({"model": str(out), "direction": direction, "sha256": digest, "facts": dict(change.facts)})
    else:
        say(f"{out}: {change.changed:,} numbers changed; SHA-256 of the weights {digest}")


def _state(path: Path) -> Mapping[str, Tensor]:
    from unbackdoor.weights.read import read_state

    return read_state(options.existing_model(path))
