"""Wrongly typed methods, each with the complaint of the type checker that ``make lint`` demands of it.

A complaint that stays out is an error of its own (an unused ignore), so the registry cannot stop checking.
"""

from __future__ import annotations

from unbackdoor.plugins import (
    Classifier,
    CleanData,
    Config,
    Images,
    Purified,
    Run,
    ScanReport,
    Screening,
    defense,
    scanner,
    screener,
)


class Mine(Config):
    """Options of the methods below."""


class Other(Config):
    """Options of another method."""


@defense("right", config=Mine)
def right(model: Classifier, data: CleanData, cfg: Mine, *, run: Run) -> Purified:
    """Take and return what a defense does."""
    return Purified(model)


@defense("wrong_result", config=Mine)  # type: ignore[arg-type]
def wrong_result(model: Classifier, data: CleanData, cfg: Mine, *, run: Run) -> ScanReport:
    """Return a report."""
    return ScanReport("undecided")


@defense("wrong_options", config=Mine)  # type: ignore[arg-type]
def wrong_options(model: Classifier, data: CleanData, cfg: Other, *, run: Run) -> Purified:
    """Take the options of another method."""
    return Purified(model)


@defense("wrong_data", config=Mine)  # type: ignore[arg-type]
def wrong_data(model: Classifier, data: Images, cfg: Mine, *, run: Run) -> Purified:
    """Take images that are not split."""
    return Purified(model)


@scanner("wrong_name", config=Mine)  # type: ignore[arg-type]
def wrong_name(network: Classifier, data: CleanData, cfg: Mine, *, run: Run) -> ScanReport:
    """Call the model something else."""
    return ScanReport("undecided")


@screener("wrong_kind", config=Mine)  # type: ignore[arg-type]
def wrong_kind(model: Classifier, data: CleanData, cfg: Mine, *, run: Run) -> Screening:
    """Take no images to screen."""
    raise NotImplementedError


@defense("wrong_fact", config=Mine, papers="none")  # type: ignore[call-arg]
def wrong_fact(model: Classifier, data: CleanData, cfg: Mine, *, run: Run) -> Purified:
    """Say what no registration says."""
    return Purified(model)
