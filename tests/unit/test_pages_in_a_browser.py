"""Every page is opened in a real browser: nothing complains or is cut off, what matters is seen first."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import unbackdoor
from browser import PROGRAMS, Browser, find_browser
from planted import block_data, planted
from unbackdoor.bench.judge import Scores
from unbackdoor.bench.rows import read_rows
from unbackdoor.metrics import Rate
from unbackdoor.report.demo import Example, Repair, Setting, demo_page
from unbackdoor.report.pictures import data_png
from unbackdoor.triggers import RecoveredTrigger

pytest.importorskip("matplotlib", reason="the charts of a report (extra: report)")
PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser: none of {', '.join(PROGRAMS)}")
ROOT = Path(unbackdoor.__file__).parents[2]
KEPT = os.environ.get("UNBACKDOOR_TEST_PAGES")  # a folder for pictures of the pages, to look at
NAMES = ("audit", "scan", "repair", "comparison", "many classes", "benchmark", "demo")


def made(folder: Path) -> dict[str, Path]:
    """Write one page of each kind."""
    mask = torch.zeros(8, 8)
    mask[0, 0] = 1
    corner = RecoveredTrigger(3, torch.zeros(1, 8, 8), mask, "brought")
    done = unbackdoor.audit(
        planted((3,)), block_data(80), "none", checks=["weight_statistics", "tac"], triggers=[corner]
    )
    assert done.scan is not None and done.purification is not None and done.verification is not None
    pages = {
        "audit": done.save_report(folder / "audit", command="unbackdoor audit " + 20 * "long/path/"),
        "scan": done.scan.save_report(folder / "scan"),
        "repair": done.purification.save_report(folder / "repair"),
        "comparison": done.verification.save_report(folder / "comparison"),
        "many classes": many_classes(done.scan).save_report(folder / "many"),
    }
    picture = data_png(torch.zeros(1, 8, 8, dtype=torch.uint8))
    scores = Scores(Rate(990, 1000), Rate(1000, 1000), Rate(0, 1000))
    pages["demo"] = folder / "demo.html"
    pages["benchmark"] = folder / "benchmark.html"
    benchmark(pages["benchmark"])
    pages["demo"].write_text(
        demo_page(
            scores,
            Repair("Pruning", scores, 1.5),
            [Repair("Fine-tuning", scores, 2.5)],
            setting=Setting("digits", "100 digits, 10 of them poisoned", "a 0", 20, 1000, 900),
            examples=[Example("7", picture, picture, ("7", "0"), ("7", "7"))],
            facts=[("Network", "small_cnn")],
            command="unbackdoor demo",
            colophon="made",
        )
    )
    return pages


def many_classes(scan: Any) -> Any:
    """Return a scan of a thousand classes with long names and values of both signs."""
    names = tuple(f"a-class-with-a-rather-long-name-{k}" for k in range(1000))
    checked = scan.checks[0]
    finding = replace(
        checked.report.findings[0], per_class=tuple(float(k % 37) - 18 for k in range(1000)), classes=(0,)
    )
    checked = replace(checked, report=replace(checked.report, findings=(finding,)))
    model = replace_names(scan.case.model, names)
    return replace(scan, checks=(checked,), triggers=(), case=replace(scan.case, model=model))


def replace_names(model: Any, names: tuple[str, ...]) -> Any:
    copy = model.copy()
    copy.class_names = names
    return copy


def benchmark(file: Path) -> None:
    from unbackdoor.report.benchmark import bench_report
    from unbackdoor.report.html import to_html

    rows = read_rows(ROOT / "results" / "cifar10-small-v1.jsonl")
    file.write_text(to_html(bench_report(rows[:400], is_current=lambda row: True)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return made(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as started:
        yield started


CUT_OFF = """
[...document.querySelectorAll("h1, h2, h3, p, li, td, th, dd, small, img, .dot, .limit, .box, figure")]
  .filter((e) => e.offsetParent !== null && !e.closest(".hidden, thead, pre, details:not([open])"))
  .filter((e) => e.getBoundingClientRect().width)
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
  .map((e) => e.tagName + "." + e.className + " " + e.textContent.trim().slice(0, 60))
