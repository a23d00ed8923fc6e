"""The report of a benchmark: its numbers are the rows', and what is not comparable stands apart."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import time
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from typer.testing import CliRunner

from unbackdoor.bench.reference import read_published
from unbackdoor.bench.results import WEAK, Mean
from unbackdoor.bench.rows import Row, ScanRow, write_rows
from unbackdoor.cli import app
from unbackdoor.errors import InputError
from unbackdoor.report import benchmark
from unbackdoor.report.benchmark import charts, plots
from unbackdoor.report.benchmark.groups import Rows
from unbackdoor.report.benchmark.matrix import asr_matrix, paired_table
from unbackdoor.report.benchmark.ranges import range_table
from unbackdoor.report.benchmark.scans import detection_by_attack, detection_tables
from unbackdoor.report.html import to_html
from unbackdoor.report.markdown import to_markdown
from unbackdoor.report.tables import LEGEND, MOST_ROWS, Document

pytest.importorskip("matplotlib", reason="the charts of a report (extra: report)")

OLD = "0ld"  # the commit of rows that these tests call older

HOSTILE = '<script>alert(1)</script>|`x`\n"><img src=x onerror=alert(1)>'
VOID = {"meta", "img", "br", "hr", "link", "input"}
PUBLISHED = """\
poison_ratio,model,attack,defense,ACC,ASR,RA,DER_computed
10%,PreActResNet-18,BadNet,No Defense,91.32,95.03,4.67,50.0
10%,PreActResNet-18,BadNet,FT,89.96,1.48,89.39,96.10
1%,PreActResNet-18,BadNet,FT,11.11,22.22,33.33,44.44
10%,VGG19_BN,BadNet,FT,11.11,22.22,33.33,44.44
"""
# defense -> (ACC lost, ASR left) with 10 clean images and both seeds 0
EFFECTS = {"none": (0.0, 1.0), "ft": (0.02, 0.4), "rnp": (0.04, 0.02), "fp": (0.1, 0.3)}
ATTACKS = {"badnets": 0.0, "blended": 0.1, "sig": 0.2}  # what the attack adds to the ASR left


def one(attack: str, defense: str, images: int, victim: int, defender: int, **changes: Any) -> Row:
    """Return one row, made by arithmetic that a test can follow."""
    lost, left = EFFECTS.get(defense, (0.05, 0.05))
    after: dict[str, Any] = {"acc_before": 0.95, "acc": 0.95 - lost, "seconds": 2.0 + defender}
    if attack != "none":
        asr = min(1.0, left + ATTACKS[attack] + 0.01 * defender) / (1 if images == 10 else 2)
        asr = 1.0 if defense == "none" else asr
        after |= {"asr_before": 1.0, "ra_before": 0.0, "asr": asr, "ra": 0.9 * (1 - asr)}
        after["der"] = ((1 - asr) - lost + 1) / 2
    values: dict[str, Any] = {
        "suite": "made-up",
        "dataset": "cifar10",
        "architecture": "preact_resnet18",
        "width": 16,
        "recipe": "plain",
        "attack": attack,
        "poison_rate": 0.0 if attack == "none" else 0.1,
        "target": None if attack == "none" else 0,
        "victim_seed": victim,
        "defense": defense,
        "clean_images": images,
        "defender_seed": defender,
        "peak_mb": 300.0,
        "device": "cpu fp32",
        "commit": "abc1234",
        **after,
        **changes,
    }
    return Row(**values)


def bench_report(rows: list[Row], **more: Any) -> Document:
    """Return the report of rows of which those of one commit are of older code."""
    return benchmark.bench_report(rows, is_current=lambda row: row["commit"] != OLD, **more)


def made(*extra: Row, attacks: tuple[str, ...] = (*ATTACKS, "none")) -> list[Row]:
    """Return rows of three attacks and the clean control, four defenses, two budgets and two seeds."""
    rows = [
        one(attack, defense, images, 0, seed)
        for attack in attacks
        for defense in EFFECTS
        for images in (10, 50)
        for seed in (0, 1)
    ]
    return [*rows, *extra]


FAILED = one(
    "badnets", "fp", 10, 7, 0, acc=None, asr=None, ra=None, der=None, error="MethodFailed: out of |x|"
)
WEAKLING = one("badnets", "ft", 10, 8, 0, asr_before=0.3, asr=0.0, der=0.99, flags=(WEAK,))
CHEAT = one("badnets", "rnp", 10, 0, 0, selection="oracle", asr=0.0, ra=0.9, acc=0.95, der=1.0)
STRANGER = one("badnets", HOSTILE, 10, 0, 0)
ALL = made(FAILED, WEAKLING, CHEAT, STRANGER)


@dataclass
class Grid:
    """A table as the page shows it."""

    attrs: dict[str, str | None]
    caption: str = ""
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def cell(self, column: str, *starts: str) -> str:
        """Return the cell of the first row whose leading cells start with the given words."""
        for row in self.rows:
            if all(text.startswith(start) for text, start in zip(row, starts, strict=False)):
                return row[self.head.index(column)]
        raise AssertionError(f"no row {starts}")


class Page(HTMLParser):
    """Reads tags and tables, and checks that each tag that opens also closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, Grid] = {}
        self.grid = Grid({})
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.grid = self.tables[dict(attrs)["id"] or ""] = Grid(dict(attrs))
        elif tag == "tr" and "tbody" in self.open:
            self.grid.rows.append([])
        elif tag in ("td", "th"):
            (self.grid.rows[-1] if "tbody" in self.open else self.grid.head).append("")
        elif tag == "small":
            self.grid.rows[-1][-1] += " | "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            (self.grid.rows[-1] if "tbody" in self.open else self.grid.head)[-1] += data
        elif "caption" in self.open:
            self.grid.caption += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Document:
    file = tmp_path_factory.mktemp("reference") / "published.csv"
    file.write_text(PUBLISHED)
    return bench_report(ALL, published=read_published(file), colophon="the end")


