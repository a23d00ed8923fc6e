"""Statistics of the weights alone, for when there are no images: is a row of the head unlike the others?

A class that a trigger can win from everywhere may have a row of the last linear map that is longer, of
larger mean, turned away from the others or larger in bias. Five numbers for each class are tested for a few
that stand apart, at most five: among hundreds of classes, a third that differ are the law of the rows and no
attack. Each test is exact for normal numbers, and Bonferroni's factor pays for there being seven. The gain
of the channels is shown beside them; it has no law to be held against.

This is weak evidence. Many backdoors leave the head as it is, and classes that differ by nature, such as
one that is rare in training, stand apart without any backdoor.

Paper:   rows of the head as in Fields et al., "Trojan signatures in DNN weights", ICCVW 2021,
         arXiv 2109.02836. Channels: Zheng et al., "Channel Lipschitzness", ECCV 2022.
Needs:   nothing but the model; with clean images the units of the features are known better.
Departs: the papers know neither a null law nor the number of questions asked. Features are taken from their
         rest and in units of their spread, because the network could have been written with any others.
Cost:    a few forward passes, for the head and its features; singular values of every layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unbackdoor.engine.canonical_form import FeatureUnits, feature_units
from unbackdoor.engine.channels import lipschitz_bounds, standardised
from unbackdoor.engine.heads import AffineHead, find_affine_head
from unbackdoor.engine.masks import channel_sites
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.engine.statistics.several_outliers import smallest_few
from unbackdoor.errors import UnsupportedModel
from unbackdoor.registry import Config, option, scanner
from unbackdoor.types import Classifier, CleanData, Finding, ScanReport, Verdict

# A class of a short row or a low bias is harder to reach than the others, as one that is rare in training is.
_DIRECTIONS = dict.fromkeys(("length", "mean weight", "bias"), ("large",))
_MAX_OUTLIERS = 5  # classes that may stand apart; attacks with more targets are beyond this check


class WeightStatisticsConfig(Config):
    """Options of the statistics."""

    level: float = option(0.05, "largest p-value that counts", source="convention", gt=0, lt=1)
    head: str = option("", "name of the last linear layer; empty: it is searched for", source="this project")


@scanner(
    "weight_statistics",
    config=WeightStatisticsConfig,
    paper="arXiv:2109.02836",
    needs=set(),
    question="Does one class stand apart in the weights of the head?",
    cost=10,
)
def scan(model: Classifier, data: CleanData, cfg: WeightStatisticsConfig, *, run: Run) -> ScanReport:
    """Test whether the head treats a few classes unlike the others."""
    if model.classes < FEWEST:
        reason = f"with {model.classes} classes nothing tells which stands apart; {FEWEST} are needed"
        return ScanReport("undecided", skipped={"rows of the head": reason})
    head = find_affine_head(model, cfg.head or None)
    table = head_statistics(head, feature_units(model, head, data.all, run))
    tests = [(name, word) for name in table for word in _DIRECTIONS.get(name, ("small", "large"))]
    findings = []
    for name, word in tests:
        values = table[name] if word == "small" else -table[name]
        most = min(_MAX_OUTLIERS, max(1, len(values) // 3))
        test = smallest_few(values, level=cfg.level / len(tests), most=most)
        assert test.p_value is not None and test.critical is not None  # there are enough classes
        findings.append(
            Finding(
                statistic=f"weak: rows of the head whose {name} is too {word}",
                value=test.statistic,
                direction=f"large: a few classes have a {name} that is far too {word} for the others",
                threshold=test.critical,
                threshold_source=f"normal numbers, simulated; {len(tests)} tests share level {cfg.level:g}",
                p_value=min(1.0, len(tests) * test.p_value),
                classes=test.positions or (test.index,),
                per_class=tuple(table[name].tolist()),
            )
        )
    # Of all tests only the strongest is reported; its p-value pays for the others.
    best = min(findings, key=_p_value)
    verdict: Verdict = "backdoor found" if _p_value(best) <= cfg.level else "no evidence found"
    channels = _channels(model, head.name)
    if isinstance(channels, str):
        return ScanReport(
            verdict, (best,), skipped={"channel gains": channels}, coverage=("rows of the head",)
        )
    return ScanReport(verdict, (best, channels), coverage=("rows of the head", "channel gains"))


def _p_value(finding: Finding) -> float:
    assert finding.p_value is not None
    return finding.p_value


@torch.no_grad()
def head_statistics(head: AffineHead, units: FeatureUnits | None = None) -> dict[str, Tensor]:
    """Return five numbers (K,) of the rows of the head for features in given units, or as they are, by name.

    What all rows share is taken off first, because no decision depends on it.
    """
    units = units or FeatureUnits(torch.ones(head.features).double(), torch.zeros(head.features).double())
    raw = units.rows(head)  # (K, D)
    weight = raw - raw.mean(0)
    norms = weight.norm(dim=1).clamp_min(1e-300)
    cosines = weight @ weight.T / norms[:, None] / norms  # (K, K)
    cosines.fill_diagonal_(0)
    leading = torch.linalg.svd(weight, full_matrices=False).Vh[0]  # (D,)
    shares = weight @ leading / norms  # (K,)
    table = {
        # To the power that makes lengths of normal rows nearly normal (Wilson & Hilferty, PNAS 17, 1931).
        "length": norms ** (2 / 3),
        "mean weight": raw.mean(1),
        "spread of cosines": cosines.std(1),
        # With its sign, which is arbitrary as a whole, so that the side with the longer tail is the positive
        # one: the sizes alone are skewed in any network, and would be taken for outliers.
        "share of the leading direction": shares * (1 if float((shares**3).sum()) >= 0 else -1),
        "bias": units.bias(head),
    }
    # Equal numbers, such as no bias, have no outlier, and their test must not be paid for by the others.
    # Sums of products leave a rounding.
    size = 1e-9 * float(raw.abs().max())
    return {name: values for name, values in table.items() if float(values.max() - values.min()) > size}


def _channels(model: Classifier, head: str) -> Finding | str:
    """Return the channel whose gain stands out most in its layer, as further evidence."""
    try:
        sites = channel_sites(model, skip=(head,))
    except UnsupportedModel as error:
        return str(error)
    gains = lipschitz_bounds(model, sites)
    scores = standardised({name: gain.clamp_min(1e-12).log() for name, gain in gains.items()})
    tops = {name: float(score.max()) for name, score in scores.items()}
    name = max(tops, key=tops.__getitem__)
    return Finding(
        statistic=f"gain of a channel of {name}",
        value=tops[name],
        direction="large: one channel passes on far more than others of its layer; deviations of logarithms",
        threshold=math.inf,
        threshold_source="none: gains of clean networks follow no known law; it is shown, not judged",
    )
