"""The leaderboard: what it ranks, what it leaves out, and that a keyboard is enough for it."""

from __future__ import annotations

import json
import os
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from browser import PROGRAMS, Browser, find_browser
from unbackdoor.bench.driver import name_of
from unbackdoor.bench.results import WEAK
from unbackdoor.bench.rows import ProbeRow, Row, write_rows
from unbackdoor.cli import app
from unbackdoor.errors import InputError
from unbackdoor.report.benchmark import leaderboard
from unbackdoor.report.html import to_html
from unbackdoor.report.tables import Document, Table

pytest.importorskip("matplotlib", reason="the charts of a report (extra: report)")

KEPT = os.environ.get("UNBACKDOOR_TEST_PAGES")  # a folder for pictures of the pages, to look at
HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "suite": "made-up", "dataset": "cifar10", "architecture": "resnet18", "width": 16, "recipe": "plain",
        "attack": "badnets", "poison_rate": 0.1, "target": 0, "victim_seed": 0, "defense": "ft",
        "clean_images": 500, "defender_seed": 0, "acc_before": 0.95, "asr_before": 1.0, "ra_before": 0.0,
        "acc": 0.94, "asr": 0.2, "ra": 0.7, "der": 0.895, "seconds": 2.0, "peak_mb": 300.0, "commit": "abc",
        "code": "c0de",
    }  # fmt: skip
    clean = {"asr": None, "ra": None, "asr_before": None, "ra_before": None, "der": None, "target": None}
    return Row(**{**values, **(clean if changes.get("attack") == "none" else {}), **changes})


def probed(of: Row, **changes: Any) -> ProbeRow:
    """Return the probes of a repair."""
    shared = {
        name: getattr(of, name) for name in (*Row.key_columns(), "victim_code", "commit", "flags", "asr")
    }
    found: dict[str, Any] = {
        "relearn_steps": (0, 5, 10), "relearned": (0.1, 0.5, 0.9), "relearned_before": (1.0, 1.0, 0.98),
        "relearned_control": (0.0, 0.02, 0.04), "alternative": 0.7, "alternative_control": 0.3,
        "patch": 0.5, "pacc": 0.8, "pacc_control": 0.9, "pacc_before": 0.1,
    }  # fmt: skip
    return ProbeRow(**{**shared, "code": "pr0be", "repair_code": of.code, **found, **changes})


ROWS = [
    *(row(victim_seed=seed, asr=asr) for seed, asr in enumerate((0.1, 0.2, 0.6))),
    row(attack="none", poison_rate=0.0, acc=0.90),
    row(defense="rnp", asr=0.0, der=0.99, acc=0.94),
    row(defense="rnp", dataset="gtsrb32", attack="sig", asr=0.5, der=0.7, clean_images=50),
    row(defense="fp", asr=0.3, der=0.8, commit="0ld"),
    row(defense="fp", attack="blended", asr=0.9, der=0.5, flags=(WEAK,)),
    row(defense="oracle_one", asr=0.0, der=1.0, selection="oracle"),
]


PROBES = [
    probed(ROWS[0]),
    probed(ROWS[1], relearned=(0.2, 0.6, 0.7), pacc=0.6),
    probed(ROWS[3], relearned=(), relearn_steps=(), alternative=None, pacc=None),  # a clean model
    probed(ROWS[4], commit="0ld"),
    probed(ROWS[6]),
    probed(ROWS[0], victim_seed=9),
]


def made(rows: list[Row] | None = None, probes: list[ProbeRow] | None = None) -> Document:
    return leaderboard(rows or ROWS, probes=probes or (), is_current=lambda row: row["commit"] != "0ld")


def table(document: Document, name: str) -> Table:
    return next(t for section in document.sections for t in section.tables if t.identifier == name)


def line(document: Document, name: str, *start: str) -> dict[str, Any]:
    found = table(document, name)
    rows = [r for r in found.rows if [c.text for c in r[: len(start)]] == [*start]]
    assert len(rows) == 1, [[c.text for c in r[:3]] for r in found.rows]
    return {column.name: cell for column, cell in zip(found.columns, rows[0], strict=True)}


