"""``unbackdoor list``: what there is, and every option with its default, bounds, meaning and source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, say, table

Entry = dict[str, Any]
_EXTRA: Mapping[str, tuple[str, ...]] = {
    "attacks": ("paper",),
    "defenses": ("presets", "paper"),
    "scanners": ("paper",),
    "screeners": ("needs", "paper"),
    "architectures": (),
    "recipes": (),
    "datasets": ("image (C, H, W)", ">classes"),
}


def listing(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="attacks, defenses, scanners, screeners, architectures, recipes or datasets; "
            "all without it.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="One of them, with all its options.", show_default=False),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show attacks, defenses, scanners, screeners, architectures, recipes and data sets, with options."""
    import unbackdoor

    entries = unbackdoor.list(kind, name)
    if as_json:
        emit(entries)
    elif name is not None and kind is not None:
        _show_one(kind, entries[kind][0])
    else:
        for key, rows in entries.items():
            table(key.capitalize(), ("name", "what it is", *_EXTRA[key]), [_row(key, row) for row in rows])
        say("All options of one: unbackdoor list KIND NAME")


def _row(kind: str, entry: Entry) -> tuple[object, ...]:
    extra: dict[str, tuple[object, ...]] = {
        "attacks": (entry.get("paper"),),
        "defenses": (", ".join(entry.get("presets", {})), entry.get("paper")),
        "scanners": (entry.get("paper"),),
        "screeners": (", ".join(entry.get("needs", ())), entry.get("paper")),
        "datasets": (tuple(entry.get("shape", ())), len(entry.get("classes", ()))),
    }
    return (entry["name"], _unquoted(entry["summary"]), *extra.get(kind, ()))


def _show_one(kind: str, entry: Entry) -> None:
    say(f"{entry['name']}: {_unquoted(entry['summary'])}")
    for key in (
        "paper",
        "needs",
        "traits",
        "train",
        "test",
        "shape",
        "classes",
        "augmentation",
        "mean",
        "std",
    ):
        if entry.get(key):
            value = entry[key]
            say(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    if entry.get("options"):
        table(
            "Options",
            ("name", "type", ">default", "bounds", "meaning", "source of the default"),
            [
                (o["name"], o["type"], o["default"], o["bounds"], o["meaning"], o["source"])
                for o in entry["options"]
            ],
        )
    elif kind != "datasets":
        say("It has no options.")
    for preset, values in entry.get("presets", {}).items():
        say(f"preset {preset}: " + ", ".join(f"{key}={value}" for key, value in values.items()))


def _unquoted(summary: str) -> str:
    return summary.replace("``", "")
