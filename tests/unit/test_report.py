"""Reports: self-contained, honest, and safe with names that come from strangers."""

from __future__ import annotations

import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from unbackdoor.bench.judge import Scores
from unbackdoor.errors import InputError, MissingExtra
from unbackdoor.metrics import Rate
from unbackdoor.report import words
from unbackdoor.report.charts import Series, grouped_bars, require_charts
from unbackdoor.report.demo import Example, Repair, Setting, demo_page, verdict
from unbackdoor.report.page import render
from unbackdoor.report.pictures import data_png

HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(1)>"
SETTING = Setting("digits", "100 digits, 10 of them poisoned", "a 0", 20, 1000, 900)
VOID = {"meta", "img", "br", "hr", "link", "input"}


def scores(acc: int, asr: int, ra: int) -> Scores:
    """Scores in percent, of 1000 clean and 1000 triggered images."""
    return Scores(Rate(10 * acc, 1000), Rate(10 * asr, 1000), Rate(10 * ra, 1000))


def page(name: str = "Pruning", label: str = "7") -> str:
    picture = data_png(torch.zeros(1, 8, 8, dtype=torch.uint8))
    return demo_page(
        scores(99, 100, 0),
        Repair(name, scores(97, 1, 90), 1.5),
        [Repair("Fine-tuning", scores(98, 95, 5), 2.5)],
        setting=SETTING,
        examples=[Example(label, picture, picture, (label, "0"), (label, label))],
        facts=[("Network", name)],
        command=f"unbackdoor demo --out {name}",
        colophon=name,
    )


class Structure(HTMLParser):
    """Collects the tags of a page and checks that each that opens also closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


# ---------------------------------------------------------------------------------------------------
# The page


def test_the_page_loads_nothing_from_anywhere() -> None:
    text = page()
    assert not re.search(r"https?:|//\w|@import|url\(\s*['\"]?(?!#)", text)
    structure = Structure(text)
    assert not structure.all("script") and not structure.all("link")
    assert all((img["src"] or "").startswith("data:image/png;base64,") for img in structure.all("img"))
    policies = [m for m in structure.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policies[0]["content"] or "")


def test_hostile_names_stay_text() -> None:
    text = page(HOSTILE, HOSTILE)
    structure = Structure(text)
    assert not structure.all("script")
    assert all("onerror" not in attrs for _, attrs in structure.tags)
    assert "<script" not in text


def test_the_page_can_be_read_without_eyes() -> None:
    structure = Structure(page())
    assert structure.all("html")[0]["lang"] == "en"
    assert len(structure.all("h1")) == 1
    assert {"header", "main", "footer"} <= {tag for tag, _ in structure.tags}
    assert all(img.get("alt") for img in structure.all("img"))
    assert all(th.get("scope") in ("row", "col") for th in structure.all("th"))
    assert len(structure.all("caption")) == len(structure.all("table"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in structure.all("svg"))


def test_the_page_shows_the_numbers_and_the_answers() -> None:
    text = page()
    for shown in ("97.0 %", "1.0 %", "90.0 %", "95.7 to 97.9", "Fine-tuning", "2.5 s"):
        assert shown in text
    assert "7 <span" in text and "<strong>0</strong>" in text


def test_a_variable_that_the_template_lacks_is_an_error() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        render("demo.html")


# ---------------------------------------------------------------------------------------------------
# What it says


@pytest.mark.parametrize(
    ("before", "after", "tone", "headline"),
    [
        ((99, 100, 0), (98, 1, 90), "good", "The backdoor is gone, and the network still does"),
        (
            (99, 100, 0),
            (98, 9, 80),
            "good",
            "The backdoor is all but gone, and the network still does its task",
        ),
        ((99, 100, 0), (80, 1, 70), "fair", "The backdoor is gone, at the price of accuracy"),
        ((99, 100, 0), (98, 40, 50), "fair", "The backdoor is weaker, and not gone"),
        ((99, 100, 0), (99, 98, 1), "bad", "The backdoor is still there"),
        ((99, 30, 60), (99, 1, 90), "bad", "The attack did not take, so there was little to repair"),
    ],
)
def test_the_verdict_follows_the_numbers(
    before: tuple[int, int, int], after: tuple[int, int, int], tone: str, headline: str
) -> None:
    said = verdict(scores(*before), Repair("Pruning", scores(*after), 1), [], SETTING)
    assert said.tone == tone and said.headline.startswith(headline)


def test_a_method_that_is_no_better_than_a_control_is_told_so() -> None:
    control = Repair("Fine-tuning", scores(98, 1, 95), 1)
    said = verdict(scores(99, 100, 0), Repair("Pruning", scores(98, 1, 90), 1), [control], SETTING)
    assert "nothing here that fine-tuning cannot do" in said.sentences[-1]
    said = verdict(scores(99, 100, 0), Repair("Pruning", scores(98, 0, 90), 1), [control], SETTING)
    assert "cannot do" not in said.sentences[-1]


def test_words() -> None:
    assert words.percent(0.98765) == "98.8 %"
    assert words.rate(Rate(0, 0)) == "-" and words.interval(Rate(0, 0)) == ""
    assert words.interval(Rate(0, 100)) == "0.0 to 3.7"
    assert [words.duration(s) for s in (0.04, 7.25, 59.9, 60, 125)] == [
        "0.04 s",
        "7.2 s",
        "59.9 s",
        "1 min 0 s",
        "2 min 5 s",
    ]


# ---------------------------------------------------------------------------------------------------
# Pictures and charts


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_keeps_every_pixel(channels: int) -> None:
    pixels = torch.arange(channels * 20, dtype=torch.uint8).view(channels, 4, 5)
    data = base64.b64decode(data_png(pixels).removeprefix("data:image/png;base64,"))
    read = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(read.reshape(4, 5, channels), pixels.permute(1, 2, 0).numpy())


def test_a_large_picture_is_made_smaller_and_keeps_its_form() -> None:
    pixels = torch.zeros(1, 600, 300, dtype=torch.uint8)
    pixels[0, 100:104, 50:54] = 255
    data = base64.b64decode(data_png(pixels, largest=160).partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (80, 160)
        assert image.getextrema()[1] > 100  # a patch smaller than a pixel of the new picture is still seen


def test_a_picture_of_two_channels_is_refused() -> None:
    with pytest.raises(InputError, match="1 or 3 channels, got 2"):
        data_png(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_a_chart_is_coloured_by_the_page_and_escapes_names() -> None:
    series = [Series(HOSTILE, [Rate(98, 100), Rate(0, 0)]), Series("$x^2$", [Rate(1, 100), Rate(50, 100)])]
    svg = grouped_bars(["ACC", HOSTILE], series, title=HOSTILE)
    structure = Structure(str(svg))
    assert structure.tags[0][0] == "svg"
    assert not re.search(r"https?:|xmlns|<style|<metadata|<script|<img", svg)
    assert "var(--series-1)" in svg and "var(--ink)" in svg
    assert not re.search(r"#0[12]0[23]0\d", svg), "a stand-in colour was left"
    assert "$x^2$" in svg
    assert svg == grouped_bars(["ACC", HOSTILE], series, title=HOSTILE)


def test_a_missing_matplotlib_is_explained_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"needs the package matplotlib.*unbackdoor\[report\]"):
        require_charts()