@pytest.fixture(scope="module")
def text(report: Document) -> str:
    return to_html(report)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


# ---------------------------------------------------------------------------------------------------
# Numbers


def test_the_summary_holds_means_intervals_and_worst_cases_worked_out_by_hand(page: Page) -> None:
    ten = page.tables["summary-0"]
    # rnp leaves 2, 12 and 22 % of the three attacks with one seed, and one point more with the other.
    assert ten.cell("ASR", "rnp").startswith("12.5 %")
    assert ten.cell("worst ASR", "rnp") == "23.0 %"
    values = [2, 3, 12, 13, 22, 23]
    spread = math.sqrt(sum((v - 12.5) ** 2 for v in values) / 5)
    assert ten.cell("ASR", "rnp") == f"12.5 % | ± {2.571 * spread / math.sqrt(6):.1f}"
    assert ten.cell("ACC lost", "rnp") == "4.0 % | ± 0.0 | worst 4.0 %"
    assert ten.cell("ACC lost on clean models", "rnp").startswith("4.0 %")
    # DER = ((1 - ASR) - ACC lost + 1) / 2, so its mean is (0.875 - 0.04 + 1) / 2 and its worst is at 23 %.
    assert ten.cell("DER", "rnp").startswith("0.917 |") or ten.cell("DER", "rnp").startswith("0.918 |")
    assert ten.cell("DER", "rnp").endswith("worst 0.865")
    assert ten.cell("cost", "rnp") == "2.5 s | up to 300 MB"
    assert page.tables["summary-2"].cell("ASR", "rnp").startswith("6.2 %"), "half of it with 50 images"


def test_every_budget_has_a_table_in_the_order_of_der(page: Page) -> None:
    assert [row[0] for row in page.tables["summary-2"].rows] == ["rnp", "ft", "fp", "none"]
    der = [th for th in page.all("th") if th.get("aria-sort")]
    assert {th["aria-sort"] for th in der} == {"descending"} and len(der) == 3


def test_an_interval_needs_three_rows() -> None:
    assert math.isnan(Mean.of([0.1, 0.2]).half)
    for n, quantile in ((3, 4.303), (11, 2.228), (12, 2.201), (31, 2.042), (1001, 1.962)):
        values = [k % 7 / 7 for k in range(n)]
        assert Mean.of(values).half == pytest.approx(quantile * stdev(values) / math.sqrt(n), rel=2e-3)


def test_one_attack_has_the_mean_over_its_seeds(page: Page) -> None:
    table = page.tables["attack-0"]
    shown = table.cell("ASR", "blended", "ft", "10")
    assert shown == "50.5 %", "50 and 51 %: two rows have no interval"
    assert table.cell("worst ASR", "blended", "ft", "10") == "51.0 %"
    assert table.cell("ACC", "none", "ft", "50").startswith("93.0 %")
    assert table.cell("ASR", "none", "ft", "50") == "-"
    assert table.rows[0][0] == "badnets | 10 % to class 0"


