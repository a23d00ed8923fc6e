"""Auto takes planted backdoors away, leaves a clean network as it came, and says what it cannot do."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tiny import tiny_classifier, tiny_data
from unbackdoor.attacks import AttackTruth, poison
from unbackdoor.bench.judge import judge
from unbackdoor.defenses.auto import method
from unbackdoor.defenses.auto.recall import lost_classes, recalls
from unbackdoor.defenses.auto.teaching import Lesson, teach
from unbackdoor.engine.inference import predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.engine.twin import Twin
from unbackdoor.engine.universal_changes import GivenChange
from unbackdoor.errors import MethodFailed, TooFewImages
from unbackdoor.networks import build
from unbackdoor.triggers import RecoveredTrigger, Suspicion
from unbackdoor.types import Classifier, CleanData

RUN = Run.create(seed=0, policy="fp32")
DATA = CleanData.split(tiny_data(120, seed=1))
TEST = tiny_data(200, seed=7)
CORNER = torch.zeros(8, 8)
CORNER[6:, 6:] = 1


@cache
def victim(attack: str = "badnets") -> tuple[Classifier, AttackTruth]:
    """Four white pixels in a corner call for class 0."""
    images, truth = poison(tiny_data(320), attack, {"size": 2, "poison_rate": 0.2}, seed=0)
    model = build("small_cnn[width=8]", input_shape=(1, 8, 8), class_names=images.class_names, seed=0)
    train(model, images, Recipe(epochs=16, batch_size=32, optimizer="adamw", lr=0.003), RUN)
    return model, truth


def test_a_planted_backdoor_falls_and_the_task_stays() -> None:
    model, truth = victim()
    before = judge(model, truth, TEST, RUN)
    assert before.asr.value > 0.9
    done = call("auto", model, DATA, precision="fp32")
    after = judge(done.model, truth, TEST, RUN)
    assert after.asr.value < 0.2 and after.acc.value >= before.acc.value - 0.03
    assert [one["class"] for one in done.evidence["convicted"]] == [0]
    assert done.evidence["rounds"]


@pytest.mark.parametrize("family", ["conv-bn", "conv", "transformer"])
def test_a_clean_network_is_returned_bit_for_bit(family: str) -> None:
    model = tiny_classifier(family)
    done = call("auto", model, DATA, precision="fp32")
    assert done.model.sha256() == model.sha256()
    assert done.evidence["decision"] == "no class convicted" and not done.evidence["convicted"]


def test_a_suspicion_that_is_right_leads_and_a_wrong_one_does_no_harm() -> None:
    model, truth = victim()
    right = Suspicion.of_triggers([RecoveredTrigger(0, CORNER[None], CORNER)])
    led = call("auto", model, DATA, suspicion=right, precision="fp32")
    assert judge(led.model, truth, TEST, RUN).asr.value < 0.2 and not led.evidence["remarks"]
    assert led.evidence["rounds"][0]["changes"][0][1] == 0
    wrong = Suspicion((3,), (0.01,), ())
    free = call("auto", tiny_classifier(), DATA, suspicion=wrong, precision="fp32")
    assert free.model.sha256() == tiny_classifier().sha256()
    assert "searched all classes anew" in free.evidence["remarks"][0]


def test_a_precaution_changes_a_clean_network_only_where_asked() -> None:
    model = tiny_classifier()
    done = call("auto", model, DATA, options={"precaution": True, "worth_teaching": 0.01}, precision="fp32")
    assert judge(done.model, victim()[1], TEST, RUN).acc.value > 0.95


def test_fewer_images_than_classes_are_refused() -> None:
    with pytest.raises(TooFewImages):
        call("auto", tiny_classifier(), CleanData.split(tiny_data(3)))


def test_a_twin_that_knows_nothing_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = Twin(tiny_classifier(), 0.1, 0.4, ((0.1, 0.4),))
    monkeypatch.setattr(method, "relearned_twin", lambda *_, **__: damaged)
    with pytest.raises(MethodFailed, match="too damaged to compare with") as caught:
        call("auto", tiny_classifier(), DATA, precision="fp32")
    assert "more clean images" in str(caught.value)


def test_teaching_closes_a_given_change_and_keeps_the_answers() -> None:
    model, truth = victim()
    change = GivenChange(RecoveredTrigger(0, CORNER[None], CORNER), 0)
    before = model.sha256()
    out = teach(model, model, DATA.fit, [(change, 1.0)], [], Lesson(), RUN, augmentation="none", number=0)
    assert model.sha256() == before
    assert judge(out, truth, TEST, RUN).asr.value < 0.1
    same = predict(out, TEST, RUN).argmax(1) == predict(model, TEST, RUN).argmax(1)
    assert float(same.float().mean()) > 0.97


def test_a_class_that_is_never_given_counts_as_lost() -> None:
    model = tiny_classifier().copy()
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.bias[2] -= 100
    shares = recalls(model, DATA.all, RUN)
    assert float(shares[2]) == 0 and float(shares[0]) > 0.9
    assert lost_classes(model, DATA.all, RUN) == [2]
    assert lost_classes(tiny_classifier(), DATA.all, RUN) == []
