"""``unbackdoor list``: what there is, and every option with its default, bounds, meaning and source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from unbackdoor.cli import options
from unbackdoor.cli.output import emit, say, table
from unbackdoor.errors import InputError
from unbackdoor.registry import (
    ARCHITECTURES,
    ATTACKS,
    DEFENSES,
    SCANNERS,
    SCREENERS,
    Config,
    Part,
    Registry,
    near_match,
)

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Entry = dict[str, Any]
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


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
    if kind is not None and kind not in KINDS:
        raise InputError(
            f"there is no list of {kind!r}{near_match(kind, list(KINDS))}",
            expected="one of " + ", ".join(KINDS),
        )
    entries = {key: read() for key, read in KINDS.items() if kind in (None, key)}
    if name is not None:
        assert kind is not None  # the first argument is filled first
        entries = {kind: [_one(kind, name, entries[kind])]}
    if as_json:
        emit(entries)
    elif name is not None and kind is not None:
        _show_one(kind, entries[kind][0])
    else:
        for key, rows in entries.items():
            table(key.capitalize(), ("name", "what it is", *_EXTRA[key]), [_row(key, row) for row in rows])
        say("All options of one: unbackdoor list KIND NAME")


def _parts(registry: Registry[Any]) -> Callable[[], list[Entry]]:
    return lambda: [_part(registry[name]) for name in registry]


def _part(part: Part[Any]) -> Entry:
    return {
        "name": part.name,
        "summary": part.summary,
        "paper": part.paper,
        "needs": sorted(part.needs),
        "traits": sorted(part.traits),
        "version": part.version,
        "presets": {name: dict(values) for name, values in part.presets.items()},
        "options": config_options(part.config),
    }


def _recipes() -> list[Entry]:
    from unbackdoor.engine.training import RECIPES, Recipe

    usual = Recipe()
    out = []
    for name, recipe in RECIPES.items():
        changed = {k: v for k, v in recipe.model_dump().items() if v != getattr(usual, k)}
        changes = ", ".join(f"{key} {value}" for key, value in changed.items())
        out.append(
            {
                "name": name,
                "summary": f"the usual recipe with {changes}" if changes else "the usual recipe",
                "options": config_options(Recipe, recipe.model_dump()),
            }
        )
    return out


def _datasets() -> list[Entry]:
    from unbackdoor.data.named_sets.catalogue import SETS

    return [
        {
            "name": name,
            "summary": f"{facts.train} training and {facts.test} test images",
            "train": facts.train,
            "test": facts.test,
            "shape": list(facts.shape),
            "classes": list(facts.class_names),
            "augmentation": facts.augmentation,
            "mean": list(facts.mean),
            "std": list(facts.std),
        }
        for name, facts in SETS.items()
    ]


KINDS: Mapping[str, Callable[[], list[Entry]]] = {
    "attacks": _parts(ATTACKS),
    "defenses": _parts(DEFENSES),
    "scanners": _parts(SCANNERS),
    "screeners": _parts(SCREENERS),
    "architectures": _parts(ARCHITECTURES),
    "recipes": _recipes,
    "datasets": _datasets,
}
_EXTRA: Mapping[str, tuple[str, ...]] = {
    "attacks": ("paper",),
    "defenses": ("presets", "paper"),
    "scanners": ("paper",),
    "screeners": ("needs", "paper"),
    "architectures": (),
    "recipes": (),
    "datasets": ("image (C, H, W)", ">classes"),
}


def config_options(config: type[Config], values: Mapping[str, Any] | None = None) -> list[Entry]:
    """Return every option of a config: name, type, default, bounds, meaning, and source of the default."""
    return [
        {
            "name": name,
            "type": _type(field),
            "default": (values or {}).get(name, field.default),
            "bounds": _bounds(field),
            "meaning": field.description or "",
            "source": _source(field),
        }
        for name, field in config.model_fields.items()
    ]


def _type(field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    return getattr(kind, "__name__", str(kind))


def _bounds(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(limit, key):g}"
        for limit in field.metadata
        for key, sign in _BOUNDS.items()
        if getattr(limit, key, None) is not None
    ]
    return ", ".join(bounds)


def _source(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("source", "")) if isinstance(extra, dict) else ""


def _one(kind: str, name: str, entries: list[Entry]) -> Entry:
    for entry in entries:
        if entry["name"] == name:
            return entry
    names = [entry["name"] for entry in entries]
    raise InputError(
        f"unknown {kind.removesuffix('s')} {name!r}{near_match(name, names)}",
        expected="one of " + ", ".join(names),
    )


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