# ---------------------------------------------------------------------------------------------------
# What stands apart


def test_a_choice_by_the_truth_is_marked_and_ranked_apart(page: Page) -> None:
    oracle = page.tables["summary-1"]
    assert [row[0] for row in oracle.rows] == ["rnp | oracle: chosen with the truth"]
    assert "not to be ranked" in oracle.caption
    assert "100" not in page.tables["summary-0"].cell("DER", "rnp")
    assert [row[1] for row in page.tables["attack-1"].rows] == ["rnp | oracle: chosen with the truth"]
    assert all("oracle" not in row[1] for row in page.tables["attack-0"].rows)
    assert any("oracle" in row[0] for row in page.tables["rows-0"].rows)


def test_a_victim_whose_attack_did_not_take_is_flagged_and_in_no_mean(page: Page, text: str) -> None:
    summary = page.tables["summary-0"]
    assert summary.cell("left out", "ft") == "1" and summary.cell("rows", "ft") == "6"
    # 40 and 41 % without the weak row's zero.
    assert page.tables["attack-0"].cell("ASR", "badnets", "ft", "10").startswith("40.5 %")
    assert page.tables["left-out-0"].rows == [
        ["badnets | 10 % to class 0", "cifar10, preact_resnet18 of width 16", "8", "95.0 %", "30.0 %"]
    ]
    assert any(row[-1] == WEAK for row in page.tables["rows-0"].rows)
    assert "1 left out of every mean" in text


def test_a_failure_stays_in_the_tables_with_its_error(page: Page) -> None:
    assert page.tables["summary-0"].cell("failed", "fp") == "1"
    assert page.tables["summary-0"].cell("rows", "fp") == "6"
    assert page.tables["summary-0"].cell("rows", "<script>") == "1 | of 6", "a mean over less is called so"
    assert page.tables["failed-0"].cell("error", "fp") == "MethodFailed: out of |x|"
    rows = [row for row in page.tables["rows-0"].rows if row[-1].startswith("failed: MethodFailed")]
    assert len(rows) == 1 and rows[0][6] == "-"


def test_settings_are_never_averaged_together() -> None:
    other = [row.model_copy(update={"dataset": "gtsrb", "asr": 0.0}) for row in made() if row.asr is not None]
    tables = Page(to_html(bench_report([*made(), *other]))).tables
    assert tables["summary-0"].cell("ASR", "rnp").startswith("12.5 %")
    assert tables["summary-2"].cell("ASR", "rnp").startswith("0.0 %")


# ---------------------------------------------------------------------------------------------------
# Older code


def aged(rows: list[Row]) -> list[Row]:
    """Return the same experiments as measured by older code, with other numbers and a further attack."""
    changes = {"commit": OLD, "asr": 0.5, "acc": 0.5, "ra": 0.25, "der": 0.5, "seconds": 99.0, "peak_mb": 9e3}
    old = [
        row.model_copy(update={k: v for k, v in changes.items() if getattr(row, k) is not None})
        for row in rows
    ]
    return [*old, *(row.model_copy(update={"attack": "wanet"}) for row in old if row.attack == "badnets")]


def grid(page: Page) -> dict[str, list[list[str]]]:
    """Return the lines of the tables of means that are of the current code and have numbers."""
    means = {
        name: table for name, table in page.tables.items() if name.split("-")[0] in ("summary", "attack")
    }
    return {
        name: [row for row in table.rows if "\u2020" not in row[0] and "\u2013" not in row]
        for name, table in means.items()
    }


def test_a_mean_is_of_the_current_code_or_of_older_code_and_never_of_both() -> None:
    rows = [row for row in made() if row.defense != "fp"]
    old = aged(made())
    both = Page(to_html(bench_report([*old, *rows])))
    assert grid(both) == grid(Page(to_html(bench_report(rows)))), "older rows change no current number"
    ten = both.tables["summary-0"]
    assert ten.cell("ASR", "rnp").startswith("12.5 %")
    older = [row for row in ten.rows if "\u2020" in row[0]]
    assert {row[0] for row in older} == {f"{name} \u2020 | older code" for name in EFFECTS}
    assert all(row[1].startswith("50.0 %") and row[6].startswith("0.500") for row in older)
    (empty,) = [row for row in ten.rows if "\u2013" in row]
    assert empty[0].startswith("fp | no row of the current code")
    assert set(empty[1:]) == {"\u2013"}
    assert [("\u2020" in row[0]) for row in ten.rows] == sorted("\u2020" in row[0] for row in ten.rows)


