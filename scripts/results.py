"""Render the committed rows: results/*.jsonl -> docs/results/*.md and what other pages quote of them.

python scripts/results.py            # all of them
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from unbackdoor.bench.code_version import is_current_of
from unbackdoor.bench.detection import COMBINED, Detection, detections
from unbackdoor.bench.results import WEAK
from unbackdoor.bench.rows import Row, ScanRow, read_probes, read_rows, read_scans
from unbackdoor.bench.suites import SHIPPED, find_suite, load_suite
from unbackdoor.files import atomic_write
from unbackdoor.report.benchmark import bench_report
from unbackdoor.report.benchmark.cells import percent
from unbackdoor.report.benchmark.groups import IsCurrent, Rows, Setting
from unbackdoor.report.benchmark.matrix import asr_matrix, paired_table
from unbackdoor.report.benchmark.ranges import range_table
from unbackdoor.report.benchmark.records import (
    check_table,
    crossed_table,
    few_classes_table,
    full_size_table,
    repair_table,
    screening_table,
    trigger_table,
)
from unbackdoor.report.benchmark.scans import detection_by_attack, detection_tables, scan_section
from unbackdoor.report.benchmark.suite import age_of
from unbackdoor.report.benchmark.victims import IN_PART, victim_tables, victims_of
from unbackdoor.report.markdown import table_lines, to_markdown
from unbackdoor.report.tables import OLDER, Document, Section, Table, Verbatim
from unbackdoor.report.words import duration

ROOT = Path(__file__).parents[1]
RESULTS, PAGES, GUIDE = ROOT / "results", ROOT / "docs" / "results", ROOT / "docs" / "auditing.md"
QUOTING = (GUIDE, ROOT / "docs" / "scanners.md", ROOT / "README.md")  # pages with numbers between marks
BEGIN, END = "<!-- {}: made by scripts/results.py -->", "<!-- end of {} -->"
FOUR, SHORT, BESIDE = "four-systems-v1", "four-systems-short-v1", "trigger-unlearning-v1"
PLAIN, STRONG, ZOO = "cifar10-small-v1", "repairs-strong-v1", "zoo-v1"
SCANNERS = ("scanners-v1", "scanners-one-percent-v1")
FOREIGN, SCREENING, REMEDIES = "foreign-models", "screening", "remedies"
FULL_SIZE, FEW_CLASSES = "full-size", "few-classes"
BESIDE_ROWS = (".scans", ".probes")  # files beside the rows of a suite
ONE_PERCENT = 0.01
SYSTEMS = ("rnp", "awm", "ims", "tac", "neural_cleanse")
METHODS = (
    "neural_cleanse", "neural_cleanse:blend", "rnp:robust", "rnp", "awm:reference", "awm", "tac", "ims", "fp",
    "ft", "random_prune", "none",
)  # fmt: skip
ABOUT = {
    "foundation": (
        "The first rows of this project: four attacks on CIFAR-10 at 10 %, a narrow network, 500 clean "
        "images that no victim was trained on, two samples. No suite runs them again; `cifar10-small-v1` "
        "took their place."
    ),
}
Record = Mapping[str, Any]


def suites() -> list[str]:
    """Return the labels of the suites whose rows are committed."""
    names = [file.stem for file in sorted(RESULTS.glob("*.jsonl")) if not file.stem.endswith(BESIDE_ROWS)]
    return [name for name in names if name not in (FOREIGN, SCREENING, REMEDIES, FULL_SIZE, FEW_CLASSES)]


def documents() -> dict[str, Callable[[IsCurrent | None], Document]]:
    """Return what makes each page, by its name."""
    others = {
        "four-systems": four_systems,
        "detection": detection,
        FOREIGN: foreign_models,
        SCREENING: screening,
        REMEDIES: remedies,
        **({FEW_CLASSES: few_classes} if (RESULTS / f"{FEW_CLASSES}.jsonl").exists() else {}),
        **({FULL_SIZE: full_size} if (RESULTS / f"{FULL_SIZE}.jsonl").exists() else {}),
        **({"zoo": zoo} if (RESULTS / f"{ZOO}.jsonl").exists() else {}),
    }
    return {**{label: partial(suite, label) for label in suites()}, **others}


def page(name: str, is_current: IsCurrent | None = None) -> str:
    """Return a page as Markdown."""
    return to_markdown(documents()[name](is_current))


def suite(label: str, is_current: IsCurrent | None = None) -> Document:
    """Return the report of a suite."""
    rows, scans = read_rows(RESULTS / f"{label}.jsonl"), read_scans(RESULTS / f"{label}.scans.jsonl")
    source = f"the {len(rows):,} rows of `results/{label}.jsonl`"
    if label in ABOUT:
        about, how = ABOUT[label], ""
    else:
        about = load_suite(find_suite(label, SHIPPED)).about
        how = f"; measured by `unbackdoor bench run {label}`"
    made = bench_report(
        rows,
        scans=scans,
        probes=read_probes(RESULTS / f"{label}.probes.jsonl"),
        colophon=Verbatim(f"Made by `python scripts/results.py` from {source}{how}."),
        is_current=is_current,
        all_rows=label in ABOUT,
    )
    return replace(made, lead=(Verbatim(about), *made.lead))


def four_systems(is_current: IsCurrent | None = None) -> Document:
    """Return what RNP, AWM, IMS and TAC reached, beside a repair by recovered triggers and the controls."""
    full, short, beside = (_repairs(label, is_current) for label in (FOUR, SHORT, BESIDE))
    scans = Rows((*_scans(FOUR, is_current).pairs, *_scans(SHORT, is_current).pairs))
    rows = Rows((*full.pairs, *short.pairs))
    lead = (
        Verbatim(
            f"{len(full.pairs):,} rows of [{FOUR}]({FOUR}.md), {len(short.pairs):,} of "
            f"[{SHORT}]({SHORT}.md), which has fewer epochs for networks that are costly to train, "
            f"{len(beside.pairs):,} of [{BESIDE}]({BESIDE}.md), and {len(scans.pairs):,} scans: the part of "
            "these suites that has been run. Their own pages show every attack with intervals. How the "
            "systems are built, and what the rows say of each: [docs/four-systems.md](../four-systems.md)."
        ),
        *age_of(full, short, beside, scans),
        Verbatim(
            "Reported by the papers, at settings of their own (none at this width): RNP, CIFAR-10, mean "
            "over twelve attacks with 500 images and the threshold swept against the test ASR: ASR 5.03 %, "
            "ACC 92.18 %. A user of AWM's released code, BadNets with 500 images: ASR 33.08 %, ACC lost "
            "3.1 points, ASR counted over all images, so that 10 % is a perfect repair."
        ),
        "What a reader may conclude: on the networks and attacks of these rows, each system leaves some "
        "attack in place that another one removes, and the sample of clean images changes results as much "
        "as the method does. One to five rows an attack tell large differences from none; they do not rank "
        "systems whose means lie a few points apart, and they say nothing of other networks.",
    )
    main = Setting.of(full.all[0])
    plain = Rows((*full.pairs, *beside.pairs)).where(lambda row: Setting.of(row) == main)
    one_class = plain.where(lambda row: row.attack != "badnets_all_to_all")
    words = (
        f"On {main}, over the attacks with one target class that took. Where fine-tuning (ft) has a row of "
        "the same victim, budget and sample, the DER of both over these."
    )
    table = paired_table("beside-ft", "", words, one_class, defenses=SYSTEMS, baseline="ft")
    return Document(
        "What the four systems reach",
        lead,
        (
            Section("beside-ft", "Beside fine-tuning on the same networks", tables=(table,)),
            Section("attacks", "Attack by attack", (_matrix_words(rows),), _matrices(rows, main)),
            scan_section(scans),
            _rnp_section(is_current),
        ),
        _colophon(f"results/{FOUR}.jsonl, results/{SHORT}.jsonl and results/{BESIDE}.jsonl"),
    )


def _matrix_words(rows: Rows[Row]) -> str:
    words = "The columns of the attacks hold ASR, one number for each sample of the defender."
    weak = any(WEAK in row.flags for row in rows.all)
    return words + (" In brackets: the attack did not take, and is left out of the means." if weak else "")


def _matrices(rows: Rows[Row], main: Setting) -> tuple[Table, ...]:
    settings = rows.by(Setting.of)
    tables = []
    for setting in sorted(settings, key=lambda setting: setting != main):
        for images, own in sorted(settings[setting].by(lambda row: row.clean_images).items(), reverse=True):
            heading = f"{setting}: {images:,} clean images"
            tables.append(asr_matrix(f"matrix-{len(tables)}", heading, "", own))
    return tuple(tables)


def _rnp_section(is_current: IsCurrent | None) -> Section:
    made = _records(SCREENING, is_current)
    words = Verbatim(
        "On the plain networks of width 16, 500 images; every screener, and what the columns mean: "
        "[screening.md](screening.md). A screener answers for images and not for a model, so no suite has "
        "these."
    )
    tables = (
        screening_table("rnp-samples", made.where(lambda row: row["screener"] == "rnp")),
        trigger_table("rnp-triggers", made.where(lambda row: row["screener"] == "trigger recovery")),
    )
    return Section("rnp", "Triggers and samples by RNP", (words,), tables)


def detection(is_current: IsCurrent | None = None) -> Document:
    """Return how well the scanners detect."""
    scans = _scans_of_digits(is_current)
    overview, roc = detection_tables(scans)
    lead = (
        Verbatim(
            f"{len(scans.pairs):,} scans of the suites {' and '.join(f'`{label}`' for label in SCANNERS)}: "
            "small networks on digits, 60 clean images. Networks whose attack did not take are left out. A "
            'scan without a calibrated p-value accuses nobody. "Found" and "false alarms" are at p = 0.05, '
            f'each scanner by itself; "{COMBINED}" is what `unbackdoor scan` does: the smallest p-value '
            "after correction, where checks that notice the same class count together "
            '([scanners.md](../scanners.md)). "TPR" is the share found at the threshold that accuses 5 % '
            "of these clean networks; finding that threshold takes labelled networks, so no user has it."
        ),
        *age_of(scans),
        "What a reader may conclude: how these scanners order small networks of one architecture and one "
        "data set, each within the interval of its false alarms. The rates do not carry over to other "
        "networks.",
    )
    partly = _partly(scans)
    failed = scans.where(lambda row: row.error is not None).all
    words = "They are in none of the numbers above."
    sections = (
        Section("scanners", "Scanners", tables=(overview,)),
        Section("roc", "ROC: share found where this share of the clean networks is accused", tables=(roc,)),
        Section(
            "by-attack", "By attack: found at p = 0.05", tables=(detection_by_attack("by-attack-0", scans),)
        ),
        Section(
            "partly",
            f"Attacks that took in part (ASR from {percent(IN_PART)} to the bound of the means)",
            (words,),
            (detection_by_attack("partly-0", partly),),
        ),
        *(
            [Section("failed", "Failed", (f"{len(failed)} scans failed; the first: {failed[0].error}",))]
            if failed
            else []
        ),
    )
    return Document("Detection", lead, sections, _colophon("results/scanners-*.scans.jsonl"))


def foreign_models(is_current: IsCurrent | None = None) -> Document:
    """Return what scans and repairs of published models gave."""
    made = _records(FOREIGN, is_current)
    repairs = made.where(lambda row: row["what"] == "purify")
    lead = (
        "The models were opened from their files and the images alone. The clean images are of CIFAR-10's "
        "training part (whether a publisher trained on them nobody can tell), the measurements on its test "
        "part. The publishers' triggers are known to the judge only: ACC on the whole test set, ASR and RA "
        "on triggered test images of other classes.",
        *age_of(made),
        Verbatim(
            "What a reader may conclude: no method repairs all of these models, and one that repairs the "
            "one leaves the next as it was. Three models are no sample of what is published. **Measured "
            "outside this repository; no row here:** on 11 further published backdoored networks the "
            "published methods left 2 to 100 % ASR, and always at a cost of accuracy; of 16 published "
            "checkpoints with a target class the scan found 11 (always the right class), left 3 undecided "
            "and missed 2; none of 5 clean ones was accused by three or more checks."
        ),
    )
    table = crossed_table(
        "foreign-repairs",
        "",
        repairs,
        row=lambda row: str(row["method"]),
        column=lambda row: str(row["model"]),
        cell=lambda row: "failed" if "error" in row else f"{percent(row['asr'])} / {_lost(row)}",
        corner="method",
    )
    overview = Section("repairs", "All repairs: ASR left / ACC lost", tables=(table,))
    models = [_foreign_section(name, own) for name, own in made.by(lambda row: str(row["model"])).items()]
    return Document(
        "Models that other people trained and published",
        lead,
        (overview, *models),
        _colophon("results/foreign-models.jsonl", "python scripts/foreign_models.py CHECKPOINTS"),
    )


def _lost(row: Record) -> str:
    return percent(row["acc_before"] - row["acc"])


def _foreign_section(name: str, rows: Rows[Record]) -> Section:
    words: list[str] = []
    tables: list[Table] = []
    for row, older in rows.pairs:
        mark = f" {OLDER}" if older else ""
        if row["what"] == "open":
            words.append(f"It could not be opened{mark}: {row['error']}")
        if row["what"] == "scan":
            classes = ", ".join(map(str, row["classes"])) or "none"
            right = " (the attacker's is among them)" if row["target"] in row["classes"] else ""
            words.append(
                f"{row['attack']}, target class {row['target']}. Verdict{mark}: {row['verdict']}, suspected: "
                f"{classes}{right}; {duration(row['seconds'])}. " + " ".join(row["reasons"])
            )
            tables.append(check_table(f"{name}-checks", row, older=older))
    repairs = rows.where(lambda row: row["what"] == "purify")
    if repairs.pairs:
        caption = f"Repairs with {repairs.all[0]['images']} clean images, one sample."
        tables.append(repair_table(f"{name}-repairs", caption, repairs))
    return Section(name, name, tuple(words), tuple(tables))


def screening(is_current: IsCurrent | None = None) -> Document:
    """Return how well screeners tell triggered images, and what triggers were recovered."""
    rows = _records(SCREENING, is_current).pairs
    made = Rows(tuple(sorted(rows, key=lambda pair: (pair[0]["attack"], pair[0]["screener"]))))
    first = next(row for row in made.all if "triggered" in row)
    lead = (
        Verbatim(
            f"The networks are those of `victims/{PLAIN}`; {first['images']} clean images of the defender; "
            f"{first['all']['clean']:,} clean test images and {first['triggered']} triggered ones in one "
            "set. AUROC, average precision (AP), and TPR at 1 % FPR, against all clean images and, apart, "
            "against those of the target class, which are the hardest: they keep their class for good "
            "reasons. Rows without AP are older than it."
        ),
        *age_of(made),
        "What a reader may conclude: which screeners see which of these attacks on one network each; a rate "
        "over 100 triggered images of one network has no interval over networks.",
    )
    screened = made.where(lambda row: row["screener"] != "trigger recovery")
    recovered = made.where(lambda row: row["screener"] == "trigger recovery")
    words = (
        "Towards the class that the half-unlearned networks vote for, with the defender's images alone; "
        "success on the network itself, over test images of other classes. A mask of up to 1,024 pixels; "
        "its overlap (IoU) with the pixels that the attacker's trigger changes, and the cosine between the "
        "mean changes of an image by the two."
    )
    sections = (
        Section("screeners", "Screeners", tables=(screening_table("screeners-0", screened),)),
        Section(
            "triggers",
            "Triggers recovered through unlearned networks",
            (words,),
            (trigger_table("triggers-0", recovered),),
        ),
    )
    colophon = _colophon("results/screening.jsonl", "python scripts/screening.py")
    return Document("Screening images, and recovering triggers", lead, sections, colophon)


def remedies(is_current: IsCurrent | None = None) -> Document:
    """Return what other settings of the systems give, a table for each system."""
    made = _records(REMEDIES, is_current)
    lead = (
        Verbatim(
            "Other settings of the systems, and changes of them, on single networks: ACC / ASR on 2,000 "
            "test images with 500 clean images, and the accuracy on the held-out images, which a "
            "fine-tuning and all 20 rounds of awm train on as well. No number of the judge decided or "
            "chose anything. Why these were tried: [developer-notes.md](../developer-notes.md)."
        ),
        *age_of(made),
        "What a reader may conclude: how far one setting or change moves one network and one sample. No line "
        "is a mean, and none says what the setting does elsewhere.",
    )
    tables = [
        crossed_table(
            f"remedies-{system}",
            system,
            rows,
            row=lambda row: str(row["what"]),
            column=lambda row: f"{row['attack']}, sample {row['sample']}",
            cell=_remedy,
            corner="remedy",
        )
        for system, rows in made.by(lambda row: str(row["system"])).items()
    ]
    return Document(
        "Remedies for what the four systems leave",
        lead,
        (Section("systems", "System by system", tables=tuple(tables)),),
        _colophon("results/remedies.jsonl", "python scripts/remedies.py"),
    )


def _remedy(row: Record) -> str:
    if row["diverged"]:
        return "failed"
    asr = "-" if row["asr"] is None else percent(row["asr"])
    return f"{percent(row['acc'])} / {asr}, held out {percent(row['held_out'])}"


def few_classes(is_current: IsCurrent | None = None) -> Document:
    """Return what the check for few classes says of networks that were trained for it."""
    made = _records(FEW_CLASSES, is_current or is_current_of(ROOT / "scripts" / "few_classes.py"))
    sections = []
    for part, title in (("test", "Test part"), ("tune", "Tuning part")):
        own = made.where(lambda row, part=part: row["part"] == part)
        if own.all:
            sections.append(Section(part, title, tables=(few_classes_table(f"{part}-0", own),)))
    lead = (
        "Networks with two to five classes of a data set, each drawn and trained for this. The only check "
        "that says something of so few classes is `self_reference`, which compares each class with itself in "
        "re-learned copies; its rules were made on the tuning part, and the test part was looked at once "
        "(digits had been begun before the spread for larger images was set, which changes nothing there).",
        *age_of(made),
        "What a reader may conclude: how often the check accuses a clean network, and which attacks it sees. "
        "The networks are small, and those of digits have 8 x 8 pixels.",
    )
    colophon = _colophon("results/few-classes.jsonl", "python scripts/few_classes.py")
    return Document("Networks with two to five classes", lead, tuple(sections), colophon)


def full_size(is_current: IsCurrent | None = None) -> Document:
    """Return how long audits of networks of full size take, and what they leave out."""
    # An audit begins with all checks, so that a row is of the code of a scan.
    of = is_current_of(ROOT / "scripts" / "full_size.py")
    made = _records(FULL_SIZE, is_current or (lambda row: of({**row, "what": "scan"})))
    one = made.all[0]
    lead = (
        Verbatim(
            "One audit of each network, as transformers builds and writes it, with random weights: "
            f"{one['side']} pixels, {one['classes']:,} classes, {one['images']} images, a budget of "
            f"{duration(one['budget'])} of wall time; {one['device']}. Opening, checks and page are in the "
            "seconds; the budget includes opening."
        ),
        *age_of(made),
        "What a reader may conclude: which architectures open by their folder alone, and what an audit costs "
        "there. Nothing is planted, and weights that know nothing cannot be judged: undecided is the right "
        "answer.",
    )
    return Document(
        "Audits at full size",
        lead,
        (Section("networks", "Network by network", tables=(full_size_table("networks-0", made),)),),
        _colophon("results/full-size.jsonl", "python scripts/full_size.py"),
    )


def zoo(is_current: IsCurrent | None = None) -> Document:
    """Return what the networks of the zoo know, which attacks took, and what training them cost."""
    rows = victims_of(_repairs(ZOO, is_current))
    planned = load_suite(find_suite(ZOO, SHIPPED))
    parts = {part: sum(row.part == part for row in rows.all) for part in ("tuning", "test")}
    lead = (
        Verbatim(
            f"{len(rows.all):,} networks of [zoo-v1](../zoo.md) have been trained and measured so far, "
            f"{parts['tuning']:,} of the tuning part and {parts['test']:,} of the test part. {planned.about} "
            "ACC on the whole test set without any augmentation of it, ASR on triggered test images of other "
            f"classes. An attack took where ASR is at least 80 %, in part from {percent(IN_PART)}. Processor "
            "minutes are summed over threads, and are those of the machine that the rows name."
        ),
        *age_of(rows),
        "What a reader may conclude: how well these networks know their task and how many of their backdoors "
        "work. What detection makes of them is another page.",
    )
    section = Section("victims", "Networks by kind", tables=victim_tables(rows))
    command = "unbackdoor bench run zoo-v1 --part all --only '*/none/images=*'"
    return Document("The zoo", lead, (section,), _colophon(f"results/{ZOO}.jsonl", command))


def methods(is_current: IsCurrent | None = None) -> Table:
    """Return the table of methods of the auditing guide: ranges over the rows, and over published models."""
    repairs = Rows(
        tuple(pair for label in (PLAIN, FOUR, BESIDE) for pair in _repairs(label, is_current).pairs)
    ).where(lambda row: (row.dataset, row.clean_images) == ("cifar10", 500))
    published = _records(FOREIGN, is_current).where(lambda row: row["what"] == "purify")
    return range_table("methods", "", repairs, published, methods=METHODS)


def quotes() -> dict[str, Callable[[IsCurrent | None], str]]:
    """Return what makes each text that pages quote between two marks, by the name in the marks."""
    return {
        "methods": _methods_block,
        "detection": detection_sentence,
        "detection-1%": one_percent_sentence,
        "repair": repair_sentence,
    }


def quoting(file: Path, is_current: IsCurrent | None = None) -> str:
    """Return a page with what stands between its marks made anew."""
    text = file.read_text(encoding="utf-8")
    for name, make in quotes().items():
        begin, end = BEGIN.format(name), END.format(name)
        if begin in text:
            pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
            block = begin + make(is_current) + end
            text = pattern.sub(lambda _, block=block: block, text)
    return text


def _methods_block(is_current: IsCurrent | None) -> str:
    table = methods(is_current)
    return "\n".join(["", "", *table_lines(table), *(("", *table.notes) if table.notes else ()), "", ""])


def detection_sentence(is_current: IsCurrent | None = None) -> str:
    """Return how many networks a whole scan found and accused."""
    combined, mark = _combined(_scans_of_digits(is_current))
    return (
        f"On {combined.backdoored} backdoored and {combined.clean} clean small networks of handwritten "
        f"digits, the scan found {combined.found.hits} and accused {combined.alarms.hits}{mark}"
    )


def one_percent_sentence(is_current: IsCurrent | None = None) -> str:
    """Return the same of networks with 1 % of poison, whose attack took in part."""
    scans = _partly(_scans_of_digits(is_current))
    combined, mark = _combined(
        scans.where(lambda row: row.attack == "none" or row.poison_rate == ONE_PERCENT)
    )
    return (
        f"of {combined.backdoored} with 1 % of poison, whose attack took in part, it found "
        f"{combined.found.hits or 'none'}{mark}"
    )


def repair_sentence(is_current: IsCurrent | None = None) -> str:
    """Return what the default repair did to the strong networks, with 500 clean images."""
    every = _repairs(STRONG, is_current).where(lambda row: (row.defense, row.clean_images) == ("auto", 500))
    rows, mark = (every.current, "") if every.current else (every.older, f" ({OLDER} measured by older code)")
    attacked = [row for row in rows if row.asr is not None and row.asr_before is not None]
    clean = [row for row in rows if row.attack == "none" and row.acc is not None]
    before = _span([percent(row.asr_before) for row in attacked if row.asr_before is not None])
    after = _span([percent(row.asr) for row in attacked if row.asr is not None])
    lost = _span([f"{100 * _accuracy_lost(row):.1f}" for row in attacked])
    costs = [100 * _accuracy_lost(row) for row in clean]
    return (
        f"On {len(attacked)} backdoored networks of the strong recipes ASR was {before} before and {after} "
        f"after, at a cost of {lost} points of accuracy; clean networks ({len(clean)}) lost at most "
        f"{max(costs):.1f}{mark}"
    )


def _accuracy_lost(row: Row) -> float:
    assert row.acc is not None and row.acc_before is not None
    return row.acc_before - row.acc


def _span(values: list[str]) -> str:
    """Return the smallest and the largest of some numbers as they are written."""
    low, high = (f(values, key=lambda text: float(text.split()[0])) for f in (min, max))
    return low if low == high else f"between {low} and {high}"


def _combined(scans: Rows[ScanRow]) -> tuple[Detection, str]:
    """Return what all checks together said of the most networks, by rows of one code, and a mark."""

    def of(rows: list[ScanRow]) -> Detection | None:
        return next((one for one in detections(rows) if one.scanner == COMBINED), None)

    aged = f" ({OLDER} measured by older code)"
    both = [(one, mark) for one, mark in ((of(scans.current), ""), (of(scans.older), aged)) if one]
    one, mark = max(both, key=lambda pair: pair[0].backdoored + pair[0].clean)
    return one, mark


def _scans_of_digits(is_current: IsCurrent | None) -> Rows[ScanRow]:
    return Rows(tuple(pair for label in SCANNERS for pair in _scans(label, is_current).pairs))


def _partly(scans: Rows[ScanRow]) -> Rows[ScanRow]:
    """Return the scans of clean networks, and of those whose attack took in part, without their flag."""
    partly = scans.where(
        lambda row: (
            row.attack == "none"
            or (WEAK in row.flags and row.asr_before is not None and row.asr_before >= IN_PART)
        )
    )
    return Rows(tuple((row.model_copy(update={"flags": ()}), older) for row, older in partly.pairs))


def _repairs(label: str, is_current: IsCurrent | None) -> Rows[Row]:
    return Rows.of(read_rows(RESULTS / f"{label}.jsonl"), is_current)


def _scans(label: str, is_current: IsCurrent | None) -> Rows[ScanRow]:
    return Rows.of(read_scans(RESULTS / f"{label}.scans.jsonl"), is_current)


def _records(label: str, is_current: IsCurrent | None) -> Rows[Record]:
    lines: Iterable[str] = (RESULTS / f"{label}.jsonl").read_text(encoding="utf-8").splitlines()
    script = ROOT / "scripts" / f"{label.replace('-', '_')}.py"
    return Rows.of([json.loads(line) for line in lines if line], is_current or is_current_of(script))


def _colophon(source: str, command: str = "unbackdoor bench run SUITE") -> Verbatim:
    return Verbatim(f"Made by `python scripts/results.py` from `{source}`; measured by `{command}`.")


def main() -> None:
    """Write all pages, and what others quote."""
    for name in documents():
        with atomic_write(PAGES / f"{name}.md") as draft:
            draft.write_text(page(name), encoding="utf-8")
    for file in QUOTING:
        with atomic_write(file) as draft:
            draft.write_text(quoting(file), encoding="utf-8")


if __name__ == "__main__":
    main()
