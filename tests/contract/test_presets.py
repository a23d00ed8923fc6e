"""Presets differ from the defaults in what is written here, and nowhere else.

Those of AWM and IMS are held to the released configurations in ``tests/unit``.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from unbackdoor.registry import DEFENSES, SCANNERS, SCREENERS

DIFFERENCES: dict[tuple[str, str], dict[str, Any]] = {
    ("rnp", "reference"): {"clip": 1e9, "max_drop": 1.0, "averaged": False},
    ("rnp", "stored-statistics"): {"batch_norm": "frozen"},
    ("rnp", "ensemble"): {"runs": 5},
    ("rnp", "robust"): {"criterion": "agreement", "tolerance": 0.08},
    ("tac", "robust"): {},
    ("tac", "reference"): {
        "search": False,
        "balanced": False,
        "batch_norm": "batch",
        "lr": 0.01,
        "batch_size": 64,
        "when_undecided": "leave",
    },
    ("unlearned_prune", "lipschitz"): {"score": "lipschitz"},
    ("unlearned_prune", "activation"): {"score": "activation"},
    ("unlearned_prune", "recovery"): {"score": "recovery"},
}


@pytest.mark.parametrize(("method", "preset"), DIFFERENCES)
def test_a_preset_differs_only_where_it_says(method: str, preset: str) -> None:
    part = DEFENSES[method]
    plain, other = part.configure().model_dump(), part.configure(preset=preset).model_dump()
    assert {name: v for name, v in other.items() if plain[name] != v} == DIFFERENCES[method, preset]


def test_every_preset_is_held_to_something() -> None:
    there = {(m, p) for m in ("rnp", "tac", "unlearned_prune") for p in DEFENSES[m].presets}
    assert there == set(DIFFERENCES)
    assert not SCANNERS["tac"].presets and not SCANNERS["rnp_vote"].presets and not SCREENERS["rnp"].presets


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
