"""IBD-PSC, PSBD, BaDExpert, Beatrix, AGPD: mechanics by hand, and a real backdoor on digits both ways."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tiny import NAMES, tiny_classifier, tiny_data
from unbackdoor.attacks import AttackTruth
from unbackdoor.bench.screening import judge_screening
from unbackdoor.bench.victims import VictimSpec, train_victim
from unbackdoor.data.datasets import DataSet
from unbackdoor.engine.call_order import called_layers
from unbackdoor.engine.inference import accuracy, predict
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.engine.trusted_caller import screen
from unbackdoor.errors import MethodFailed, UnsupportedModel
from unbackdoor.screeners import agpd, badexpert, beatrix, ibd_psc, psbd
from unbackdoor.types import Classifier, CleanData, Images

RUN = Run.create(seed=0, policy="fp32")
MODEL = tiny_classifier()
CLEAN = CleanData.split(tiny_data(200, seed=5))
INPUT = ["ibd_psc", "psbd", "badexpert", "beatrix"]


# ---------------------------------------------------------------------------------------------------
# Mechanics


def test_layers_come_in_the_order_of_their_calls() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(8, 4), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            """Call them in the other order than they are defined in."""
            out: Tensor = self.last(self.first(x.flatten(1)))
            return out

    network = Backwards()
    model = Classifier(network, input_shape=(1, 8, 8), class_names=NAMES)
    assert called_layers(model, (nn.Linear,)) == [network.first, network.last]
    assert not network.first._forward_hooks


def test_amplified_norms_are_the_last_ones_and_scale_what_they_return() -> None:
    norms = ibd_psc.norms_of(MODEL)
    assert norms == [MODEL.network.get_submodule(f"bn{k}") for k in (4, 3, 2, 1)]
    x = torch.rand(2, norms[0].num_features, 3, 3, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    plain = norms[0](x)
    with ibd_psc.scaled(norms[:1], 1.5):
        assert torch.allclose(norms[0](x), 1.5 * plain)
    assert torch.equal(norms[0](x), plain)


def test_ibd_psc_by_hand() -> None:
    inputs = tiny_data(12, seed=3)
    found = screen("ibd_psc", MODEL, CLEAN, inputs, options={"networks": 2}, precision="fp32")
    factor, amplified = found.evidence["factor"], found.evidence["amplified"]
    assert len(amplified) == 2 and found.evidence["norms"] == 4
    wanted = torch.zeros(12)
    for count in amplified:
        model = MODEL.copy()
        for norm in ibd_psc.norms_of(model)[:count]:
            assert isinstance(norm, nn.BatchNorm2d)
            with torch.no_grad():
                norm.weight.mul_(factor)
                norm.bias.mul_(factor)
        with torch.no_grad():
            probabilities = model(inputs.pixels / 255).softmax(1)
        wanted += probabilities.gather(1, found.predicted[:, None])[:, 0] / 2
    assert torch.allclose(found.scores, wanted, atol=1e-4)
    with pytest.raises(UnsupportedModel, match="no normalisation"):
        screen("ibd_psc", tiny_classifier("conv"), CLEAN, inputs)


def test_dropped_channels_are_gone_and_the_others_make_up_for_them() -> None:
    layers = psbd.layers_of(MODEL)
    assert len(layers) == 4 and isinstance(layers[-1], nn.Linear)  # conv2..4 and the head
    seen: list[Tensor] = []
    handle = layers[-1].register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    x = tiny_data(6).pixels / 255
    with torch.no_grad():
        MODEL(x)
        with psbd.dropping(layers[-1:], 0.5, torch.Generator().manual_seed(1)):
            MODEL(x)
    handle.remove()
    plain, dropped = seen
    gone = (dropped == 0).all(0) & (plain != 0).any(0)  # the same for all images
    assert 0 < int(gone.sum()) < plain.shape[1]
    assert torch.allclose(dropped[:, ~gone], 2 * plain[:, ~gone])


def test_a_score_of_psbd_depends_on_no_other_input() -> None:
    inputs = tiny_data(10, seed=3)
    whole = screen("psbd", MODEL, CLEAN, inputs, precision="fp32")
    one = screen("psbd", MODEL, CLEAN, inputs.subset([7]), precision="fp32")
    assert torch.allclose(one.scores, whole.scores[7:8], atol=1e-5)


def test_the_expert_forgets_and_the_network_does_not() -> None:
    before = MODEL.sha256()
    expert, left, passes = badexpert.forgetful(MODEL, CLEAN.fit, badexpert.BaDExpertConfig(lr=0.002), RUN)
    assert MODEL.sha256() == before
    assert left == accuracy(expert, CLEAN.fit, RUN) <= 0.3 < accuracy(MODEL, CLEAN.fit, RUN)
    assert passes >= 1
    with pytest.raises(MethodFailed, match="does not forget"):
        badexpert.forgetful(MODEL, CLEAN.fit, badexpert.BaDExpertConfig(lr=1e-7, rounds=1), RUN)


def test_gram_matrices_by_hand() -> None:
    values = torch.tensor([[2.0, -3.0]])
    assert torch.allclose(beatrix.gram(values, 1), torch.tensor([[4.0, -6.0, 9.0]]))
    assert torch.allclose(beatrix.gram(values, 2), torch.tensor([[4.0, 6.0, 9.0]]))
    cfg = beatrix.BeatrixConfig(orders=1, deviations=1.0)
    spread = torch.tensor([[1.0], [2.0], [3.0]])  # products 1, 4, 9: the median is 4, deviations 3, 0, 5
    middle, width = beatrix._range(spread, cfg)
    assert middle.tolist() == [[4.0]] and width.tolist() == [[3.0]]
    outside = beatrix._deviation(torch.tensor([[2.0], [4.0]]), middle.double(), width.double(), cfg)
    assert outside.tolist() == pytest.approx([0.0, (16 - 4 - 3) / 6])


def test_gradients_are_those_of_the_labels_logit() -> None:
    images = tiny_data(8, seed=2)
    directions = agpd.gradients(MODEL, images, RUN)
    assert len(directions) == 4  # of the convolutions; that of the head is the label itself
    x, conv = images.pixels[3:4] / 255, MODEL.network.get_submodule("conv4")
    kept: list[Tensor] = []
    handle = conv.register_forward_hook(lambda m, inputs, out: kept.append(out))
    logit = MODEL(x)[0, int(images.truth[3])]
    handle.remove()
    (slope,) = torch.autograd.grad(logit, kept)
    wanted = slope.flatten(2).mean(2)[0]
    assert torch.allclose(directions[-1][3], wanted / wanted.norm(), atol=1e-5)
    assert all(p.requires_grad for p in MODEL.parameters())


def test_two_ends_of_a_class_by_hand() -> None:
    along, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    own = torch.stack([along] * 9 + [across])
    scores, held, gap = agpd._scored(own, along[None], along[None], agpd.AGPDConfig())
    assert scores.tolist() == [0.0] * 9 + [1.0] and held.tolist() == [0.0] and float(gap) == 1.0
    _, _, none = agpd._scored(own[:9], along[None], along[None], agpd.AGPDConfig())
    assert float(none) == pytest.approx(0)


# ---------------------------------------------------------------------------------------------------
# A real backdoor, both ways


@cache
def digits() -> tuple[DataSet, Images, CleanData]:
    """The data, what is judged on, and the defender's images."""
    from unbackdoor.data.datasets import load_dataset
    from unbackdoor.data.splits import draw_clean, reserve

    data = load_dataset("digits")
    test, own = reserve(data.test, fraction=0.4)
    return data, draw_clean(test, count=min(200, len(test)), seed=0), CleanData.split(own)


@cache
def victim() -> tuple[Classifier, AttackTruth]:
    data, _, _ = digits()
    spec = VictimSpec("digits", "small_cnn[width=32]", Recipe(epochs=12), attack="badnets", seed=0)
    return train_victim(spec, data, Run.create(seed=0, policy="fp32"))


def separation(name: str) -> float:
    """Return the AUROC of a screener between triggered and clean images."""
    model, truth = victim()
    _, test, clean = digits()

    def scores(images: Images) -> Tensor:
        return screen(name, model, clean, images, seed=0, precision="fp32").scores

    return judge_screening(scores, truth, test, most=60, labelled=name == "agpd").all.auroc


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INPUT, "agpd"])
def test_triggered_digits_are_told_from_clean_ones(name: str) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    model, truth = victim()
    _, test, _ = digits()
    assert float((predict(model, test, RUN).argmax(1) == test.truth).float().mean()) > 0.9
    assert separation(name) > 0.8
    # The same bar fails a score that says nothing, and one that points the wrong way.
    constant = judge_screening(lambda images: torch.zeros(len(images)), truth, test, most=60)
    assert constant.all.auroc == 0.5
