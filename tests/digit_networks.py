"""Networks of digits, backdoored and clean, that train in a second or two and are shared by the tests."""

from __future__ import annotations

from functools import cache

import pytest

from unbackdoor.bench.victims import VictimSpec, train_victim
from unbackdoor.data.datasets import load_dataset
from unbackdoor.data.splits import reserve
from unbackdoor.engine.canonical_form import CanonicalForm, form_for_checks
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.types import CleanData, ScanReport

TARGET = 0  # of the attacks, unless an option says otherwise


@cache
def digits(attack: str, seed: int = 0) -> CanonicalForm:
    """Return a network of the attack, in the form that checks are given, with the defender's images."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    data, run = load_dataset("digits"), Run.create(seed=seed, policy="fp32")
    options = {"poison_rate": 0.3} if attack == "badnets_all_to_all" else {}
    spec = VictimSpec(
        "digits", "small_cnn[width=32]", Recipe(epochs=12), attack=attack, options=options, seed=seed
    )
    model, _ = train_victim(spec, data, run)
    clean = CleanData.split(reserve(data.test, fraction=0.5)[1], augmentation=data.augmentation)
    return form_for_checks(model, clean, run)


@cache
def scanned(scanner: str, attack: str, seed: int = 0) -> ScanReport:
    """Return what a scanner says of such a network."""
    form = digits(attack, seed)
    return scan(scanner, form.model, form.data, precision="fp32")