def test_a_table_without_any_row_of_the_current_code_says_so_once() -> None:
    page = Page(to_html(bench_report(aged(made()))))
    for name in ("summary-0", "attack-0"):
        first, *others = page.tables[name].rows
        assert first[0] == "current code | no row"
        assert set(first[1:]) == {"\u2013"}
        assert all("\u2020" in row[0] for row in others)


def test_each_row_of_older_code_carries_the_mark_and_each_table_one_legend() -> None:
    weak, failed = WEAKLING.model_copy(update={"commit": OLD}), FAILED.model_copy(update={"commit": OLD})
    rows = [*made(attacks=("badnets", "none")), *aged(made(attacks=("sig",))), weak, failed]
    page = Page(to_html(bench_report(rows)))
    shown = page.tables["rows-0"].rows
    assert [("\u2020" in row[0]) for row in shown] == [row.commit == OLD for row in rows]
    assert "\u2020" in page.tables["left-out-0"].rows[0][0]
    assert "\u2020" in page.tables["failed-0"].rows[0][0]
    for table in page.tables.values():
        assert table.caption.count(LEGEND) == any("\u2020" in cell for row in table.rows for cell in row)
    marked = sum("\u2020" in row[0] for table in page.tables.values() for row in table.rows)
    assert [tr.get("class") for tr in page.all("tr")].count("older") == marked, "sorted behind the others"
    text = to_markdown(bench_report(rows))
    assert f"{sum(row.commit == OLD for row in rows)} of {len(rows)} rows were measured by older code" in text
    assert text.count(LEGEND) == 5, "two budgets, attacks, left out, failed"


def test_rows_of_the_current_code_alone_have_no_mark() -> None:
    text = to_markdown(bench_report(ALL))
    assert [line for line in text.splitlines() if "\u2020" in line] == [
        line for line in text.splitlines() if line.startswith("- **\u2020 older code**")
    ]


def test_older_rows_are_drawn_hollow_and_choices_by_the_truth_half_filled() -> None:
    current, cheat, older = (
        plots.style(plots.Mark("ft", 0, oracle=oracle, older=old))
        for oracle, old in ((False, False), (True, False), (False, True))
    )
    assert (current["fillstyle"], cheat["fillstyle"], older["fillstyle"]) == ("full", "left", "none")
    assert older["markerfacecolor"] == "none" != current["markerfacecolor"]
    assert current["marker"] == older["marker"] and current["color"] == older["color"]
    text = to_html(bench_report([*made(), *aged(made())]))
    assert "rnp \u2020" in text and "Hollow marks \u2020" in text
    fresh = to_html(bench_report(made()))
    assert "rnp \u2020" not in fresh


def test_a_point_of_a_chart_is_a_mean_of_one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, tuple[float, float]]] = []
    lines: list[dict[str, list[tuple[int, float]]]] = []

    def scattered(points: dict[plots.Mark, Any], **_: str) -> str:
        return drawn.append({mark.name: point for mark, point in points.items()}) or ""

    def over(found: dict[plots.Mark, Any], **_: str) -> str:
        return lines.append({mark.name: line for mark, line in found.items()}) or ""

    monkeypatch.setattr(charts, "scatter", scattered)
    monkeypatch.setattr(charts, "over_budgets", over)
    bench_report([*made(), *aged(made())])
    assert drawn[0]["rnp"] == pytest.approx((0.125, 0.91))
    assert drawn[0]["rnp \u2020"] == pytest.approx((0.5, 0.5))
    assert [point[1] for point in lines[0]["rnp"]] == pytest.approx([0.125, 0.0625])
    assert [point[1] for point in lines[0]["rnp \u2020"]] == pytest.approx([0.5, 0.5])


