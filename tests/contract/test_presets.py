"""Reference presets are the released configurations; what every preset owes, the contract suite asks.

Those of AWM and IMS are held to the released configurations in ``tests/unit``.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.registry import DEFENSES, SCANNERS, SCREENERS

# What the released code does and the default does not; a reference preset that drifts is no reference.
REFERENCE: dict[str, dict[str, Any]] = {
    "rnp": {"clip": 1e9, "max_drop": 1.0, "averaged": False},
    "tac": {
        "search": False,
        "balanced": False,
        "batch_norm": "batch",
        "lr": 0.01,
        "batch_size": 64,
        "when_undecided": "leave",
    },
}


@pytest.mark.parametrize("method", REFERENCE)
def test_the_reference_preset_is_the_reference(method: str) -> None:
    assert dict(DEFENSES[method].presets["reference"]) == REFERENCE[method]


@pytest.mark.parametrize("method", ["awm", "ims", "rnp", "tac"])
def test_the_reference_preset_is_documented(method: str) -> None:
    assert "reference" in DEFENSES[method].presets
    text = inspect.getmodule(DEFENSES[method].function).__doc__ or ""
    departs = text.split("Departs:")[1].split("Cost:")[0]
    assert "``reference``" in departs


def test_the_options_of_unlearning_are_the_same_everywhere() -> None:
    rnp = DEFENSES["rnp"].configure().model_dump()
    for part in (DEFENSES["unlearned_prune"], SCANNERS["rnp_vote"], SCREENERS["rnp"]):
        other = part.configure().model_dump()
        for name in ("unlearn_lr", "clip", "margin", "max_drop", "max_steps", "momentum", "weight_decay"):
            assert other[name] == rnp[name], name


def test_the_page_of_defenses_names_what_is_registered() -> None:
    """Rows of the tables: a name, what it does, what it needs, its presets."""
    page = (Path(__file__).parents[2] / "docs" / "defenses.md").read_text(encoding="utf-8")
    page = page.split("## Pruning and masking")[1]  # the other tables have other columns
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|([^|]*)\|$", page, re.MULTILINE)
    assert len(rows) >= 12
    for name, needs, presets in rows:
        part = DEFENSES[name]
        assert re.findall(r"`([\w-]+)`", presets) == list(part.presets), name
        assert needs.strip().startswith("nothing") == (not part.needs), name
        assert ("labels" in needs and "without labels" not in needs) == ("labels" in part.needs), name
