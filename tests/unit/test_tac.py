"""TAC as a scanner and as a defense: what is said, what is refused, what is left alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tiny import tiny_classifier, tiny_data
from unbackdoor.defenses.tac import TACConfig
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.errors import ConfigError, InputError, MethodFailed, MissingExtra, UnsupportedModel
from unbackdoor.registry import SCANNERS
from unbackdoor.scanners.tac import TACScanConfig, scan
from unbackdoor.triggers import Suspicion
from unbackdoor.types import Classifier, CleanData, Images

pytest.importorskip("scipy", reason="the solver is SciPy's (extra: scan)")

RUN = Run.create(seed=0, policy="fp32")
CLASSES, FEATURES, TARGET = 8, 64, 3
ONCE = {"search": False, "epochs": 2, "batch_size": 16, "when_undecided": "repair"}
ANYWAY = {"when_undecided": "repair"}


def planted(*, pull: float) -> tuple[Classifier, CleanData]:
    """Return a linear classifier of images that show one bright pixel a class, and images.

    One more pixel, dark in every image, is read by the target's row alone, with weight ``pull``: the
    simplest backdoor there is.
    """
    linear = nn.utils.skip_init(nn.Linear, FEATURES, CLASSES)
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % CLASSES
    pixels = torch.zeros(80, FEATURES, dtype=torch.uint8)
    pixels[torch.arange(80), labels] = 150
    pixels[:, :CLASSES] += torch.randint(0, 60, (80, CLASSES), generator=draws).to(torch.uint8)
    with torch.no_grad():
        linear.weight.copy_(0.02 * torch.randn(CLASSES, FEATURES, generator=draws))
        linear.weight[:, :CLASSES] += 8 * torch.eye(CLASSES)
        linear.weight[TARGET, CLASSES] = pull
        linear.bias.zero_()
    names = tuple(f"class {k}" for k in range(CLASSES))
    model = Classifier(nn.Sequential(nn.Flatten(), linear), input_shape=(1, 8, 8), class_names=names)
    return model.eval(), CleanData.split(Images(pixels.view(80, 1, 8, 8), labels, names))


def without_labels(data: CleanData) -> CleanData:
    return CleanData(replace(data.fit, labels=None), replace(data.select, labels=None))


def test_it_is_registered() -> None:
    part = SCANNERS["tac"]
    assert part.needs == {"images"}
    assert part.config is TACScanConfig
    assert "latent shift" in part.summary


@pytest.mark.parametrize("rule", ["grubbs", "mad"])
def test_a_planted_class_is_found_without_labels(rule: str) -> None:
    model, data = planted(pull=60.0)
    report = scan(model, without_labels(data), TACScanConfig(rule=rule), run=RUN)
    finding, nearest = report.findings
    norms = torch.tensor(finding.per_class)
    assert nearest.classes == (TARGET,)
    assert nearest.value == pytest.approx(float(norms.min() / norms.quantile(0.5)))
    assert report.verdict == "backdoor found"
    assert finding.classes == (TARGET,)
    assert finding.p_value is not None
    assert finding.p_value < 1e-3
    assert finding.value > finding.threshold
    assert len(finding.per_class) == CLASSES
    assert min(finding.per_class) == finding.per_class[TARGET]
    shift = finding.artefacts["shifts"][TARGET]
    assert int(shift.abs().argmax()) == CLASSES  # the dark pixel
    assert report.coverage == ("latent shifts", "outlier test")
    again = scan(model, data, TACScanConfig(rule=rule), run=RUN)
    assert again.findings[0].value == finding.value


def test_without_the_backdoor_nothing_is_found() -> None:
    model, data = planted(pull=0.0)
    report = scan(model, data, TACScanConfig(), run=RUN)
    assert report.verdict == "no evidence found"
    finding = report.findings[0]
    # The class is named at any p-value, so that it can agree with other checks.
    assert finding.classes == (finding.per_class.index(min(finding.per_class)),)
    assert (
        finding.p_value is not None
        and min(finding.class_p_values) == finding.class_p_values[finding.classes[0]]
    )
    assert finding.p_value == pytest.approx(min(1, len(finding.per_class) * min(finding.class_p_values)))
    assert report.findings[1].classes == (torch.tensor(report.findings[0].per_class).argmin().item(),)


def test_a_few_classes_get_no_verdict_but_their_norms() -> None:
    report = scan(tiny_classifier("conv-bn"), CleanData.split(tiny_data(40)), TACScanConfig(), run=RUN)
    assert report.verdict == "undecided"
    assert report.findings[0].p_value is None
    assert len(report.findings[0].per_class) == 4
    assert "fewer than 6 classes" in report.skipped["outlier test"]
    assert report.coverage == ("latent shifts",)


def test_the_scan_refuses_what_it_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = planted(pull=0.0)
    one = data.all.subset((data.all.truth == 1).nonzero().flatten())
    with pytest.raises(InputError, match="all of one class"):
        scan(model, CleanData.split(one), TACScanConfig(), run=RUN)
    few = CleanData.split(Images(data.all.pixels[:6], None, data.all.class_names))
    with pytest.raises(InputError, match="fewer images than classes"):
        scan(model, few, TACScanConfig(), run=RUN)
    with pytest.raises(InputError, match="no such layer"):
        scan(model, data, TACScanConfig(head="network.7"), run=RUN)
    broken = model.copy()
    with torch.no_grad():
        next(broken.parameters())[0, 0] = float("nan")
    with pytest.raises(UnsupportedModel, match="linearly"):  # the caller checks weights before
        scan(broken, data, TACScanConfig(), run=RUN)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtra, match=r"unbackdoor\[scan\]"):
        scan(model, data, TACScanConfig(), run=RUN)


# ---------------------------------------------------------------------------------------------------
# The repair


def test_without_a_shifted_term_it_is_plain_fine_tuning() -> None:
    model, data = tiny_classifier("conv-bn"), CleanData.split(tiny_data(40))
    options = {**ONCE, "balanced": False, "beta": 0.0, "train": "all", "batch_norm": "batch", "lr": 0.01}
    out = call("tac", model, data, options=options, precision="fp32", seed=5).model
    plain = model.copy()
    recipe = Recipe(epochs=2, lr=0.01, batch_size=16, schedule="cosine")
    train(plain, data.all, recipe, Run.create(seed=5, policy="fp32"), augmentation=data.augmentation)
    assert out.sha256() == plain.sha256()


def test_the_head_and_frozen_statistics_stay_as_they_are() -> None:
    model, data = tiny_classifier("conv-bn"), CleanData.split(tiny_data(40))

    def changed(**options: object) -> set[str]:
        out = call("tac", model, data, options={**ONCE, **options}, precision="fp32").model
        pairs = zip(model.state_dict().items(), out.state_dict().values(), strict=True)
        return {name for (name, before), after in pairs if not torch.equal(before, after)}

    frozen = changed(batch_norm="frozen")
    assert "network.conv1.weight" in frozen
    assert not [name for name in frozen if "fc" in name or "running" in name]
    assert "network.fc.weight" in changed(train="all", batch_norm="frozen")
    assert "network.bn1.running_mean" in changed(batch_norm="batch")


def test_the_class_may_be_named_and_the_undecided_left_alone() -> None:
    model, data = tiny_classifier("conv-bn"), CleanData.split(tiny_data(40))
    named = call("tac", model, data, options={**ONCE, "target": 2})
    assert named.evidence["target"] == 2
    assert named.evidence["verdict"] == "undecided"
    left = call("tac", model, data)
    assert left.evidence["repaired"] is False and left.evidence["target"] is None
    assert "supports no class" in left.evidence["remarks"][0]
    assert left.model.sha256() == model.sha256()
    assert call("tac", model, data, preset="reference").model.sha256() == model.sha256()
    with pytest.raises(ConfigError, match=r"expected 0\.\.3, got 4"):
        call("tac", model, data, options={"target": 4})


ALL = {"search": False, "epochs": 1, "batch_size": 16, "train": "all"}


def suspects(*classes: int) -> Suspicion:
    return Suspicion(classes, (0.01,) * len(classes))


def test_only_a_class_that_something_supports_is_repaired() -> None:
    """It repaired the class of the smallest norm, whatever its test said, and cost accuracy."""
    clean, data = planted(pull=0.0)
    left = call("tac", clean, data)
    assert left.evidence["verdict"] == "no evidence found" and left.evidence["target"] is None
    assert left.model.sha256() == clean.sha256() and left.evidence["repaired"] is False
    # A suspicion leads where the test is silent, whatever class is the nearest.
    for label in range(3):
        led = call("tac", clean, data, options=ALL, suspicion=suspects(label, 7))
        assert led.evidence["target"] == label and "supports no class" in led.evidence["remarks"][0]
    # Both agree: on the class that was suspected second, too.
    model, data = planted(pull=60.0)
    both = call("tac", model, data, options=ALL, suspicion=suspects(5, TARGET))
    assert both.evidence["target"] == TARGET and "supports it" in both.evidence["remarks"][0]
    # They contradict each other: nothing is changed, unless the user names the class.
    against = call("tac", model, data, options=ALL, suspicion=suspects(5))
    assert against.model.sha256() == model.sha256() and against.evidence["target"] is None
    assert "supports class 3 instead" in against.evidence["remarks"][0]
    asked = call("tac", model, data, options={**ALL, "target": 5}, suspicion=suspects(TARGET))
    assert asked.evidence["target"] == 5


def test_a_repair_that_leaves_most_images_to_the_shift_says_so() -> None:
    model, data = planted(pull=60.0)
    # With a vanishing weight the shift is not taught away.
    idle = call("tac", model, data, options={**ALL, "beta": 0.0, "lr": 1e-6})
    assert idle.evidence["still_moved"] > 0.5
    assert any("still sends" in text for text in idle.evidence["remarks"])


def test_every_class_at_once_is_deterministic_and_keeps_the_task() -> None:
    model, data = tiny_classifier("conv-bn"), CleanData.split(tiny_data(80))
    options = {**ONCE, "targets": "every"}
    first, again = (call("tac", model, data, options=options, seed=1).model for _ in range(2))
    assert first.sha256() == again.sha256()
    assert first.sha256() != call("tac", model, data, options=ONCE, seed=1).model.sha256()
    assert accuracy(first, data.all, RUN) > 0.9


def test_the_search_keeps_what_held_and_says_what_did_not() -> None:
    model, data = tiny_classifier("conv-bn"), CleanData.split(tiny_data(80))
    options = {**ANYWAY, "epochs": 4, "tolerance": 0.05}
    out = call("tac", model, data, options=options, precision="fp32")
    json.dumps(dict(out.evidence), allow_nan=False)
    held = [rung for rung in out.evidence["trace"] if rung["held"]]
    floor = accuracy(model, data.select, RUN) - 0.05
    assert all(rung["held_out"] >= floor - 1e-6 for rung in held)
    if out.evidence["repaired"]:
        assert out.evidence["beta"] == max(rung["beta"] for rung in held)
        assert accuracy(out.model, data.select, RUN) == pytest.approx(out.evidence["held_out"])
    for rung in out.evidence["trace"]:
        assert set(rung) >= {"batch_norm", "beta", "lr", "held"}


def test_where_no_rung_holds_the_model_comes_back_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*_: object, **__: object) -> None:
        raise MethodFailed("training diverged")

    monkeypatch.setattr("unbackdoor.defenses.tac.train", diverging)
    model, data = tiny_classifier("conv-bn"), CleanData.split(tiny_data(40))
    out = call("tac", model, data, options={**ANYWAY, "lr": 0.1})
    assert out.evidence["repaired"] is False
    assert out.model.sha256() == model.sha256()
    trace = out.evidence["trace"]
    assert [rung["lr"] for rung in trace] == pytest.approx([0.1, 0.1 / 3, 0.3, 0.1])
    assert {rung["failed"] for rung in trace} == {"training diverged"}


def test_without_held_out_images_only_the_mildest_rung_is_tried() -> None:
    data = CleanData.split(tiny_data(4, seed=2))
    assert data.select_is_fit
    out = call("tac", tiny_classifier("conv-bn"), data, options={**ANYWAY, "epochs": 2})
    assert {rung["beta"] for rung in out.evidence["trace"]} == {0.3}


def test_the_repair_refuses_what_it_cannot_use() -> None:
    model, data = tiny_classifier("conv-bn"), CleanData.split(tiny_data(40))
    with pytest.raises(InputError, match="needs labelled images"):
        call("tac", model, without_labels(data))
    linear = nn.utils.skip_init(nn.Linear, 64, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
        linear.weight[1] = linear.weight[[0, 2, 3]].mean(0)
        linear.bias.copy_(torch.tensor([0.0, -50.0, 0.0, 0.0]))
    inside = Classifier(nn.Sequential(nn.Flatten(), linear), input_shape=(1, 8, 8), class_names="abcd")
    with pytest.raises(MethodFailed, match="no shift of the features reaches the class"):
        call("tac", inside, data, options={"target": 1, "train": "all"})
    with pytest.raises(UnsupportedModel, match="no layer but the head can learn"):
        call("tac", inside, data, options={"target": 0})


def test_options_of_both_agree() -> None:
    for name in ("rule", "level", "quantile", "head"):
        assert getattr(TACConfig(), name) == getattr(TACScanConfig(), name)
