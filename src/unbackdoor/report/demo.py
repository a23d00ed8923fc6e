"""The page of the demonstration: what was planted, what was repaired, and what can be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unbackdoor.bench.judge import Scores
from unbackdoor.bench.victims import ATTACK_TOOK
from unbackdoor.metrics import Rate
from unbackdoor.report.charts import Series, grouped_bars
from unbackdoor.report.page import render
from unbackdoor.report.words import duration, percent

GONE = 0.02  # ASR up to which a backdoor is called gone
ALL_BUT_GONE = 0.1  # as often as a guess among ten classes would hit the attacker's
DEAR = 0.05  # loss of ACC from which a repair is called dear

MEANINGS = {
    "ACC": "accuracy: clean images that are classified rightly; higher is better",
    "ASR": "attack success rate: images with the trigger that are classified as the attacker wants; lower "
    "is better",
    "RA": "robust accuracy: images with the trigger that are still classified rightly; higher is better",
}


@dataclass(frozen=True)
class Repair:
    """A repaired model as the judge measured it.

    Attributes:
        name: Of the method, as a reader should see it.
        scores: ACC, ASR and RA on the test images.
        seconds: Wall time of the method.
    """

    name: str
    scores: Scores
    seconds: float


@dataclass(frozen=True)
class Example:
    """One test image with and without the trigger, and what it was taken for.

    Attributes:
        label: Name of its true class.
        clean: ``data:`` address of the picture.
        triggered: Likewise with the trigger.
        before: Names that the victim gives to the two.
        after: Names that the repaired model gives to the two.
    """

    label: str
    clean: str
    triggered: str
    before: tuple[str, str]
    after: tuple[str, str]


@dataclass(frozen=True)
class Setting:
    """What was done, in words.

    Attributes:
        data: The data set, such as "handwritten digits".
        training: The poisoned training set, as the end of "The network was trained on ...".
        target_name: The class that the attacker wants, such as "a 0".
        clean_images: Number of the defender's images.
        tested: Number of test images.
        triggered: Number of triggered test images.
    """

    data: str
    training: str
    target_name: str
    clean_images: int
    tested: int
    triggered: int


@dataclass(frozen=True)
class Verdict:
    """The outcome in words.

    Attributes:
        tone: Colour of the headline.
        headline: One sentence without a full stop.
        sentences: Paragraphs.
    """

    tone: Literal["good", "fair", "bad"]
    headline: str
    sentences: tuple[str, ...]


def verdict(before: Scores, repair: Repair, controls: Sequence[Repair], setting: Setting) -> Verdict:
    """Say what the numbers say, failure included."""
    after = repair.scores
    loss = before.acc.value - after.acc.value
    sentences = (
        f"The network was trained on {setting.training}. It reads {percent(before.acc.value)} of unseen "
        f"images rightly, and takes {percent(before.asr.value)} of those that carry the trigger for "
        f"{setting.target_name}.",
        f"{repair.name} was given the network and {setting.clean_images} clean images, and knew nothing of "
        f"the trigger. The repaired network reads {percent(after.acc.value)} of unseen images rightly; of "
        f"those that carry the trigger it takes {percent(after.asr.value)} for {setting.target_name}, and "
        f"reads {percent(after.ra.value)} rightly.",
        _compared(repair, controls),
    )
    if before.asr.value < ATTACK_TOOK:
        return _verdict("bad", "The attack did not take, so there was little to repair", sentences)
    if after.asr.value <= ALL_BUT_GONE:
        gone = "The backdoor is gone" if after.asr.value <= GONE else "The backdoor is all but gone"
        if loss <= DEAR:
            return _verdict("good", f"{gone}, and the network still does its task", sentences)
        return _verdict("fair", f"{gone}, at the price of accuracy", sentences)
    if after.asr.value <= before.asr.value / 2:
        return _verdict("fair", "The backdoor is weaker, and not gone", sentences)
    return _verdict("bad", "The backdoor is still there", sentences)


def _verdict(tone: Literal["good", "fair", "bad"], headline: str, sentences: tuple[str, ...]) -> Verdict:
    return Verdict(tone, headline, tuple(sentence for sentence in sentences if sentence))


def _compared(repair: Repair, controls: Sequence[Repair]) -> str:
    if not controls:
        return ""
    rates = ", and on ".join(
        f"{percent(c.scores.asr.value)} {'of the images ' if i == 0 else ''}after {_within(c.name)}"
        for i, c in enumerate(controls)
    )
    text = f"For comparison, with the same clean images: the trigger still works on {rates}."
    better = [_within(c.name) for c in controls if c.scores.asr.value <= repair.scores.asr.value]
    return f"{text} So the method has shown nothing here that {better[0]} cannot do." if better else text


def demo_page(
    before: Scores,
    repair: Repair,
    controls: Sequence[Repair],
    *,
    setting: Setting,
    examples: Sequence[Example],
    facts: Sequence[tuple[str, str]],
    command: str,
    colophon: str,
) -> str:
    """Return the page as HTML that loads nothing from anywhere.

    Args:
        before: The victim's scores.
        repair: The method that is shown.
        controls: Baselines on the same victim with the same images.
        setting: What was done.
        examples: Test images to show.
        facts: Terms and texts for "How it was done".
        command: How to do it again.
        colophon: Last line of the page.

    Raises:
        MissingExtra: If matplotlib is not installed.
    """
    repairs = [(repair, "the repair"), *((control, "for comparison") for control in controls)]
    rows = [{"name": "Before", "remark": "the victim", "scores": before}]
    rows += [
        {"name": r.name, "remark": f"{role}, {duration(r.seconds)}", "scores": r.scores}
        for r, role in repairs
    ]
    series = [Series("before", _rates(before)), *(Series(r.name, _rates(r.scores)) for r, _ in repairs)]
    figures = [
        {"name": name, "meaning": meaning, "before": then, "after": now}
        for (name, meaning), then, now in zip(
            MEANINGS.items(), _rates(before), _rates(repair.scores), strict=True
        )
    ]
    return render(
        "demo.html",
        verdict=verdict(before, repair, controls, setting),
        setting=setting,
        figures=figures,
        rows=rows,
        chart=grouped_bars(list(MEANINGS), series, title="Bar chart of the numbers in the table below it"),
        examples=examples,
        facts=facts,
        command=command,
        colophon=colophon,
    )


def _rates(scores: Scores) -> tuple[Rate, Rate, Rate]:
    return scores.acc, scores.asr, scores.ra


def _within(name: str) -> str:
    """Return a method's name as it stands inside a sentence."""
    return name if name[:2].isupper() else name[:1].lower() + name[1:]
