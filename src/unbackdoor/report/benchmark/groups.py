"""Rows in groups: what may share a mean, and the line between the current code and older ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from unbackdoor.bench.results import WEAK, Mean
from unbackdoor.bench.rows import ProbeRow, Row, ScanRow
from unbackdoor.report.benchmark.cells import name

K = TypeVar("K", bound=Hashable)
G = TypeVar("G")
R = TypeVar("R")
IsCurrent = Callable[[Mapping[str, Any]], bool]


class Setting(NamedTuple):
    """What rows must share before a mean over them says anything."""

    dataset: str
    architecture: str
    width: float
    recipe: str
    altered: str = ""

    @classmethod
    def of(cls, row: Row | ScanRow | ProbeRow) -> Setting:
        """Return the setting of a row."""
        return cls(row.dataset, row.architecture, row.width, row.recipe, row.altered)

    def __str__(self) -> str:
        words = f"{name(self.dataset)}, {name(self.architecture)} of width {self.width:g}"
        words += "" if self.recipe == "plain" else f", recipe {name(self.recipe)}"
        return words + (f", the defender's images altered: {name(self.altered)}" if self.altered else "")


@dataclass(frozen=True)
class Rows(Generic[R]):
    """Some rows, each known to be of the current code or of older code.

    Attributes:
        pairs: Rows in their order, with True for those of older code.
    """

    pairs: tuple[tuple[R, bool], ...]

    @classmethod
    def of(cls, rows: Iterable[R], is_current: IsCurrent | None = None) -> Rows[R]:
        """Ask of every row whether its code is the current one.

        Args:
            rows: Models or mappings.
            is_current: Says it of a row as a mapping; the benchmark's own judgement if None.
        """
        if is_current is None:
            from unbackdoor.bench.part_versions import is_current as judgement

            is_current = judgement
        return cls(tuple((row, not is_current(_mapping(row))) for row in rows))

    @property
    def all(self) -> list[R]:
        """All rows, in their order."""
        return [row for row, _ in self.pairs]

    @property
    def current(self) -> list[R]:
        """Rows of the current code."""
        return [row for row, older in self.pairs if not older]

    @property
    def older(self) -> list[R]:
        """Rows of older code."""
        return [row for row, older in self.pairs if older]

    def where(self, predicate: Callable[[R], bool]) -> Rows[R]:
        """Return the rows of a kind."""
        return Rows(tuple((row, older) for row, older in self.pairs if predicate(row)))

    def by(self, key: Callable[[R], K]) -> dict[K, Rows[R]]:
        """Return the rows in groups, in the order of their first rows."""
        groups: dict[K, list[tuple[R, bool]]] = {}
        for row, older in self.pairs:
            groups.setdefault(key(row), []).append((row, older))
        return {value: Rows(tuple(pairs)) for value, pairs in groups.items()}


def _mapping(row: Any) -> Mapping[str, Any]:
    return row.model_dump() if isinstance(row, BaseModel) else row


@dataclass(frozen=True)
class Line(Generic[K, G]):
    """A line of a table of means.

    Attributes:
        key: What it is of; None where no group has a row of the current code, and one line says so for all.
        group: What the means are over; None where the current code has no row.
        older: The group is of older code.
    """

    key: K | None
    group: G | None
    older: bool


def lines(current: Mapping[K, G], older: Mapping[K, G]) -> list[Line[K, G]]:
    """Return the lines of a table that never mixes: current groups, what is missing, older groups."""
    out: list[Line[K, G]] = [Line(key, group, False) for key, group in current.items()]
    if older and not current:
        out.append(Line(None, None, False))
    else:
        out += [Line(key, None, False) for key in older if key not in current]
    return out + [Line(key, group, True) for key, group in older.items()]


@dataclass(frozen=True)
class Group:
    """One defense against one attack: rows that differ in their seeds only."""

    row: Row
    rows: list[Row] = field(default_factory=list)

    def fine(self) -> list[Row]:
        """Return the rows that means are over."""
        return [row for row in self.rows if row.error is None and WEAK not in row.flags]

    def mean(self, value: Callable[[Row], float | None], *, worst: str = "max") -> Mean:
        """Return the mean of a column over the rows that have it."""
        values = (value(row) for row in self.fine())
        return Mean.of([number for number in values if number is not None], worst=worst)


def attack_groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], Group]:
    """Return rows in groups that differ in their seeds only."""
    groups: dict[tuple[Any, ...], Group] = {}
    for row in rows:
        groups.setdefault(attack_key(row), Group(row)).rows.append(row)
    return groups


def attack_key(row: Row | ProbeRow) -> tuple[Any, ...]:
    """Return what repairs have in common that differ in their seeds only."""
    return (row.attack, row.poison_rate, row.target, defense_of(row), row.selection, row.clean_images)


def defense_of(row: Row | ProbeRow) -> str:
    """Return the name of a defense with its preset."""
    return row.defense if row.preset == "default" else f"{row.defense}:{row.preset}"


def acc_lost(row: Row) -> float | None:
    """Return the accuracy that a repair cost."""
    return None if row.acc is None or row.acc_before is None else row.acc_before - row.acc


def acc_lost_attacked(row: Row) -> float | None:
    """Return the accuracy that the repair of a backdoored network cost."""
    return acc_lost(row) if row.asr is not None else None


def attacked_acc(row: Row) -> float | None:
    """Return the accuracy of a repaired network that was backdoored."""
    return row.acc if row.asr is not None else None