def test_a_line_has_the_mean_the_interval_the_worst_case_and_every_cost() -> None:
    ft = line(made(), "methods-0", "ft", "cifar10")
    assert (
        ft["ASR"].text == "30.0 %" and "\u00b1 65.7" in ft["ASR"].small and ft["worst ASR"].text == "60.0 %"
    )
    assert ft["ACC lost"].text == "1.0 %" and ft["ACC lost on clean models"].text == "5.0 %"
    assert ft["cost"].text == "2.0 s" and "300 MB" in ft["cost"].small and ft["rows"].text == "3"


AGAIN, ALTERNATIVE, RIGHT = (
    "ASR after 10 steps of re-learning", "alternative trigger", "triggered images right"
)  # fmt: skip


@pytest.mark.parametrize("name", ["methods-0", "cells-0"])
def test_probes_have_columns_beside_the_clean_network_and_the_victim(name: str) -> None:
    ft = line(made(probes=PROBES), name, "ft", *(["cifar10"] if name == "methods-0" else ["badnets"]))
    assert ft[AGAIN].text == "80.0 %" and ft[AGAIN].small == "clean 4.0 %; victim 98.0 %"
    assert ft[AGAIN].sort_key == "0.8" and ft[RIGHT].sort_key == "0.7"
    assert ft[ALTERNATIVE].text == "70.0 %" and ft[ALTERNATIVE].small == "clean 30.0 %"
    assert (
        ft["alternative patch"].sort_key == "0.5"
        and ft["probed"].text == "2"
        and ft["probed"].small == "of 3"
    )  # less than the other means are over
    assert not ft[AGAIN].older


def test_a_page_without_probes_has_no_columns_of_them() -> None:
    assert "probes" not in table(made(), "cells-0").groups and "of these were probed" not in to_html(made())
    assert table(made(probes=PROBES), "cells-0").groups["probes"] is False  # hidden at first


def test_probes_that_failed_are_counted_and_those_of_a_weak_attack_are_in_no_mean() -> None:
    probes = [
        probed(ROWS[0]),
        probed(ROWS[1], error="MethodFailed: diverged", relearned=(), pacc=None, alternative=None),
        probed(ROWS[7]),  # whose attack did not take
    ]
    document = made(probes=probes)
    ft = line(document, "methods-0", "ft", "cifar10")
    assert ft["probed"].text == "1" and ft["probed"].small == "of 3; 1 failed" and ft[AGAIN].text == "90.0 %"
    weak = line(document, "cells-0", "fp", "blended")
    assert weak["probed"].text == "0" and weak[AGAIN].sort_key == ""


def test_older_probes_are_marked_and_never_stand_beside_another_repair() -> None:
    document = made(probes=PROBES)
    # Of the current repair, probed by older code: marked by itself.
    rnp = line(document, "cells-0", "rnp", "badnets")
    assert rnp[AGAIN].older and not rnp["defense"].older
    # Of an older repair: in its line, which is marked as a whole.
    fp = [r for r in table(document, "cells-0").rows if r[0].text == "fp" and r[0].older]
    assert len(fp) == 1 and fp[0][-1].text == "1" and not fp[0][-1].older
    # Of a repair that has been measured again since: nowhere, and said so.
    again = made([row(code="n3w")], probes=[probed(row())])
    assert line(again, "cells-0", "ft", "badnets")["probed"].text == "0"
    assert "1 probe more" in " ".join(again.lead) and "1 probe more" in " ".join(document.lead)
    # Where some are of the current code, the older ones are left out.
    both = made(probes=[probed(ROWS[0]), probed(ROWS[1], commit="0ld", relearned=(0.0, 0.0, 0.0))])
    ft = line(both, "cells-0", "ft", "badnets")
    assert ft[AGAIN].text == "90.0 %" and not ft[AGAIN].older


def test_every_column_of_the_probes_is_explained_and_measured_again_by_a_command() -> None:
    document = made(probes=PROBES)
    terms = {term for section in document.sections for term, _ in section.terms}
    for name in ("methods-0", "cells-0"):
        found = table(document, name)
        assert {column.name for column in found.columns if column.group == "probes"} <= terms
        assert all(len(r) == len(found.columns) for r in found.rows)
    link = line(document, "cells-0", "rnp", "badnets")["defense"].link
    entry = next(e for section in document.sections for e in section.entries if e.identifier == link)
    run, probe = map(shlex.split, entry.commands)
    assert run[:3] == ["unbackdoor", "bench", "run"] and probe[:3] == ["unbackdoor", "bench", "probe"]
    assert run[3:] == probe[3:] and json.loads(entry.config)["probes"]["code"] == ["pr0be"]


