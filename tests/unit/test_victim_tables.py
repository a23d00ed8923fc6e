"""Tables of victims: each counts once, low rates that took in part are kept, and what is older says so."""

from __future__ import annotations

import pytest

from unbackdoor.bench.results import WEAK
from unbackdoor.bench.rows import Row
from unbackdoor.report.benchmark.groups import Rows
from unbackdoor.report.benchmark.victims import cost_chart, victim_tables


def row(**changes: object) -> Row:
    columns: dict[str, object] = {
        "suite": "zoo", "dataset": "cifar10", "architecture": "airbench[expansion=2]", "width": 32,
        "recipe": "fast", "attack": "badnets", "poison_rate": 0.1, "target": 0, "victim_seed": 0,
        "defense": "none", "clean_images": 500, "defender_seed": 0, "acc_before": 0.9, "asr_before": 1.0,
        "ra_before": 0.0, "acc": 0.9, "asr": 1.0, "ra": 0.0, "der": 0.5, "victim_processor_seconds": 600,
    }  # fmt: skip
    return Row.model_validate({**columns, **changes})


def test_a_victim_counts_once_and_what_took_in_part_is_kept() -> None:
    rows = [
        row(), row(defender_seed=1), row(defense="ft"),
        row(victim_seed=1, target=7, acc_before=0.8, asr_before=0.5, flags=(WEAK,)),
        row(victim_seed=2, asr_before=0.1, flags=(WEAK,)),
        row(attack="none", poison_rate=0, target=None, asr_before=None),
    ]  # fmt: skip
    (table,) = victim_tables(Rows.of(rows, lambda row: True))
    assert "airbench[expansion=2]" in table.heading
    backdoored, clean = ([cell.text for cell in line] for line in table.rows)
    assert backdoored == ["badnets", "3", "86.7 %", "53.3 %", "1", "1", "1", "10.0"]
    assert clean[:3] == ["none", "1", "90.0 %"]
    assert [cell.small for cell in table.rows[0]][2:4] == [
        "\u00b1 14.3; worst 80.0 %",
        "\u00b1 112.0; worst 10.0 %",
    ]


def test_victims_of_older_code_have_lines_of_their_own() -> None:
    rows = [row(), row(victim_seed=1, commit="old")]
    (table,) = victim_tables(Rows.of(rows, lambda row: row["commit"] != "old"))
    assert [(line[0].older, line[1].text) for line in table.rows] == [(False, "1"), (True, "1")]


def test_the_chart_names_every_line() -> None:
    pytest.importorskip("matplotlib")
    svg = cost_chart({"fast": [(1, 0.6), (5, 0.9)], "plain": [(20, 0.87)]}, title="ACC against cost")
    assert all(word in svg for word in ("fast", "plain", "ACC against cost", "processor minutes"))
