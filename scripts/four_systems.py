"""Render what the four systems reached: results/four-systems*.jsonl -> docs/results/four-systems.md.

python scripts/four_systems.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unbackdoor.bench.results import WEAK, Mean, Summary, summarise, summarise_scans
from unbackdoor.bench.rows import Row, ScanRow, read_rows, read_scans
from unbackdoor.bench.victims import ATTACK_TOOK
from unbackdoor.files import atomic_write
from unbackdoor.report.words import duration, percent

ROOT = Path(__file__).parents[1]
SUITE = "four-systems-v1"
SHORT = "four-systems-short-v1"  # costly networks, trained for a few epochs
BESIDE = "trigger-unlearning-v1"
RESULTS, PAGE = ROOT / "results", ROOT / "docs" / "results" / "four-systems.md"
SYSTEMS = ("rnp", "awm", "ims", "tac")
NOT_ALL_TO_ONE = ("none", "badnets_all_to_all")
PAPERS = """Reported by the papers, at settings of their own (none at this width): RNP, CIFAR-10, mean
over twelve attacks with 500 images and the threshold swept against the test ASR: ASR 5.03 %, ACC 92.18 %.
A user of AWM's released code, BadNets with 500 images: ASR 33.08 %, ACC lost 3.1 points, ASR counted over
all images, so that 10 % is a perfect repair. For IMS and TAC no table could be read. BackdoorBench's numbers
stand in the [full table](four-systems-v1.md) where a setting matches."""


def page() -> str:
    """Return the Markdown page."""
    full, short, beside = (read_rows(RESULTS / f"{suite}.jsonl") for suite in (SUITE, SHORT, BESIDE))
    scans = [scan for suite in (SUITE, SHORT) for scan in read_scans(RESULTS / f"{suite}.scans.jsonl")]
    text = (RESULTS / "screening.jsonl").read_text(encoding="utf-8")
    screened = [json.loads(line) for line in text.splitlines()]
    rows = [*full, *short]
    lines = [
        "# What the four systems reach",
        "",
        f"Made by `python scripts/four_systems.py` from {len(full):,} rows of `results/{SUITE}.jsonl`, "
        f"{len(short):,} of `results/{SHORT}.jsonl` (fewer epochs, for networks that are costly to train) "
        f"and {len(scans):,} scans; measured by `unbackdoor bench run {SUITE}` and `{SHORT}`, of which this "
        "is the part that has been run. Every row, attack by attack, with intervals and charts: "
        f"[{SUITE}.md]({SUITE}.md), [{SHORT}.md]({SHORT}.md). Why they miss what they miss, and what was "
        "tried: [docs/four-systems.md](../four-systems.md).",
        "",
        PAPERS,
    ]
    main = [row for row in rows if _setting(row) == _setting(rows[0])]
    lines += ["", "## The aims", "", f"On {_named(main[0])}, over the attacks with one target class.", ""]
    lines += _aims(main)
    lines += ["", f"## Beside them, from the suite [{BESIDE}]({BESIDE}.md)", ""]
    lines += _aims([row for row in beside if _setting(row) == _setting(rows[0])], ("neural_cleanse",))
    for images in sorted({row.clean_images for row in main}, reverse=True):
        lines += ["", f"## {images} clean images: {_named(main[0])}", ""]
        lines += _table([row for row in main if row.clean_images == images])
    for setting in dict.fromkeys(_setting(row) for row in rows):
        others = [row for row in rows if _setting(row) == setting]
        if setting != _setting(main[0]):
            for images in sorted({row.clean_images for row in others}, reverse=True):
                lines += ["", f"## {images} clean images: {_named(others[0])}", ""]
                lines += _table([row for row in others if row.clean_images == images])
    lines += ["", "## Detection", "", *_detection(scans)]
    lines += ["", "## Triggers and samples by RNP", "", *_further(screened)]
    return "\n".join(lines) + "\n"


def _setting(row: Row) -> tuple[object, ...]:
    return (row.dataset, row.architecture, row.width, row.recipe)


def _named(row: Row) -> str:
    return f"{row.dataset}, {row.architecture} of width {row.width:g}, recipe {row.recipe}"


def _same(row: Row) -> tuple[object, ...]:
    return (row.attack, row.poison_rate, row.target, row.victim_seed, row.clean_images, row.defender_seed)


def _took(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.error is None and row.asr is not None and WEAK not in row.flags]


def _aims(rows: Sequence[Row], systems: Sequence[str] = SYSTEMS) -> list[str]:
    """Hold each preset of each system against what it was to reach."""
    lines = [
        "| system | images | rows | ASR | aim | ACC lost | aim | DER | that of ft on the same rows | "
        "ACC lost on clean models | aim |",
        "|---|---:|---:|---:|---|---:|---|---:|---:|---:|---|",
    ]
    kept = [row for row in rows if row.attack not in NOT_ALL_TO_ONE]
    baseline = {_same(row): row for row in _took(kept) if row.defense == "ft"}
    for system in systems:
        for images, asr, lost in ((500, 0.05, 0.02), *(((10, 0.10, 0.05),) if system == "awm" else ())):
            for preset in dict.fromkeys(row.preset for row in rows if row.defense == system):

                def mine(row: Row, *, d: str = system, p: str = preset, n: int = images) -> bool:
                    return (row.defense, row.preset, row.clean_images) == (d, p, n)

                lines += _aim(filter(mine, kept), filter(mine, rows), baseline, asr, lost)
    return lines


def _aim(
    mine: Iterable[Row],
    everything: Iterable[Row],
    baseline: dict[tuple[object, ...], Row],
    asr: float,
    lost: float,
) -> list[str]:
    took = _took(mine)
    if not took:
        return []
    (found,) = summarise(took)
    clean = [row for row in everything if row.attack == "none" and row.acc is not None]
    unharmed = summarise(clean)[0].acc_lost_clean if clean else Mean.of([])
    ft = Mean.of([b.der for b in (baseline.get(_same(row)) for row in took) if b and b.der is not None])
    der = f"{ft.value:.3f}" if ft.n else "-"
    cells = [
        found.defense,
        str(found.clean_images),
        str(len(took)),
        *_held(found.asr.value, asr, "<="),
        *_held(found.acc_lost.value, lost, "<="),
        f"{found.der.value:.3f}",
        der,
        *(_held(unharmed.value, 0.01, "<=") if unharmed.n else ["-", "-"]),
    ]
    return ["| " + " | ".join(cells) + " |"]


def _held(value: float, limit: float, sign: str) -> list[str]:
    return [percent(value), f"{sign} {100 * limit:g} %: {'met' if value <= limit else 'missed'}"]


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| defense | " + " | ".join(_attacks(rows)) + " | mean ASR | ACC lost | RA | DER | seconds | "
        "ACC lost on clean models | failed |",
        "|---|" + "---:|" * (len(_attacks(rows)) + 7),
    ]
    for found in summarise(rows):
        own = [r for r in rows if _name(r) == found.defense and r.selection == found.selection]
        cells = [
            found.defense,
            *(_asr(own, attack) for attack in _attacks(rows)),
            *_means(found),
            duration(found.seconds.value),
            percent(found.acc_lost_clean.value) if found.acc_lost_clean.n else "-",
            str(found.failed),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    told = "The columns of the attacks hold ASR, one number for each sample of the defender."
    if any(WEAK in row.flags for row in rows):
        told += f" In brackets: the attack took below {percent(ATTACK_TOOK)}, and is left out of the means."
    return [told, "", *lines]


def _means(found: Summary) -> list[str]:
    if not found.asr.n:
        return ["-"] * 4
    rates = [percent(mean.value) for mean in (found.asr, found.acc_lost, found.ra)]
    return [*rates, f"{found.der.value:.3f}"]


def _name(row: Row) -> str:
    return row.defense if row.preset == "default" else f"{row.defense}:{row.preset}"


def _victim(row: Row | ScanRow) -> str:
    return f"{row.attack} {100 * row.poison_rate:g} %"


def _attacks(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(_victim(row) for row in rows if row.attack != "none"))


def _asr(rows: Iterable[Row], attack: str) -> str:
    mine = [row for row in rows if _victim(row) == attack]
    told = ", ".join("failed" if row.asr is None else percent(row.asr) for row in mine)
    weak = any(WEAK in row.flags for row in mine)
    return f"({told})" if told and weak else told or "-"


def _detection(scans: Sequence[ScanRow]) -> list[str]:
    lines = [
        "Each scanner by itself, at its own level; `undecided` is an answer.",
        "",
        "| setting | scanner | images | found | missed | undecided | target named | clean: accused "
        "| undecided | p of backdoored | p of clean | time |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    by: Callable[[ScanRow], tuple[object, ...]] = lambda s: (s.dataset, s.architecture, s.width, s.recipe)  # noqa: E731
    for setting in dict.fromkeys(map(by, scans)):
        group = [scan for scan in scans if by(scan) == setting]
        for found in summarise_scans(group):
            own = [s for s in group if (s.scanner, s.clean_images) == (found.scanner, found.clean_images)]
            bad, clean = ([s for s in own if (s.attack == "none") == is_clean] for is_clean in (False, True))
            cells = [
                ", ".join(map(str, setting)),
                found.scanner,
                str(found.clean_images),
                f"{found.found} of {found.backdoored}",
                str(found.missed),
                str(found.undecided),
                f"{found.target[0]} of {found.target[1]}",
                f"{found.alarms} of {found.clean}",
                str(found.undecided_clean),
                _p_values(bad),
                _p_values(clean),
                duration(found.seconds.value),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _further(screened: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what RNP tells of samples and triggers, from the rows of scripts/screening.py."""
    lines = [
        "On the plain networks of width 16, 500 images; every screener, and what the columns mean: "
        "[screening.md](screening.md). The suite cannot run these, because a screener answers for images and "
        "not for a model.",
        "",
        "| attack | sample AUROC | TPR at 1 % FPR | against the target class: AUROC | TPR at 1 % FPR | "
        "voted for the target | recovered trigger succeeds |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for attack in dict.fromkeys(row["attack"] for row in screened):
        mine = {row["screener"]: row for row in screened if row["attack"] == attack and "error" not in row}
        found, trigger = mine.get("rnp"), mine.get("trigger recovery")
        cells = [attack]
        for kind in ("all", "target"):
            scores = found.get(kind) if found else None
            cells += [f"{scores['auroc']:.3f}", percent(scores["tpr"])] if scores else ["-", "-"]
        cells += [_yes(trigger["voted_target"]), percent(trigger["success"])] if trigger else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _p_values(scans: Iterable[ScanRow]) -> str:
    known = sorted(s.p_value for s in scans if s.p_value is not None)
    return f"{known[0]:.2g} to {known[-1]:.2g}, median {known[len(known) // 2]:.2g}" if known else "-"


def main() -> None:
    """Write the page."""
    with atomic_write(PAGE) as draft:
        draft.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