def test_older_rows_are_marked_left_out_of_means_and_ranked_behind() -> None:
    rows = [*ROWS, row(defense="ft", victim_seed=7, asr=1.0, der=0.0, commit="0ld")]
    document = made(rows)
    lines = [(r[0].text, r[0].older) for r in table(document, "methods-0").rows if r[1].text == "cifar10"]
    assert lines.index(("fp", True)) > lines.index(("rnp", False)) and ("ft", True) in lines
    current = [r for r in table(document, "methods-0").rows if r[0].text == "ft" and not r[0].older]
    assert current[0][4].text == "30.0 %"  # as without it
    assert "2 of 10 rows" in " ".join(document.lead)


def test_what_did_not_take_is_in_no_mean_and_an_oracle_stands_behind_the_honest() -> None:
    names = [r[0].text for r in table(made(), "methods-0").rows if not r[0].older]
    assert names.index("oracle_one") > names.index("ft") and names[0] == "rnp"
    weak = line(made(), "cells-0", "fp", "blended")
    assert weak["rows"].text == "0" and weak["DER"].sort_key == ""


def test_every_cell_leads_to_its_config_and_to_the_commands_of_its_rows() -> None:
    document = made()
    entries = {e.identifier: e for section in document.sections for e in section.entries}
    rows = [r for r in table(document, "cells-0").rows if r[5].text != "\u2013"]
    assert len(rows) == len(entries) and {r[0].link for r in rows} == set(entries)
    ft = next(r for r in rows if (r[0].text, r[1].text) == ("ft", "badnets"))
    entry = entries[ft[0].link]
    config = json.loads(entry.config)
    assert config["victim_seeds"] == [0, 1, 2] and config["code"] == ["c0de"] and config["suite"] == "made-up"
    assert len(entry.commands) == 3
    for command, one in zip(entry.commands, ROWS, strict=False):
        words = shlex.split(command)
        assert words[:4] == ["unbackdoor", "bench", "run", "made-up-v1"]
        meant = [r for r in ROWS if fnmatchcase(name_of(r.model_dump()), words[-1])]
        assert meant == [one]
    html = to_html(document)
    assert set(re.findall(r'href="#(cell-\d+)"', html)) == set(re.findall(r'id="(cell-\d+)"', html))


def test_a_chart_of_the_front_for_each_setting_and_budget() -> None:
    charts = next(s for s in made().sections if s.identifier == "plots").charts
    assert len(charts) == 2 and all("ACC lost" in chart for _, chart in charts)


def test_names_of_strangers_are_text() -> None:
    changed = {
        "dataset": HOSTILE,
        "attack": HOSTILE,
        "defense": HOSTILE,
        "recipe": HOSTILE,
        "commit": HOSTILE,
    }
    html = to_html(made([row(**changed, suite=HOSTILE)]))
    assert "<img" not in html and html.count("<script") == 1
    with pytest.raises(InputError, match="no rows"):
        leaderboard([])


def test_the_command_writes_one_page_of_several_files(tmp_path: Path) -> None:
    for name, rows in (("a.jsonl", ROWS[:4]), ("b.jsonl", ROWS[4:])):
        write_rows(tmp_path / name, rows)
    write_rows(tmp_path / "a.probes.jsonl", [probed(ROWS[0])])
    words = [
        "bench",
        "leaderboard",
        *(str(tmp_path / f"{n}.jsonl") for n in "ab"),
        "--out",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "o" / "index.html")
    page = (tmp_path / "o" / "index.html").read_text()
    assert (
        "of 10 rows" in page and "1 repair of these were probed" in page and not re.search("https?://", page)
    )
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "the file exists" in again.stderr
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0
    missing = CliRunner().invoke(app, ["bench", "leaderboard", str(tmp_path / "c.jsonl"), "--out", "p"])
    assert missing.exit_code == 2 and "does not exist" in missing.stderr


