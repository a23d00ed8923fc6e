"""The row: the one form in which a measured result is stored, reported and committed.

Rates are in 0..1 and numbers are numbers; a failed cell is a row with its error. ``docs/benchmark.md``
explains every column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from unbackdoor.errors import InputError
from unbackdoor.files import atomic_write, is_there, parse_json, read_text

R = TypeVar("R", bound=BaseModel)
MAX_ROWS = 1 << 30  # bytes of a file of rows; a thousand times the largest that is published


class _Experiment(BaseModel):
    """The columns that identify the victim."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str
    version: int = 1
    dataset: str
    architecture: str
    width: float
    recipe: str
    attack: str
    poison_rate: float
    target: int | None = None
    victim_seed: int

    def key(self) -> tuple[Any, ...]:
        """Return what makes this row a different experiment from another."""
        return tuple(getattr(self, name) for name in type(self).key_columns())

    @classmethod
    def key_columns(cls) -> tuple[str, ...]:
        """Return the columns that were known before anything ran."""
        names = list(cls.model_fields)
        return tuple(names[: names.index("defender_seed") + 1])


class _Repair(_Experiment):
    """The columns that identify a repair, and the rates of its victim."""

    defense: str
    preset: str = "default"
    selection: str = "held-out clean"
    clean_images: int
    altered: str = ""
    defender_seed: int
    acc_before: float | None = None
    asr_before: float | None = None


class Row(_Repair):
    """One measured repair; the order of the fields is the order of the columns."""

    ra_before: float | None = None
    acc: float | None = None
    asr: float | None = None
    ra: float | None = None
    der: float | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    device: str = ""
    commit: str = ""
    code: str = ""
    victim_code: str = ""
    altered_code: str = ""
    victim_processor_seconds: float | None = None
    part: str = ""
    flags: tuple[str, ...] = ()
    error: str | None = None


class ScanRow(_Experiment):
    """One scan; the order of the fields is the order of the columns."""

    scanner: str
    preset: str = "default"
    clean_images: int
    altered: str = ""
    defender_seed: int
    acc_before: float | None = None
    asr_before: float | None = None
    verdict: str | None = None
    classes: tuple[int, ...] = ()
    statistic: str = ""
    value: float | None = None
    p_value: float | None = None
    right: bool | None = None
    target_found: bool | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    device: str = ""
    commit: str = ""
    code: str = ""
    victim_code: str = ""
    altered_code: str = ""
    victim_processor_seconds: float | None = None
    part: str = ""
    flags: tuple[str, ...] = ()
    error: str | None = None


class ProbeRow(_Repair):
    """The probes of one repair; the order of the fields is the order of the columns.

    Columns that end in ``_before`` are of the victim, those that end in ``_control`` of the clean network.
    """

    acc: float | None = None
    asr: float | None = None
    relearn_steps: tuple[int, ...] = ()
    relearned: tuple[float, ...] = ()
    relearned_before: tuple[float, ...] = ()
    relearned_control: tuple[float, ...] = ()
    steps_to_half: int | None = None
    steps_to_half_before: int | None = None
    steps_to_half_control: int | None = None
    alternative: float | None = None
    alternative_before: float | None = None
    alternative_control: float | None = None
    patch: float | None = None
    patch_before: float | None = None
    patch_control: float | None = None
    pacc: float | None = None
    pacc_before: float | None = None
    pacc_control: float | None = None
    moved: float | None = None
    moved_before: float | None = None
    moved_control: float | None = None
    moved_class: int | None = None
    moved_class_before: int | None = None
    moved_class_control: int | None = None
    seconds: float | None = None
    device: str = ""
    commit: str = ""
    code: str = ""
    repair_code: str = ""
    victim_code: str = ""
    control_code: str = ""
    patch_code: str = ""
    altered_code: str = ""
    part: str = ""
    flags: tuple[str, ...] = ()
    error: str | None = None


def read_rows(path: Path) -> list[Row]:
    """Read a JSON-lines file of rows; an absent file has none.

    Raises:
        InputError: If a line is no row; the line is named.
    """
    return list(_rows(path, Row)) if is_there(path) else []


def read_scans(path: Path) -> list[ScanRow]:
    """Read a JSON-lines file of scans, as :func:`read_rows` does."""
    return list(_rows(path, ScanRow)) if is_there(path) else []


def read_probes(path: Path) -> list[ProbeRow]:
    """Read a JSON-lines file of probes, as :func:`read_rows` does."""
    return list(_rows(path, ProbeRow)) if is_there(path) else []


def write_rows(path: Path, rows: Iterable[BaseModel]) -> None:
    """Replace a JSON-lines file by the given rows, atomically."""
    with atomic_write(path) as draft:
        draft.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


def _rows(path: Path, kind: type[R]) -> Iterator[R]:
    text = read_text(path, "the file of rows", limit=MAX_ROWS)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield kind.model_validate(parse_json(line, "the line"))
        except (ValidationError, InputError) as error:
            where = f"{path}, line {number}"
            got = error.got if isinstance(error, InputError) else str(error)
            raise InputError("a line is not a result row", got=got, where=where) from None
