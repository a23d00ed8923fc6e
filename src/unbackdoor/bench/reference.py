"""Numbers that others published, for comparison with ours; they never enter a mean.

The file is a table of comma-separated values as the BackdoorBench leaderboard for CIFAR-10 gives it, one
line for each attack and defense, in percent: ``poison_ratio, model, attack, defense, ACC, ASR, RA`` and,
where somebody computed it from these, ``DER_computed``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unbackdoor.bench.rows import Row
from unbackdoor.errors import InputError

LARGEST_FILE = 10_000_000  # bytes; the published table has 150 thousand
_COLUMNS = ("poison_ratio", "model", "attack", "defense", "ACC", "ASR", "RA")
_DATASET = "cifar10"  # the table is of one data set, and does not name it
# Our names -> theirs. Names that are not here have no published counterpart.
_ARCHITECTURES = {"preact_resnet18": "PreActResNet-18"}
_ATTACKS = {
    "badnets": "BadNet",
    "blended": "Blended",
    "bpp": "BPP",
    "input_aware": "InputAware",
    "label_consistent": "LC",
    "lf": "LF",
    "sig": "SIG",
    "ssba": "SSBA",
    "trojannn": "TrojanNN",
    "wanet": "WaNet",
}
_DEFENSES = {
    "none": "No Defense",
    "abl": "ABL",
    "ac": "AC",
    "anp": "ANP",
    "clp": "CLP",
    "dbd": "DBD",
    "fp": "FP",
    "ft": "FT",
    "i_bau": "i-BAU",
    "nad": "NAD",
    "nc": "NC",
}


@dataclass(frozen=True)
class Published:
    """One published cell, as rates in 0..1.

    Attributes:
        attack: Their name of the attack.
        defense: Their name of the defense.
        acc: Clean accuracy.
        asr: Attack success rate.
        ra: Robust accuracy.
        der: Defense effectiveness as computed from these; None where the file has none.
    """

    attack: str
    defense: str
    acc: float
    asr: float
    ra: float
    der: float | None


class PublishedTable:
    """Published cells, looked up by one of our rows."""

    def __init__(self, cells: dict[tuple[str, float, str, str], Published]) -> None:
        self._cells = cells

    def __len__(self) -> int:
        return len(self._cells)

    def match(self, row: Row) -> Published | None:
        """Return the cell of the same architecture, poison rate, attack and defense, if there is one."""
        if row.dataset != _DATASET or row.altered:
            return None
        key = (
            _ARCHITECTURES.get(row.architecture, ""),
            round(row.poison_rate, 6),
            _ATTACKS.get(row.attack, ""),
            _DEFENSES.get(row.defense, ""),
        )
        return self._cells.get(key)


def read_published(path: Path) -> PublishedTable:
    """Read a table of published numbers.

    Raises:
        InputError: If the file is missing, too large or no such table; the line is named.
    """
    if not path.is_file():
        raise InputError("the file of published numbers does not exist", where=path)
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise InputError(
            "the file of published numbers is too large",
            expected=f"at most {LARGEST_FILE} bytes",
            got=size,
            where=path,
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return PublishedTable(dict(_cells(lines, path)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("the published numbers are no table", got=str(error), where=path) from None


def _cells(lines: Iterable[str], path: Path) -> Iterator[tuple[tuple[str, float, str, str], Published]]:
    reader = csv.DictReader(lines, strict=True)
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(
            "the published numbers lack columns", expected=", ".join(_COLUMNS), got=_cut(reader.fieldnames),
            where=path,
        )  # fmt: skip
    for line in reader:
        where = f"{path}, line {reader.line_num}"
        if any(line[name] is None for name in _COLUMNS):
            raise InputError("a line of the published numbers is too short", where=where)
        poison_rate = _rate(line["poison_ratio"].removesuffix("%"), where)
        acc, asr, ra = (_rate(line[name], where) for name in ("ACC", "ASR", "RA"))
        der = _rate(text, where) if (text := line.get("DER_computed")) else None
        key = (line["model"], poison_rate, line["attack"], line["defense"])
        yield key, Published(line["attack"], line["defense"], acc, asr, ra, der)


def _rate(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise InputError(
            "a published number is no percentage", expected="0 to 100", got=_cut(text), where=where
        )
    return round(value / 100, 6)  # as exact as it was published


def _cut(text: object) -> str:
    return repr(text)[:80]
