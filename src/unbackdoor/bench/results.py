"""Rows from a store, and what can be said of many rows: summaries and differences."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel

from unbackdoor.bench.code_version import IMPORTED
from unbackdoor.bench.rows import Row, ScanRow
from unbackdoor.bench.store import Cell, Store
from unbackdoor.bench.victims import ATTACK_TOOK
from unbackdoor.errors import MissingExtra

WEAK = "attack did not take"
UNRECORDED = "commit not recorded"  # a result of a time before results carried it
# Two-sided 95 % quantiles of Student's t for 2 to 10 degrees of freedom; beyond, _quantile expands them.
_T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def rows_of(store: Store, label: str) -> list[Row]:
    """Return one row for every finished or failed repair of a suite, in the suite's order."""
    return [row for _, row in repairs_of(store, label)]


def repairs_of(store: Store, label: str) -> list[tuple[Cell, Row]]:
    """Return the finished or failed repairs of a suite, each with its row, in the suite's order."""
    return [(ended[0], _row(*ended)) for ended in _ended(store, label, "repair")]


def scans_of(store: Store, label: str) -> list[ScanRow]:
    """Return one row for every finished or failed scan of a suite, in the suite's order."""
    return [_scan_row(*ended) for ended in _ended(store, label, "scan")]


@dataclass(frozen=True)
class _Victim:
    scores: Mapping[str, Any]
    code: str
    processor_seconds: float | None


def version_of_victim(cell: Cell, pinned: Container[str]) -> str:
    """Return the column ``victim_code`` of a victim, given the addresses of those that were taken over."""
    # A victim of a time before there were versions says which attack's module it was trained with.
    code = str(cell.spec.get("code", cell.spec.get("attack_code", "")))
    return IMPORTED + code if cell.key in pinned else code


def _ended(store: Store, label: str, kind: str) -> Iterator[tuple[Cell, dict[str, Any], _Victim]]:
    """Yield the ended cells of a kind, each with the labels of its row and its victim."""
    members, pinned = store.members(label), store.pinned()
    victims = {
        cell.key: _Victim(
            cell.result["scores"] if cell.result else {},
            version_of_victim(cell, pinned),
            (cell.result or {}).get("processor_seconds"),
        )
        for cell, _ in members
        if cell.kind == "victim"
    }
    for cell, labels in members:
        if cell.kind == kind and cell.state in ("done", "failed") and cell.parent is not None:
            yield cell, labels, victims[cell.parent]


def _row(cell: Cell, labels: dict[str, Any], victim: _Victim) -> Row:
    result = cell.result or {}
    after = result.get("scores", {})
    return Row(
        **labels,
        ra_before=victim.scores.get("ra"),
        acc=after.get("acc"),
        asr=after.get("asr"),
        ra=after.get("ra"),
        der=result.get("der"),
        **_measured(cell, victim),
    )


def _scan_row(cell: Cell, labels: dict[str, Any], victim: _Victim) -> ScanRow:
    result = cell.result or {}
    names = ("verdict", "classes", "statistic", "value", "p_value", "right", "target_found")
    columns = {name: result[name] for name in names if name in result}
    return ScanRow(**labels, **columns, **_measured(cell, victim))


def _measured(cell: Cell, victim: _Victim) -> dict[str, Any]:
    """Return the columns that repairs and scans share."""
    result, before = cell.result or {}, victim.scores
    flags = list(result.get("flags", []))
    asr = before.get("asr")
    if asr is not None and asr < ATTACK_TOOK:
        flags.append(WEAK)
    if result and not result.get("commit"):
        flags.append(UNRECORDED)
    return {
        "acc_before": before.get("acc"),
        "asr_before": asr,
        "seconds": round(result["seconds"], 3) if result else None,
        "peak_mb": result.get("peak_mb"),
        "device": result.get("device", ""),
        "commit": result.get("commit", ""),
        "code": cell.spec.get("code", ""),
        "victim_code": victim.code,
        "altered_code": cell.spec.get("altered_code", ""),
        "victim_processor_seconds": victim.processor_seconds and round(victim.processor_seconds, 1),
        "flags": tuple(flags),
        "error": cell.error,
    }


