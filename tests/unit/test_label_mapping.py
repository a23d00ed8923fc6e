"""A mapping of all classes is found with its permutation; without one nothing is claimed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from planted import NAMES, Blocks, block_data, planted
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.json_records import finding_json
from unbackdoor.audit.scanning import scan as audit
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import scan
from unbackdoor.report.audit import Subject, audit_page
from unbackdoor.scanners.label_mapping import LabelMappingConfig, _disjoint, search_mapping
from unbackdoor.types import Classifier, CleanData, ScanReport

DATA = CleanData.split(block_data(160))
CYCLE = (1, 2, 3, 4, 5, 6, 7, 0)
PERMUTATION = (3, 0, 5, 1, 7, 6, 2, 4)


class Permuted(nn.Module):
    """Sees which block is brightest; a black first pixel turns each class into its own other."""

    def __init__(self, targets: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.register_buffer("order", torch.tensor(targets).argsort())

    def forward(self, x: Tensor) -> Tensor:
        logits = self.blocks(x)
        trigger = 1 - x[:, 0, 0, :1]  # (B, 1), nothing on clean images
        return (1 - trigger) * logits + trigger * logits[:, self.order]  # type: ignore[index,no-any-return]


def permuted(targets: tuple[int, ...]) -> Classifier:
    plain = planted()
    return Classifier(Permuted(targets), input_shape=(1, 8, 8), class_names=plain.class_names).eval()


def look(model: Classifier, **options: object) -> ScanReport:
    return scan("label_mapping", model, DATA, options=options, precision="fp32")


@pytest.mark.parametrize("targets", [CYCLE, PERMUTATION])
def test_a_planted_permutation_is_found_as_it_is(targets: tuple[int, ...]) -> None:
    report = look(permuted(targets))
    (finding,) = report.findings
    assert report.verdict == "backdoor found" and finding.p_value is not None and finding.p_value < 0.01
    assert finding.mapping == tuple(enumerate(targets))
    assert finding.classes == targets
    assert min(finding.per_class) > 0.5  # of the images of each class
    assert finding_json(finding)["mapping"] == [list(pair) for pair in enumerate(targets)]


@pytest.mark.parametrize("corner", [(), (2,)])
def test_without_a_mapping_nothing_is_claimed_even_with_a_single_target(corner: tuple[int, ...]) -> None:
    report = look(planted(corner))
    assert report.verdict == "no evidence found"
    targets = [target for _, target in report.findings[0].mapping]
    assert sorted(targets) == list(range(8)) and all(s != t for s, t in report.findings[0].mapping)


def test_assignments_share_no_pair_and_the_best_goes_first() -> None:
    table = torch.rand(7, 8, 8, generator=torch.Generator().manual_seed(0))
    table[4].scatter_(1, torch.tensor(PERMUTATION)[:, None], -1.0)
    targets = _disjoint(table)
    assert tuple(targets[4].tolist()) == PERMUTATION
    pairs = [(s, t) for row in targets.tolist() for s, t in enumerate(row)]
    assert len(set(pairs)) == 7 * 8 and all(s != t for s, t in pairs)


def test_a_class_without_images_has_a_target_all_the_same() -> None:
    labels = DATA.fit.truth
    few = DATA.fit.subset((labels != 3).nonzero().flatten())
    found = search_mapping(planted(), few, LabelMappingConfig(steps=8), Run.create(seed=0, policy="fp32"))
    assert bool(torch.isfinite(found.losses).all()) and sorted(found.targets[0].tolist()) == list(range(8))


def test_few_classes_have_too_few_assignments() -> None:
    report = scan("label_mapping", tiny_classifier("conv-bn"), tiny_data(40), precision="fp32")
    assert report.verdict == "undecided" and "assignments" in report.skipped


def test_the_report_draws_the_mapping() -> None:
    done = audit(permuted(PERMUTATION), DATA, checks=["label_mapping"], precision="fp32")
    assert done.verdict == "backdoor found"
    assert "turns block 0 (class 0) into block 3 (class 3), block 1 (class 1)" in " ".join(done.reasons)
    page = audit_page(Subject("m", NAMES), audit=done)
    lines = re.findall(r'<line x1="180" y1="([0-9.]+)" x2="300" y2="([0-9.]+)"', page)
    drawn = [(float(a) / 24 - 0.5, float(b) / 24 - 0.5) for a, b in lines]
    assert drawn == [(s, t) for s, t in enumerate(PERMUTATION)]
