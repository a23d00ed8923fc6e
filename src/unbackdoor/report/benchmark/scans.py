"""Tables of scans: what scanners found on victims, and how well they tell them from clean networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from unbackdoor.bench.detection import FPRS, Detection, by_attack, detections
from unbackdoor.bench.results import ScanSummary, summarise_scans
from unbackdoor.bench.rows import ScanRow
from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.groups import Line, Rows, Setting, lines
from unbackdoor.report.benchmark.repairs import missing
from unbackdoor.report.tables import Cell, Section, Table, columns
from unbackdoor.report.words import NOTHING, interval

_SCANS = columns(
    "scanner", "clean images", "found", "missed", "undecided", "target named", "false alarms",
    "undecided on clean models", "p of backdoored", "p of clean", "cost", "failed",
)  # fmt: skip
_DETECTION = columns(
    "scanner",
    "AUROC",
    "TPR at 5 % FPR",
    "found",
    "target named",
    "false alarms",
    "their 95 % interval",
    "time",
)


def scan_section(scans: Rows[ScanRow]) -> Section:
    """Return what every scanner said of the victims, a table for each setting."""
    tables: list[Table] = []
    for setting, rows in scans.by(Setting.of).items():
        caption = (
            "Counts over attacks, poison rates and seeds; victims whose attack did not take are left out. "
            "p: smallest to largest, and the median."
        )
        made = [
            _scan_cells(line, rows.older if line.older else rows.current)
            for line in lines(_summaries(rows.current), _summaries(rows.older))
        ]
        tables.append(cells.table(f"scans-{len(tables)}", str(setting), caption, _SCANS, made))
    return Section("scans", "Scanners", tables=tuple(tables))


def _summaries(rows: Sequence[ScanRow]) -> dict[tuple[str, int], ScanSummary]:
    return {(s.scanner, s.clean_images): s for s in summarise_scans(rows)}


def _scan_cells(line: Line[tuple[str, int], ScanSummary], rows: Sequence[ScanRow]) -> tuple[Cell, ...]:
    s = line.group
    if s is None:
        key = None if line.key is None else (line.key[0], cells.HONEST, line.key[1])
        return (missing(key), *cells.absent(len(_SCANS) - 1))
    own_rows = [row for row in rows if (_scanner(row), row.clean_images) == (s.scanner, s.clean_images)]
    return (
        cells.method(s.scanner, older=line.older, means=True),
        cells.number(s.clean_images),
        cells.share(s.found, s.backdoored),
        cells.share(s.missed, s.backdoored),
        cells.share(s.undecided, s.backdoored),
        cells.share(*s.target),
        cells.share(s.alarms, s.clean),
        cells.share(s.undecided_clean, s.clean),
        _p_values(row for row in own_rows if row.attack != "none"),
        _p_values(row for row in own_rows if row.attack == "none"),
        cells.cost(s.seconds),
        cells.number(s.failed, tone="bad"),
    )


def _scanner(row: ScanRow) -> str:
    return row.scanner if row.preset == "default" else f"{row.scanner}:{row.preset}"


def _p_values(scans: Iterable[ScanRow]) -> Cell:
    values = sorted(row.p_value for row in scans if row.p_value is not None)
    if not values:
        return Cell(NOTHING)
    median = values[len(values) // 2]
    return Cell(f"{values[0]:.2g} to {values[-1]:.2g}", f"median {median:.2g}", median)


def detection_tables(scans: Rows[ScanRow]) -> tuple[Table, Table]:
    """Return how well each scanner detects at its own level, and its ROC curve."""
    made = lines(_by_scanner(scans.current), _by_scanner(scans.older))
    roc = columns("scanner", *map(cells.percent, FPRS))
    curves = [(*_first(line), *_roc(line.group)) for line in made]
    return (
        cells.table(
            "detection", "", "", _DETECTION, [(*_first(line), *_detected(line.group)) for line in made]
        ),
        cells.table("roc", "", "", roc, curves),
    )


def _by_scanner(scans: Sequence[ScanRow]) -> dict[str, Detection]:
    return {detection.scanner: detection for detection in detections(scans)}


def _first(line: Line[str, Detection]) -> tuple[Cell, ...]:
    if line.group is None:
        return (missing(None if line.key is None else (line.key, cells.HONEST, 0)),)
    return (cells.method(line.group.scanner, older=line.older, means=True),)


def _detected(detection: Detection | None) -> tuple[Cell, ...]:
    if detection is None:
        return cells.absent(len(_DETECTION) - 1)
    return (
        cells.decimal(detection.auroc),
        cells.decimal(detection.tpr),
        *(
            cells.share(hits.hits, hits.total)
            for hits in (detection.found, detection.target, detection.alarms)
        ),
        Cell(f"{interval(detection.alarms)} %" if detection.alarms.total else NOTHING),
        cells.time(detection.seconds),
    )


def _roc(detection: Detection | None) -> tuple[Cell, ...]:
    if detection is None:
        return cells.absent(len(FPRS))
    return tuple(map(cells.one, detection.roc)) or tuple(Cell(NOTHING) for _ in FPRS)


def detection_by_attack(identifier: str, scans: Rows[ScanRow]) -> Table:
    """Return the share of networks that each scanner found, a row an attack, a column a scanner."""
    names = list(_by_scanner(scans.all))
    current, older = _attacked(scans.current), _attacked(scans.older)
    made = []
    for line in lines(current, older):
        first = _attack(line)
        if line.group is None:
            made.append((first, *cells.absent(1 + len(names))))
            continue
        by_scanner = {detection.scanner: detection for detection in line.group}
        count = max(detection.backdoored for detection in line.group)
        shares = [
            cells.measured(by_scanner[name].found) if name in by_scanner else Cell(NOTHING) for name in names
        ]
        made.append((first, cells.number(count), *shares))
    return cells.table(identifier, "", "", columns("attack", "networks", *names), made)


def _attack(line: Line[str, list[Detection]]) -> Cell:
    if line.key is None:
        return missing(None)
    small = cells.OLDER_CODE if line.older else "" if line.group else cells.NOT_RUN
    return Cell(cells.name(line.key), small, older=line.older)


def _attacked(scans: Sequence[ScanRow]) -> Mapping[str, list[Detection]]:
    groups = by_attack(scans)
    return {kind: group for kind, group in groups.items() if any(d.backdoored for d in group)}
