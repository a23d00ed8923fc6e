"""Tables of rows that are no cells of a suite: one line for each, marked if its code is older.

These rows are mappings, made by scripts; what a column holds stands in the script that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unbackdoor.report.benchmark import cells
from unbackdoor.report.benchmark.cells import percent
from unbackdoor.report.benchmark.groups import Rows
from unbackdoor.report.tables import Cell, Table, columns
from unbackdoor.report.words import NOTHING

Record = Mapping[str, Any]
_CHECKS = columns("check", "status", "strongest class", "p", "adjusted p", "time", text=2)
_REPAIRS = columns("method", "ACC", "ASR", "RA", "DER", "time")
_SCREENED = columns(
    "attack", "screener", "AUROC", "AP", "TPR at 1 % FPR", "target class: AUROC", "target class: AP",
    "target class: TPR at 1 % FPR", "time", text=2,
)  # fmt: skip
_TRIGGERS = columns(
    "attack", "voted class", "is the target", "success", "mask (pixels)", "IoU", "cosine", "time"
)


def check_table(identifier: str, scan: Record, *, older: bool) -> Table:
    """Return the checks of one scan."""
    made = [
        (
            Cell(cells.name(check["check"]), older=older),
            Cell(cells.name(check["status"])),
            Cell(", ".join(map(str, check["strongest"][:3]))),
            cells.decimal(check["p_value"], ".2g"),
            cells.decimal(check["adjusted"], ".2g"),
            cells.time(check["seconds"]),
        )
        for check in scan["checks"]
    ]
    return cells.table(identifier, "", "", _CHECKS, made)


def repair_table(identifier: str, caption: str, repairs: Rows[Record]) -> Table:
    """Return the repairs of one model, after a line of what they started from."""
    first = repairs.all[0]
    before = (cells.one(first[f"{rate}_before"]) for rate in ("acc", "asr", "ra"))
    made = [(Cell("before"), *before, Cell(""), Cell(""))]
    for row, older in repairs.pairs:
        method = Cell(cells.name(row["method"]), older=older)
        if "error" in row:
            failed = Cell(cells.name(row["error"], cells.LONGEST_ERROR), tone="bad")
            made.append((method, failed, *(Cell("") for _ in range(3)), cells.time(row["seconds"])))
            continue
        rates = (cells.one(row[rate]) for rate in ("acc", "asr", "ra"))
        made.append((method, *rates, cells.decimal(row["der"]), cells.time(row["seconds"])))
    return cells.table(identifier, "", caption, _REPAIRS, made)


def screening_table(identifier: str, screened: Rows[Record]) -> Table:
    """Return how well screeners tell triggered images from clean ones."""
    made = []
    for row, older in screened.pairs:
        first = (Cell(cells.name(row["attack"]), older=older), Cell(cells.name(row["screener"])))
        if "error" in row:
            failed = Cell(cells.name(row["error"], cells.LONGEST_ERROR), tone="bad")
            made.append((*first, failed, *(Cell("") for _ in range(6))))
            continue
        scores = (*_scores(row["all"]), *_scores(row["target"]))
        made.append((*first, *scores, cells.time(row["seconds"])))
    return cells.table(identifier, "", "", _SCREENED, made)


def _scores(scores: Mapping[str, float] | None) -> tuple[Cell, ...]:
    values = scores or {}
    return (
        cells.decimal(values.get("auroc")),
        cells.decimal(values.get("average_precision")),
        cells.one(values.get("tpr")),
    )


def trigger_table(identifier: str, recovered: Rows[Record]) -> Table:
    """Return triggers that were recovered, beside those of the attackers."""
    made = [
        (
            Cell(cells.name(row["attack"]), older=older),
            Cell(str(row["voted"]), key=row["voted"]),
            Cell("yes" if row["voted_target"] else "no"),
            cells.one(row["success"]),
            cells.decimal(row["mask_l1"], ".1f"),
            cells.decimal(row.get("iou")),
            cells.decimal(row.get("cosine")),
            cells.time(row["seconds"]),
        )
        for row, older in recovered.pairs
    ]
    return cells.table(identifier, "", "", _TRIGGERS, made)


def crossed_table(
    identifier: str,
    heading: str,
    rows: Rows[Record],
    *,
    row: Callable[[Record], str],
    column: Callable[[Record], str],
    cell: Callable[[Record], str],
    corner: str,
) -> Table:
    """Return one cell for each record; a cell of older code is marked by itself.

    Args:
        identifier: Of the table.
        heading: Above it.
        rows: The records.
        row: Names the row of a record.
        column: Names its column.
        cell: Says what stands in its cell.
        corner: Heads the column of the row names.
    """
    places = {(row(record), column(record)): (record, older) for record, older in rows.pairs}
    names = list(dict.fromkeys(map(column, rows.all)))
    made = []
    for name in dict.fromkeys(map(row, rows.all)):
        entries: Sequence[tuple[Record, bool] | None] = [places.get((name, head)) for head in names]
        made.append(
            (
                Cell(cells.name(name, cells.LONGEST_ERROR)),
                *(Cell(cell(at[0]), older=at[1]) if at else Cell(NOTHING) for at in entries),
            )
        )
    return cells.table(identifier, heading, "", columns(corner, *names, text=1 + len(names)), made)


def few_classes_table(identifier: str, rows: Rows[Record]) -> Table:
    """Return what one check said of the networks of each data set and attack."""
    names = columns(
        "data", "attack", "networks", "ASR", "found", "another class", "accused", "seconds", text=2
    )
    pairs: dict[tuple[str, str], list[tuple[Record, bool]]] = {}
    for row, older in rows.pairs:
        pairs.setdefault((row["data"], row["attack"]), []).append((row, older))
    made = []
    for (data, attack), group in sorted(pairs.items(), key=lambda item: (item[0][1] != "none", item[0])):
        members, clean = [row for row, _ in group], attack == "none"
        accused = [row for row in members if row.get("verdict") == "backdoor found"]
        right = [row for row in accused if row["named"] == [row["target"]]]
        classes = sorted({row["classes"] for row in members})
        reached = sorted(row["asr"] for row in members if row["asr"] is not None)
        seconds = sorted(row["seconds"] for row in members)[len(members) // 2]
        made.append(
            (
                Cell(data, older=any(older for _, older in group)),
                Cell("none" if clean else attack, f"{classes[0]} to {classes[-1]} classes"),
                Cell(str(len(members))),
                Cell(f"{percent(reached[0])} to {percent(reached[-1])}" if reached else "-"),
                Cell("-" if clean else f"{len(right)}"),
                Cell("-" if clean else f"{len(accused) - len(right)}"),
                Cell(f"{len(accused)}" if clean else "-"),
                Cell(f"{seconds:.0f} s", key=seconds),
            )
        )
    return cells.table(
        identifier,
        "",
        "Networks accused at the default level; processor seconds of the check, median.",
        names,
        made,
    )


def full_size_table(identifier: str, rows: Rows[Record]) -> Table:
    """Return a row for each network: its size, the time of its audit, and what that left out."""
    names = columns("network", "verdict", "parameters", "an image", "seconds", "memory", "checks", text=2)
    made = []
    for row, older in rows.pairs:
        ended = row["error"] or row["verdict"] or f"exit code {row['exit_code']}"
        each = row["seconds_per_image"]
        out = [step["step"] for step in row["steps"] if step["status"] == "left out"]
        made.append(
            (
                Cell(row["network"], older=older),
                Cell(str(ended), f"left out: {', '.join(out)}" if out else ""),
                Cell(f"{row['parameters'] / 1e6:.1f} M", key=row["parameters"]),
                Cell("-" if each is None else f"{1000 * each:.0f} ms", key=each),
                Cell(f"{row['seconds']:.0f} s", key=row["seconds"]),
                Cell(f"{row['peak_mb']:,} MB", key=row["peak_mb"]),
                Cell("-" if row["error"] else f"{row['checks_done']} of {row['checks_planned']}"),
            )
        )
    return cells.table(
        identifier, "", "The time of one pass of one image, of the whole audit, and its memory.", names, made
    )
