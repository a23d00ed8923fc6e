"""The verb ``list``: what there is, and every option with its default, bounds, meaning and source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from unbackdoor.data.named_sets.catalogue import SETS
from unbackdoor.engine.training import RECIPES, Recipe
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


def listing(kind: str | None = None, name: str | None = None) -> dict[str, list[Entry]]:
    """Return attacks, defenses, scanners, screeners, architectures, recipes and data sets, with options.

    It is ``unbackdoor.list``, which is not in ``unbackdoor.__all__``: an import of all names would hide the
    type of that name.

    Args:
        kind: One of ``attacks``, ``defenses``, ``scanners``, ``screeners``, ``architectures``, ``recipes``
            and ``datasets``; None is all.
        name: One of that kind; None is all.

    Returns:
        By kind: an entry for each, with its ``name``, its ``summary``, and as ``options`` the name, type,
        default, bounds, meaning, and source of the default of each option.

    Raises:
        InputError: If there is no such kind or name; near matches are named.

    Example:
        >>> [entry["name"] for entry in listing("recipes")["recipes"]][:2]
        ['plain', 'short']
    """
    if kind is not None and kind not in list(KINDS):
        raise InputError(
            f"there is no list of {kind!r}{near_match(str(kind), list(KINDS))}",
            expected="one of " + ", ".join(KINDS),
        )
    if name is not None and kind is None:
        raise InputError("a name belongs to a kind", expected="one of " + ", ".join(KINDS), where="kind")
    entries = {key: read() for key, read in KINDS.items() if kind in (None, key)}
    return entries if name is None or kind is None else {kind: [_one(kind, name, entries[kind])]}


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
        f"unknown {kind.removesuffix('s')} {name!r}{near_match(str(name), names)}",
        expected="one of " + ", ".join(names),
    )
