"""Rates and times in words, the same in every table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line shows words without importing torch
    from unbackdoor.audit.comparison import LogitDifference
    from unbackdoor.metrics import Rate

NOTHING = "-"  # where there is no number


def percent(value: float) -> str:
    """Return a share of 0..1 as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def rate(measured: Rate) -> str:
    """Return a measured share, or a dash where no image was tested."""
    return percent(measured.value) if measured.total else NOTHING


def interval(measured: Rate) -> str:
    """Return the 95 % interval of a measured share in percent, or an empty text."""
    low, high = (100 * end for end in measured.interval)
    return f"{low:.1f} to {high:.1f}" if measured.total else ""


def logits_in_words(measured: LogitDifference) -> str:
    """Return how far the logits of two models lie apart, as a sentence."""
    apart = f"the largest difference of a logit is {measured.relative:.2g} times their spread"
    if measured.same:
        return f"The two compute the same logits up to rounding, on {measured.images} images: {apart}."
    return f"The two do not compute the same logits, on {measured.images} images: {apart}."


_LOSSES = {
    "flattered": "is flattered, because the method has seen the images",
    "pessimistic": "is pessimistic, because the original has seen the images, and a repair forgets some",
    "unknown": "may be too small or too large, because both the original and the method have seen the images",
}


def loss_in_words(bias: str) -> str:
    """Return how the measured loss of accuracy relates to that on new images, as a sentence."""
    return f"The loss {_LOSSES[bias]}." if bias in _LOSSES else "The loss is that on new images."


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it.

    Example:
        >>> duration(0.04), duration(7.25), duration(125)
        ('0.04 s', '7.2 s', '2 min 5 s')
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
