"""Detection: rates and curves from the rows of scans."""

from __future__ import annotations

from typing import Any

import pytest

from unbackdoor.bench.detection import COMBINED, by_attack, detections
from unbackdoor.bench.results import WEAK
from unbackdoor.bench.rows import ScanRow


def row(seed: int, attack: str, p_value: float | None, **more: Any) -> ScanRow:
    facts: dict[str, Any] = {
        "suite": "s", "version": 1, "dataset": "digits", "architecture": "small_cnn", "width": 8.0,
        "recipe": "plain", "attack": attack, "poison_rate": 0.1, "target": None if attack == "none" else 0,
        "victim_seed": seed, "scanner": "one", "clean_images": 10, "defender_seed": 0,
        "verdict": "no evidence found", "p_value": p_value, "seconds": 1.0,
        "target_found": None if attack == "none" else True,
    }  # fmt: skip
    return ScanRow(**{**facts, **more})


def test_a_perfect_scanner_and_a_blind_one() -> None:
    rows = [row(i, "none", 0.5) for i in range(20)] + [row(i, "badnets", 0.01) for i in range(5)]
    rows += [row(i, "none", None, scanner="blind", verdict="undecided") for i in range(20)]
    rows += [row(i, "badnets", 1e-9, scanner="blind", verdict="undecided") for i in range(5)]
    one, blind, together = detections(rows)
    assert (one.auroc, one.tpr, one.found.value, one.alarms.hits) == (1.0, 1.0, 1.0, 0)
    assert (one.target.hits, one.target.total) == (5, 5)
    assert (blind.auroc, blind.found.hits) == (0.5, 0)
    assert together.scanner == COMBINED and together.found.hits == 5  # the blind one costs nothing


def test_all_together_pays_for_looking_twice() -> None:
    rows = [row(0, "none", 0.04), row(0, "none", 0.9, scanner="two")]
    one, _, together = detections(rows)
    assert one.alarms.hits == 1
    assert together.alarms.hits == 0


def test_what_did_not_take_or_failed_is_left_out() -> None:
    rows = [row(0, "none", 0.5), row(0, "badnets", 0.5, flags=(WEAK,)), row(1, "badnets", None, error="x")]
    (one, _) = detections(rows)
    assert (one.clean, one.backdoored) == (1, 0)
    assert one.auroc is None


def test_every_attack_meets_all_clean_networks() -> None:
    rows = [row(i, "none", 0.5) for i in range(4)]
    rows += [row(0, "badnets", 0.01), row(0, "blended", 0.9, poison_rate=0.03)]
    groups = by_attack(rows)
    assert list(groups) == ["badnets, 10 %", "blended, 3 %"]
    assert groups["badnets, 10 %"][0].clean == 4
    assert groups["blended, 3 %"][0].auroc == pytest.approx(0.0)