def test_published_numbers_stand_beside_means_of_one_code(tmp_path: Path) -> None:
    file = tmp_path / "published.csv"
    file.write_text(PUBLISHED)
    rows = [*made(attacks=("badnets",)), *aged(made(attacks=("badnets",)))]
    table = Page(to_html(bench_report(rows, published=read_published(file)))).tables["published-0"]
    ours = table.head.index("ours: ASR")
    seen = [("\u2020" in row[0], row[ours]) for row in table.rows if row[1].startswith("ft")]
    assert seen == [(False, "40.5 %"), (False, "20.2 %"), (True, "50.0 %"), (True, "50.0 %")]
    only = Page(to_html(bench_report(aged(rows), published=read_published(file)))).tables["published-0"]
    assert all("\u2020" in row[0] for row in only.rows)


def test_scans_of_older_code_are_counted_apart() -> None:
    names = {"suite", "dataset", "architecture", "width", "recipe", "attack", "poison_rate", "target"}
    base = one("badnets", "ft", 60, 0, 0).model_dump(include=names)
    looks = [
        ScanRow(**base, victim_seed=seed, scanner="tac", clean_images=60, defender_seed=0, verdict=verdict,
                p_value=p, classes=(0,), target_found=True, seconds=1.0, commit=commit)
        for seed, verdict, p, commit in (
            (0, "backdoor found", 0.001, "abc"), (1, "no evidence found", 0.5, OLD),
            (2, "no evidence found", 0.9, OLD),
        )
    ]  # fmt: skip
    table = Page(to_html(bench_report(made(), scans=looks))).tables["scans-0"]
    assert [row[0] for row in table.rows] == ["tac", "tac \u2020 | older code"]
    assert [row[2] for row in table.rows] == ["1 of 1", "0 of 2"]
    found, roc = detection_tables(Rows.of(looks, lambda row: row["commit"] != OLD))
    shown = [(row[0].words, row[3].text) for row in found.rows]
    assert shown == [("tac", "1 of 1"), ("all together", "1 of 1"), ("tac \u2020", "0 of 2"),
                     ("all together \u2020", "0 of 2")]  # fmt: skip
    assert [row[0].words for row in roc.rows] == [name for name, _ in shown]
    attacks = detection_by_attack("x", Rows.of(looks, lambda row: row["commit"] != OLD))
    assert [(row[0].words, row[1].text, row[2].text) for row in attacks.rows] == [
        ("badnets, 10 %", "1", "100.0 %"), ("badnets, 10 % \u2020", "2", "0.0 %")
    ]  # fmt: skip


def test_pairs_over_shared_cells_are_of_one_code() -> None:
    fresh, rows = made(attacks=("badnets",)), aged(made(attacks=("badnets",)))
    fresh = [row for row in fresh if (row.defense, row.defender_seed) != ("ft", 1)]
    both = Rows.of([*fresh, *rows], lambda row: row["commit"] != OLD)
    table = paired_table("pairs", "", "", both, defenses=("rnp",), baseline="ft")
    heads = [column.name for column in table.columns]
    lines = {(row[0].words, row[1].text): dict(zip(heads, row, strict=True)) for row in table.rows}
    new, old = lines["rnp", "10"], lines["rnp \u2020", "10"]
    assert (new["rows"].text, new["rows of both"].text) == ("2", "1")
    assert new["DER there"].text == "0.970" and new["DER of ft there"].text == "0.790"
    assert (old["rows of both"].text, old["DER of ft there"].text) == ("4", "0.500")
    matrix = asr_matrix("m", "", "", both)
    asr = {row[0].words: row[1].text for row in matrix.rows if row[0].text == "rnp"}
    assert asr["rnp"] == "1.0 %, 1.5 %"
    assert asr["rnp \u2020"].startswith("50.0 %, 50.0 %")


def test_ranges_show_the_worst_row_and_failures_of_one_code() -> None:
    rows = Rows.of([*made(FAILED), *aged(made())], lambda row: row["commit"] != OLD)
    published = [
        {"method": "ft", "acc_before": 0.9, "acc": 0.8, "asr": asr, "seconds": 2.0, "code": code}
        for asr, code in ((0.02, "new"), (0.98, "new"), (0.5, ""))
    ]
    foreign = Rows.of(
        [*published, {"method": "fp", "error": "no", "code": "new"}], lambda row: bool(row["code"])
    )
    table = range_table("ranges", "", rows, foreign, methods=("ft", "fp"))
    heads = [column.name for column in table.columns]
    lines = {row[0].words: dict(zip(heads, (cell.text for cell in row), strict=True)) for row in table.rows}
    assert lines["ft"]["ASR left there"] == "2.0 to 98.0 %" and lines["ft"]["published models"] == "2"
    assert lines["ft \u2020"]["ASR left there"] == "50.0 %"
    assert lines["fp"]["failed"] == "2" and lines["fp"]["published models"] == "0"
    assert lines["ft"]["ASR left"].endswith("61.0 %") and lines["ft"]["ACC lost on clean models"] == "2.0 %"