PROGRAM = find_browser()


@pytest.mark.skipif(PROGRAM is None, reason=f"no browser: none of {', '.join(PROGRAMS)}")
@pytest.mark.parametrize("width", [1280, 390])
def test_sorting_and_choosing_work_by_keyboard(tmp_path: Path, width: int) -> None:
    assert PROGRAM is not None
    long = {"attack": "badnets_all_to_all", "architecture": "airbench[expansion=2]", "recipe": "implanted"}
    rows = [*ROWS, *(row(**long, defense="random_prune", victim_seed=seed, asr=1.0) for seed in range(4))]
    (tmp_path / "index.html").write_text(to_html(made(rows, PROBES)))
    with Browser(PROGRAM, tmp_path / "profile") as browser:
        browser.open(tmp_path / "index.html", width=width)
        if KEPT:
            browser.picture(Path(KEPT) / f"leaderboard-{width}.png")
        assert browser.complaints == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width

        def shown(column: int) -> list[str]:
            return list(
                browser.evaluate(
                    "[...document.querySelectorAll('#cells-0 tbody tr')].filter((r) => !r.hidden)"
                    f".map((r) => r.cells[{column}].dataset.f ?? r.cells[{column}].innerText)"
                )
            )

        # Columns of a group are there when they are asked for; without them no table scrolls.
        wide = "[...document.querySelectorAll('.wide')].filter((w) => w.scrollWidth > w.clientWidth).length"
        cells = "[...document.querySelector('#cells-0 tbody tr').cells]"
        columns = f"{cells}.filter((c) => c.offsetParent).length"
        assert browser.evaluate(wide) == 0
        before = browser.evaluate(columns)
        box = "document.querySelector('.columns[data-table=cells-0] [value=probes]')"
        browser.evaluate(f"{box}.focus()")
        browser.press(" ")
        assert browser.evaluate(f"{box}.checked") and browser.evaluate(columns) == before + 5
        browser.press(" ")
        assert browser.evaluate(columns) == before

        everything = shown(1)
        # The attack: a list that is focused and typed into.
        browser.evaluate("document.querySelector('[data-table=cells-0] [data-column=\"1\"]').focus()")
        browser.press("s")  # of sig
        assert shown(1) == ["sig"] and "1 of" in browser.evaluate(
            "document.querySelector('[data-table=cells-0] output').textContent"
        )
        browser.press("Home")  # all of them
        assert shown(1) == everything
        # The data set, then words beside it.
        browser.press("Tab")
        browser.press("g")
        assert set(shown(2)) == {"gtsrb32"}
        browser.press("Home")
        browser.evaluate("document.querySelector('#filter-cells-0').focus()")
        for letter in "rnp":
            browser.press(letter)
        assert len(shown(0)) == 2 and all(name.startswith("rnp") for name in shown(0))
        browser.evaluate("document.querySelector('#filter-cells-0').select()")
        browser.press("Delete")
        if width > 600:  # narrow pages have lists of rows, without heads to sort by
            head = "document.querySelectorAll('#cells-0 thead button')[5]"
            browser.evaluate(f"{head}.focus()")
            for direction in (1, -1):
                browser.press("Enter")
                numbers = browser.evaluate(
                    "[...document.querySelectorAll('#cells-0 tbody tr:not(.older)')]"
                    ".map((r) => r.cells[5].dataset.v).filter(Boolean).map(Number)"
                )
                assert numbers == sorted(numbers)[::direction] and len(set(numbers)) > 2
            older = "[...document.querySelectorAll('#cells-0 tbody tr')].map((r) => r.className === 'older')"
            assert browser.evaluate(older) == sorted(browser.evaluate(older))  # behind the others, as ever
        # A cell leads to its commands.
        browser.evaluate("document.querySelector('#cells-0 tbody a').focus()")
        browser.press("Enter")
        browser.wait("document.querySelector('.entry:target') !== null")
        seen = browser.evaluate(
            "[...document.querySelectorAll('.entry')].filter((e) => e.offsetParent).map((e) => e.innerText)"
        )
        assert len(seen) == 1 and "unbackdoor bench run made-up-v1" in seen[0]
        assert browser.complaints == []
