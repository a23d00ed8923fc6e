"""Truth both ways on trained networks: a backdoor is found with its target or mapping, none is invented."""

from __future__ import annotations

import pytest

from digit_networks import TARGET, scanned
from unbackdoor.data.datasets import load_dataset

SINGLE = ["stamp_library", "neural_cleanse"]
CLEAN = ["logit_leak", "recall", "stamp_library", "neural_cleanse", "label_mapping", "tac"]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Load the digits before the policing starts: the first import of scikit-learn draws random numbers."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    load_dataset("digits")


@pytest.mark.parametrize("name", SINGLE)
def test_a_planted_target_is_found(name: str) -> None:
    report = scanned(name, "badnets")
    finding = report.findings[0]
    assert (report.verdict, finding.classes) == ("backdoor found", (TARGET,))
    assert finding.p_value is not None and finding.p_value < 0.005
    assert min(range(10), key=lambda k: finding.class_p_values[k]) == TARGET


def test_all_to_all_is_found_with_its_permutation() -> None:
    report = scanned("label_mapping", "badnets_all_to_all")
    assert report.verdict == "backdoor found"
    assert report.findings[0].mapping == tuple((k, (k + 1) % 10) for k in range(10))


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_network_is_not_accused(name: str) -> None:
    assert scanned(name, "none").verdict == "no evidence found"


def test_one_target_is_no_mapping_and_a_mapping_is_no_target() -> None:
    assert scanned("label_mapping", "badnets").verdict == "no evidence found"
    for name in SINGLE:
        assert scanned(name, "badnets_all_to_all").verdict == "no evidence found"