def test_each_row_is_asked_for_its_code_once() -> None:
    asked = []
    rows = made()
    benchmark.bench_report(rows, is_current=lambda row: not asked.append(row["defense"]))
    assert len(asked) == len(rows)


# ---------------------------------------------------------------------------------------------------
# Published numbers


def test_published_numbers_stand_beside_ours_and_are_called_theirs(page: Page) -> None:
    table = page.tables["published-0"]
    assert "theirs: 2,500 clean images" in table.caption
    assert {row[1].split(" | ")[0] for row in table.rows} == {"none", "ft"}
    assert {row[0] for row in table.rows} == {"badnets | 10 % to class 0 | theirs: BadNet"}
    assert table.cell("theirs: ASR", "badnets", "ft") == "1.5 %"
    assert table.cell("theirs: DER", "badnets", "ft") == "0.961"
    assert table.cell("ours: ASR", "badnets", "ft").startswith("40.5 %")
    assert table.cell("ours: width", "badnets", "ft") == "16"


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "gtsrb"},
        {"architecture": "vgg19_bn"},
        {"poison_rate": 0.05},
        {"attack": "blended"},
        {"defense": "rnp"},
    ],
)
def test_another_setting_matches_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = tmp_path / "published.csv"
    file.write_text("\ufeff" + PUBLISHED, encoding="utf-8")
    table = read_published(file)
    assert len(table) == 4
    row = one("badnets", "ft", 10, 0, 0)
    found = table.match(row)
    assert found is not None and (found.acc, found.asr, found.der) == (0.8996, 0.0148, 0.961)
    assert table.match(row.model_copy(update=changes)) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "lack columns"),
        (b"", "lack columns"),
        (PUBLISHED.replace("91.32", "-1").encode(), r"no percentage.*line 2.*expected 0 to 100, got '-1'"),
        (PUBLISHED.replace("91.32", "nan").encode(), "no percentage"),
        (PUBLISHED.encode() + b"10%,x\n", "too short.*line 6"),
        (b"\xff\xfe\x00", "no table"),
        (PUBLISHED.encode() + b'"' + b"x" * 200_000, "no table"),
        (b"x" * 10_000_001, "too large"),
    ],
)
def test_a_broken_reference_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "published.csv"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_published(file)


def test_a_missing_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_published(tmp_path / "none.csv")


# ---------------------------------------------------------------------------------------------------
# The page


def test_the_page_loads_nothing_and_runs_only_its_own_script(page: Page, text: str) -> None:
    assert not re.search(r"https?:|@import|url\(\s*['\"]?(?!#)|(?:src|href)=['\"]?//", text)
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == len(page.all("script")) == 1 and len(script[0]) < 5000
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_hostile_names_stay_text(page: Page, text: str, report: Document) -> None:
    assert "<script>alert" not in text and "<img" not in text
    assert any("<script>alert(1)</script>" in row[0] for row in page.tables["rows-0"].rows)
    assert "<script" not in to_markdown(report).replace("\\<script", "")


def test_names_that_charts_could_choke_on() -> None:
    names = ("_hidden", "$x^2$", "\u795e\u7d4c", "\x00\x1b[31m", "x" * 5000)
    text = to_html(bench_report(made(*(one("badnets", name, 10, 0, 0) for name in names))))
    assert "_hidden" in text and "\u795e\u7d4c" in text and "\x1b" not in text and "x" * 100 not in text