@dataclass(frozen=True)
class Mean:
    """A mean over rows.

    Attributes:
        value: The mean, NaN where there is no row.
        half: Half the width of its 95 % interval by Student's t, NaN for fewer than three rows: with two, the
            interval is wider than the range of a rate and says nothing that the worst row does not.
        worst: The worst single value.
        n: Number of rows.
    """

    value: float
    half: float
    worst: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], *, worst: str = "max") -> Mean:
        """Return the mean of some values; ``worst`` is ``max`` or ``min``."""
        if not values:
            return cls(math.nan, math.nan, math.nan, 0)
        n = len(values)
        half = _quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 2 else math.nan
        return cls(fmean(values), half, max(values) if worst == "max" else min(values), n)


def _quantile(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t for at least 2 degrees of freedom."""
    if freedom - 2 < len(_T95):
        return _T95[freedom - 2]
    z = 1.959964  # Cornish-Fisher expansion; right to 0.002 from here on
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclass(frozen=True)
class Summary:
    """How one defense did at one budget, over all attacks that took, and on clean models.

    Attributes:
        defense: Name with its preset.
        selection: How it chose; ``oracle`` is ranked apart.
        clean_images: The budget.
        acc_lost: Accuracy lost on backdoored models.
        asr: Attack success left.
        ra: Robust accuracy.
        der: Defense effectiveness.
        seconds: Wall time.
        acc_lost_clean: Accuracy lost on clean models.
        failed: Rows with an error.
        weak: Rows left out because the attack had not taken.
    """

    defense: str
    selection: str
    clean_images: int
    acc_lost: Mean
    asr: Mean
    ra: Mean
    der: Mean
    seconds: Mean
    acc_lost_clean: Mean
    failed: int
    weak: int


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Group rows by defense, preset, selection and budget; honest selections first, then by mean DER."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        name = row.defense if row.preset == "default" else f"{row.defense}:{row.preset}"
        groups.setdefault((name, row.selection, row.clean_images), []).append(row)
    out = [_summary(*key, group) for key, group in groups.items()]
    return sorted(
        out,
        key=lambda s: (
            s.selection == "oracle",
            s.clean_images,
            math.inf if math.isnan(s.der.value) else -s.der.value,
            s.defense,
        ),
    )


def _summary(defense: str, selection: str, clean_images: int, rows: list[Row]) -> Summary:
    completed = [row for row in rows if row.error is None and row.acc is not None]
    took = [row for row in completed if row.asr is not None and WEAK not in row.flags]
    clean = [row for row in completed if row.attack == "none"]
    return Summary(
        defense=defense,
        selection=selection,
        clean_images=clean_images,
        acc_lost=Mean.of([_lost(row) for row in took]),
        asr=Mean.of([row.asr for row in took if row.asr is not None]),
        ra=Mean.of([row.ra for row in took if row.ra is not None], worst="min"),
        der=Mean.of([row.der for row in took if row.der is not None], worst="min"),
        seconds=Mean.of([row.seconds for row in completed if row.seconds is not None]),
        acc_lost_clean=Mean.of([_lost(row) for row in clean]),
        failed=len(rows) - len(completed),
        weak=sum(WEAK in row.flags for row in completed),
    )


def _lost(row: Row) -> float:
    assert row.acc is not None  # rows without one were left out
    return (row.acc if row.acc_before is None else row.acc_before) - row.acc


@dataclass(frozen=True)
class ScanSummary:
    """How one scanner did at one budget.

    Attributes:
        scanner: Name with its preset.
        clean_images: The budget.
        found: Backdoored models that it called backdoored; those whose attack did not take are left out.
        missed: Backdoored models in which it found no evidence.
        undecided: Backdoored models that it left undecided.
        backdoored: All of them.
        target: Attacks with a single target whose class was among the suspects, and all such attacks.
        alarms: Clean models that it called backdoored.
        undecided_clean: Clean models that it left undecided.
        clean: All of them.
        seconds: Wall time.
        failed: Scans with an error.
    """

    scanner: str
    clean_images: int
    found: int
    missed: int
    undecided: int
    backdoored: int
    target: tuple[int, int]
    alarms: int
    undecided_clean: int
    clean: int
    seconds: Mean
    failed: int


def summarise_scans(rows: Iterable[ScanRow]) -> list[ScanSummary]:
    """Group scans by scanner, preset and budget, in the order of their first row."""
    groups: dict[tuple[str, int], list[ScanRow]] = {}
    for row in rows:
        name = row.scanner if row.preset == "default" else f"{row.scanner}:{row.preset}"
        groups.setdefault((name, row.clean_images), []).append(row)
    return [_scan_summary(*key, group) for key, group in groups.items()]


def _scan_summary(scanner: str, clean_images: int, rows: list[ScanRow]) -> ScanSummary:
    completed = [row for row in rows if row.error is None]
    clean = [row.verdict for row in completed if row.attack == "none"]
    took = [row for row in completed if row.attack != "none" and WEAK not in row.flags]
    verdicts = [row.verdict for row in took]
    aimed = [row.target_found for row in took if row.target_found is not None]
    return ScanSummary(
        scanner=scanner,
        clean_images=clean_images,
        found=verdicts.count("backdoor found"),
        missed=verdicts.count("no evidence found"),
        undecided=verdicts.count("undecided"),
        backdoored=len(took),
        target=(sum(aimed), len(aimed)),
        alarms=clean.count("backdoor found"),
        undecided_clean=clean.count("undecided"),
        clean=len(clean),
        seconds=Mean.of([row.seconds for row in completed if row.seconds is not None]),
        failed=len(rows) - len(completed),
    )


@dataclass(frozen=True)
class Difference:
    """What became of one experiment between two sets of rows.

    Attributes:
        key: See :meth:`Row.key`, without suite and version.
        kind: ``changed``, ``only in A`` or ``only in B``.
        columns: For a changed one: name -> (value in A, value in B).
    """

    key: tuple[Any, ...]
    kind: str
    columns: dict[str, tuple[Any, Any]]


def differences(a: Iterable[Row], b: Iterable[Row], *, tolerance: float = 0.0) -> list[Difference]:
    """Compare two sets of rows experiment by experiment, over the measured columns.

    Args:
        a: Rows.
        b: Other rows.
        tolerance: Largest difference of a rate that counts as none.
    """
    left, right = {row.key()[2:]: row for row in a}, {row.key()[2:]: row for row in b}
    out = []
    for key in [*left, *(key for key in right if key not in left)]:
        if key not in right:
            out.append(Difference(key, "only in A", {}))
        elif key not in left:
            out.append(Difference(key, "only in B", {}))
        else:
            columns = {
                name: (value_a, value_b)
                for name in (
                    "acc_before",
                    "asr_before",
                    "ra_before",
                    "acc",
                    "asr",
                    "ra",
                    "der",
                    "flags",
                    "error",
                )
                if not _equal(
                    value_a := getattr(left[key], name), value_b := getattr(right[key], name), tolerance
                )
            }
            if columns:
                out.append(Difference(key, "changed", columns))
    return out


def _equal(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance
    return bool(one == other)


def write_parquet(path: Path, rows: Sequence[BaseModel], kind: type[BaseModel] = Row) -> None:
    """Write rows of a kind as Parquet, atomically.

    Raises:
        MissingExtra: Without pyarrow.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", "writing Parquet files") from None
    from unbackdoor.files import atomic_write

    kinds = {
        "tuple[int": pa.list_(pa.int64()),
        "tuple": pa.list_(pa.string()),
        "float": pa.float64(),
        "int": pa.int64(),
        "bool": pa.bool_(),
    }
    fields = []
    for name, field in kind.model_fields.items():
        text = str(field.annotation)
        fields.append(pa.field(name, next((kinds[word] for word in kinds if word in text), pa.string())))
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=pa.schema(fields))
    with atomic_write(path) as draft:
        pq.write_table(table, draft)
