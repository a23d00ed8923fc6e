"""``unbackdoor statement``: signed statements of what was done, and bills of materials."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import say

statement = typer.Typer(
    no_args_is_help=True, help="Sign what was done, check what somebody signed, and write bills of materials."
)

_Record = Annotated[
    Path,
    typer.Argument(
        metavar="RECORD", help="result.json of a report, or what --json printed.", show_default=False
    ),
]
_Out = Annotated[
    Path, typer.Option("--out", help="File to write.", show_default=False, rich_help_panel="Output")
]


@statement.command()
def make(
    record: _Record,
    key: Annotated[
        Path, typer.Option(help="Private Ed25519 key, an unencrypted PEM file.", show_default=False)
    ],
    out: _Out,
    force: options.Force = False,
) -> None:
    """Write a record as a signed statement: in-toto, in a DSSE envelope."""
    import unbackdoor

    options.require_writable((out,), force=force, inputs=(record, key))
    made = unbackdoor.statement.make(record, key)
    say(f"Signed: {unbackdoor.statement.save(made, out, force=force)}")


@statement.command()
def check(
    statement: Annotated[
        Path, typer.Argument(metavar="STATEMENT", help="The signed statement.", show_default=False)
    ],
    key: Annotated[Path, typer.Option(help="Public Ed25519 key, a PEM file.", show_default=False)],
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", help="File that it must be about; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Check who signed a statement and what it is about; exit code 2 where it does not hold."""
    import unbackdoor

    content = unbackdoor.statement.check(statement, key, files or ())
    predicate = content["predicate"]
    say(f"The signature fits: {predicate.get('schema')} of {predicate.get('date')}")
    for subject in content["subject"]:
        say(f"{subject['name']}: sha256 {subject['digest']['sha256']}")
    if "verdict" in predicate:
        say(f"Verdict: {predicate['verdict']}")


@statement.command()
def key(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="File of the private key.", show_default=False)
    ],
) -> None:
    """Write a new key: the private part into FILE, the public one into FILE.pub."""
    import unbackdoor

    private, public = unbackdoor.statement.key(path)
    say(f"Private key: {private}; keep it to yourself")
    say(f"Public key:  {public}")


@statement.command()
def bom(record: _Record, out: _Out, force: options.Force = False) -> None:
    """Write a CycloneDX bill of materials with the models of a record."""
    import unbackdoor

    options.require_writable((out,), force=force, inputs=(record,))
    say(f"CycloneDX: {unbackdoor.statement.save(unbackdoor.statement.bom(record), out, force=force)}")