"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_and_nothing_complains(
    pages: dict[str, Path], browser: Browser, name: str, width: int
) -> None:
    browser.open(pages[name], width=width)
    if KEPT:
        browser.picture(Path(KEPT) / f"{name.replace(' ', '-')}-{width}.png")
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.images].filter((i) => !i.naturalWidth).length") == 0
    wide = width == 1280 and name == "benchmark"  # there its tables scroll inside of their frame
    assert wide or browser.evaluate(CUT_OFF) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_what_a_reader_needs_is_on_the_first_screen(
    pages: dict[str, Path], browser: Browser, width: int
) -> None:
    browser.open(pages["audit"], width=width)
    seen = browser.evaluate(
        "[document.querySelector('h1'), ...document.querySelectorAll('.facts li')]"
        ".filter((e) => e.getBoundingClientRect().bottom <= 900).map((e) => e.innerText)"
    )
    text = "\n".join(seen)
    for words in ("Evidence of a backdoor", "Do not deploy", "2 of 2 checks done", "Clean accuracy"):
        assert words in text


def test_a_trigger_is_framed_where_it_lies(pages: dict[str, Path], browser: Browser) -> None:
    """White on white is not seen without; the trigger is the first pixel of eight times eight."""
    browser.open(pages["audit"], width=1280)
    box, image = browser.evaluate(
        "[...document.querySelectorAll('.shot')].slice(0, 1).flatMap((s) => [s.querySelector('.box'), "
        "s.querySelector('img')]).map((e) => e.getBoundingClientRect()).map((r) => [r.left, r.top, r.width])"
    )
    assert abs(box[0] - image[0]) < 6 and abs(box[1] - image[1]) < 6
    assert image[2] / 8 <= box[2] <= image[2] / 8 + 10


def test_dots_lie_on_their_tracks_in_the_order_of_suspicion(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["many classes"], width=390)
    rows = browser.evaluate(
        "[...document.querySelectorAll('.dots li')].filter((e) => e.querySelector('.dot')).map((e) => "
        "[Number(e.querySelector('.value').innerText || e.querySelector('.value').textContent), "
        "(e.querySelector('.dot').getBoundingClientRect().left - e.querySelector('.track')"
        ".getBoundingClientRect().left) / e.querySelector('.track').getBoundingClientRect().width])"
    )
    seen = [row for row in rows[:12] if row[1] is not None]
    assert len(seen) == 12 and all(-0.05 <= place <= 1 for _, place in seen)
    values = [value for value, _ in rows]
    assert values == sorted(values) and min(values) == -18, "negative values are drawn, the smallest first"


@pytest.mark.parametrize("name", ["audit", "scan", "many classes"])
def test_the_ends_of_an_axis_stand_in_one_line_beside_each_other(
    pages: dict[str, Path], browser: Browser, name: str
) -> None:
    browser.open(pages[name], width=390)
    tracks = browser.evaluate(
        "[...document.querySelectorAll('.axis .track')].filter((t) => t.offsetParent !== null).map((t) => "
        "[...t.children].map((e) => e.getBoundingClientRect()).map((r) => [r.left, r.right, r.height]))"
    )
    assert tracks
    for ends in tracks:
        assert all(height < 24 for *_, height in ends)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(ends))


def test_a_table_of_a_benchmark_sorts(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["benchmark"], width=1280)
    assert browser.evaluate("document.querySelectorAll('thead button').length") > 0
    browser.evaluate("document.querySelector('thead button').click()")
    assert browser.evaluate("document.querySelector('th[aria-sort]') !== null")
    assert browser.complaints == []
