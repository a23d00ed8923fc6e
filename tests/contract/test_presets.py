"""Reference presets are the released configurations; what every preset owes, the contract suite asks.

Those of AWM and IMS are held to the released configurations in ``tests/unit``.
"""

from __future__ import annotations

import inspect
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