def test_the_page_can_be_read_without_eyes(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1
    assert {"header", "main", "footer", "nav"} <= {tag for tag, _ in page.tags}
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.tables) == len(page.all("table"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert {i["id"] for i in page.all("input")} == {label["for"] for label in page.all("label")}
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    regions = [div for div in page.all("div") if div.get("role") == "region"]
    assert all(div["tabindex"] == "0" and div["aria-labelledby"] in identifiers for div in regions)


def test_there_is_a_scatter_for_each_budget_and_one_chart_over_budgets(page: Page, text: str) -> None:
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    assert [label.split(" ")[0] for label in labels] == ["Accuracy", "Accuracy", "Attack"]
    assert not re.search(r"#0[12]0[23]0\d", text), "a stand-in colour was left"
    assert "rnp (oracle)" in text
    single = Page(to_html(bench_report([row for row in ALL if row.clean_images == 10])))
    assert len(single.all("svg")) == 1


def test_rows_without_any_attack_have_no_chart() -> None:
    page = Page(to_html(bench_report(made(attacks=("none",)))))
    assert not page.all("svg")
    assert page.tables["summary-0"].cell("ACC lost on clean models", "fp").startswith("10.0 %")


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="no rows to report"):
        bench_report([])


def test_many_rows_are_cut_with_a_sentence_and_rendered_in_seconds() -> None:
    rows = [row.model_copy(update={"victim_seed": seed}) for seed in range(320) for row in made()]
    assert len(rows) > 20_000
    start = time.process_time()
    report = bench_report(rows)
    text, markdown = to_html(report), to_markdown(report)
    assert time.process_time() - start < 5
    assert len(Page(text).tables["rows-0"].rows) == MOST_ROWS
    assert f"first 2,000 of {len(rows):,} rows" in text and "bench export" in text
    assert len(text) < 3_000_000 and len(markdown) < 500_000


# ---------------------------------------------------------------------------------------------------
# Markdown and the command


def test_markdown_holds_the_same_tables(report: Document) -> None:
    text = to_markdown(report)
    lines = text.splitlines()
    assert "## All attacks together" in lines and "## Failed" in lines and "## All rows" not in lines
    head = lines.index("| defense | ASR | worst ASR | ACC lost | ACC lost on clean models | RA | DER | cost |"
                       " rows | failed | left out |")  # fmt: skip
    assert lines[head + 1].startswith("| --- | ---: |")
    row = next(line for line in lines if line.startswith("| rnp |"))
    assert row.startswith("| rnp | 12.5 % (± ") and " | 23.0 % | " in row
    assert "MethodFailed: out of \\|x\\|" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[head : head + 6]}
    assert widths == {12}


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    file, reference, out = tmp_path / "rows.jsonl", tmp_path / "published.csv", tmp_path / "out"
    write_rows(file, ALL)
    reference.write_text(PUBLISHED)
    arguments = ["bench", "report", str(file), "--out", str(out), "--reference", str(reference)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout.split() == [
        str(out / "index.html"),
        str(out / "report.md"),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "report.md"]
    assert "published-0" in Page((out / "index.html").read_text(encoding="utf-8")).tables
    assert (out / "report.md").read_text(encoding="utf-8").startswith("# Benchmark made-up-v1\n")


def test_the_command_refuses_a_missing_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "report", str(tmp_path / "none.jsonl")])
    assert result.exit_code == 2 and "the file does not exist" in result.stderr


def test_a_defense_has_the_same_mark_in_every_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and colours were counted anew for each setting, so that one defense had several."""
    drawn: list[dict[str, int]] = []

    def scattered(points: dict[plots.Mark, Any], **_: str) -> str:
        return drawn.append({mark.name: mark.place for mark in points}) or ""

    monkeypatch.setattr(charts, "scatter", scattered)
    few = [
        row.model_copy(update={"architecture": "vgg11"}) for row in made() if row.defense in ("rnp", "none")
    ]
    bench_report([*made(), *few])
    by_name: dict[str, set[int]] = {}
    for places in drawn:
        for name, place in places.items():
            by_name.setdefault(name, set()).add(place)
    assert len(drawn) == 4 and all(len(places) == 1 for places in by_name.values())
    assert len({place for places in by_name.values() for place in places}) == len(by_name)


def test_the_front_holds_what_nothing_beats() -> None:
    assert plots.pareto([]) == []
    assert plots.pareto([(0.5, 0.9), (0.1, 0.8), (0.3, 0.7), (0.1, 0.6), (0.5, 0.9)]) == [
        (0.1, 0.8),
        (0.5, 0.9),
    ]


def test_a_legend_says_names_alone(text: str) -> None:
    """An invisible mark before each name was shown as its escape."""
    assert "u200b" not in text and ">better" in text
    assert plots.style(plots.Mark("_hidden", 0, oracle=False, older=False))["label"].strip() == "_hidden"
