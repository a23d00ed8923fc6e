"""Render how well the scanners detect: results/scanners-*.scans.jsonl -> docs/results/detection.md.

python scripts/detection.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unbackdoor.bench.detection import COMBINED, FPRS, Detection, by_attack, detections
from unbackdoor.bench.results import WEAK
from unbackdoor.bench.rows import ScanRow, read_scans
from unbackdoor.files import atomic_write
from unbackdoor.report.words import duration, interval, percent, rate

ROOT = Path(__file__).parents[1]
SUITES = ("scanners-v1", "scanners-one-percent-v1")
PARTLY = 0.4
PAGE = ROOT / "docs" / "results" / "detection.md"


def page() -> str:
    """Return the Markdown page."""
    rows = [row for suite in SUITES for row in read_scans(ROOT / "results" / f"{suite}.scans.jsonl")]
    whole = detections(rows)
    lines = [
        "# Detection",
        "",
        f"Made by `python scripts/detection.py` from the {len(rows):,} scans of the suites "
        f"{' and '.join(f'`{suite}`' for suite in SUITES)} (`results/*.scans.jsonl`), measured by "
        "`unbackdoor bench run`. Small networks on digits, 60 clean images. Networks "
        "whose attack did not take are left out. A "
        'scan without a calibrated p-value accuses nobody. "Found" and "false alarms" are at p = 0.05, each '
        f'scanner by itself; "{COMBINED}" is what `unbackdoor scan` does: the smallest p-value after '
        "correction, where checks that notice the same class count together "
        "([scanners.md](../scanners.md)). "
        '"TPR" is the share found at the threshold that accuses 5 % of these clean networks; '
        "finding that threshold takes labelled networks, so no user has it.",
        "",
        *_table(whole),
        "",
        "## ROC: share found where this share of the clean networks is accused",
        "",
        "| scanner | " + " | ".join(percent(fpr) for fpr in FPRS) + " |",
        "|---|" + "---:|" * len(FPRS),
        *(f"| {d.scanner} | " + " | ".join(map(percent, d.roc)) + " |" for d in whole),
        "",
        "## By attack: found at p = 0.05",
        "",
    ]
    names = [d.scanner for d in whole]
    lines += _by_attack(rows, names)
    # A backdoor that works on two images of five is one, though no repair can be measured by it.
    partly = [row.model_copy(update={"flags": ()}) for row in rows if WEAK in row.flags and _works(row)]
    lines += [
        "",
        f"## Attacks that took in part (ASR from {percent(PARTLY)} to the bound of the means)",
        "",
        "They are in none of the numbers above. Nearly all of them are missed.",
        "",
        *_by_attack([row for row in rows if row.attack == "none"] + partly, names),
    ]
    failed = [row for row in rows if row.error is not None]
    if failed:
        lines += ["", f"{len(failed)} scans failed; the first: {failed[0].error}"]
    return "\n".join(lines) + "\n"


def _works(row: ScanRow) -> bool:
    return row.asr_before is not None and row.asr_before >= PARTLY


def _by_attack(rows: Sequence[ScanRow], names: Sequence[str]) -> list[str]:
    lines = ["| attack | networks | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for kind, group in by_attack(rows).items():
        found = {d.scanner: d.found for d in group}
        count = max((d.backdoored for d in group), default=0)
        if count:
            cells = " | ".join(rate(found[n]) if n in found else "-" for n in names)
            lines.append(f"| {kind} | {count} | {cells} |")
    return lines


def _table(found: Sequence[Detection]) -> list[str]:
    lines = [
        "| scanner | AUROC | TPR at 5 % FPR | found | target named | false alarms | interval | time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for d in found:
        lines.append(
            f"| {d.scanner} | {_number(d.auroc)} | {_number(d.tpr)} | {d.found.hits} of {d.found.total} "
            f"| {d.target.hits} of {d.target.total} | {d.alarms.hits} of {d.alarms.total} "
            f"| {interval(d.alarms)} % | {duration(d.seconds)} |"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """Write the page."""
    with atomic_write(PAGE) as draft:
        draft.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
