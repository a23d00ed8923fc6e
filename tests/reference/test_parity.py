"""One or two steps of each method as the authors' released code takes them, on stored tensors.

What is stored was made by the scripts beside this file, which name the code and the commit: RNP, AWM and IMS
with the authors' functions, TAC from the paper's formulas, because no code of it is public. Tolerances are of
fp32 sums in another order; Adam divides by the size of the gradient, so that where a gradient is hardly more
than rounding the last digits of a mask differ by more than those of the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_net import FOLDER, LARGEST, NAMES, classifier, part, stored
from unbackdoor.defenses.awm import method as awm
from unbackdoor.defenses.awm.weight_masks import WeightMasks, maskable_weights
from unbackdoor.defenses.ims.gates import gate_sites
from unbackdoor.defenses.ims.invertible_gates import InvertibleGates
from unbackdoor.defenses.ims.method import REFERENCE, AlternatingOptimisation, IMSConfig
from unbackdoor.defenses.ims.prediction_overlap import agree, disagree
from unbackdoor.engine.inference import frozen
from unbackdoor.engine.latent_shift import latent_shifts, shifted_loss
from unbackdoor.engine.mask_relearning import recover
from unbackdoor.engine.masks import channel_sites, fold, keep_above
from unbackdoor.engine.run import Run
from unbackdoor.engine.unlearning import unlearn
from unbackdoor.errors import MethodFailed
from unbackdoor.registry import DEFENSES
from unbackdoor.types import Classifier, CleanData, Images

RUN = Run.create(seed=0, policy="fp32")


def same(ours: Tensor, theirs: Tensor, *, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=rtol, atol=atol)


def opened(name: str) -> tuple[dict[str, Tensor], Images, Classifier]:
    tensors = stored(name)
    images = Images(tensors["pixels"], tensors["labels"], NAMES, name)
    return tensors, images, classifier(part(tensors, "net"), images.pixels.shape[-1])


@pytest.mark.parametrize("name", ["awm", "ims", "rnp", "tac"])
def test_what_is_stored_is_small_and_its_script_is_there(name: str) -> None:
    assert (FOLDER / f"{name}.safetensors").stat().st_size < LARGEST
    text = (FOLDER / f"make_{name}.py").read_text(encoding="utf-8")
    assert "at commit" in text or "NOT with a program of its authors" in text


# ---------------------------------------------------------------------------------------------------
# AWM


def test_awm_searches_and_masks_as_the_released_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, images, model = opened("awm")
    cfg = DEFENSES["awm"].configure(preset="reference")
    monkeypatch.setattr(awm, "step_rows", lambda *_: list(tensors["steps"]))
    sites = maskable_weights(model, linear=False)
    masks = WeightMasks(model, sites, lr=cfg.lr, eps=cfg.adam_eps, sparsity=cfg.sparsity)
    draws = torch.Generator()
    for number in (1, 2):
        delta, _ = awm.attack(masks.network, images, 30.0, cfg, RUN, draws)  # the ball that was stored with
        same(delta.values, tensors[f"delta{number}"], atol=1e-5 * number)
        awm.mask(masks, images, delta, cfg, RUN, draws)
        for site, value in zip(sites, masks.values, strict=True):
            name = site.name.removeprefix("network.")
            theirs = tensors[f"masks{number}/{name}.mask"]
            assert float(theirs.min()) < 1 - 0.02 * number  # 3 steps of 0.01 each round
            same(value, theirs, atol=1e-4)


# ---------------------------------------------------------------------------------------------------
# RNP


def test_rnp_unlearns_as_the_released_code_does() -> None:
    tensors, images, model = opened("rnp")
    cfg = DEFENSES["rnp"].configure(preset="reference")
    passed: list[dict[str, Tensor]] = []

    def watch(network: Classifier, _: float) -> None:
        passed.append({name: value.clone() for name, value in network.network.state_dict().items()})

    with pytest.raises(MethodFailed, match="after 2 steps and 0 restarts"):  # far from the band, as meant
        unlearn(
            model, images, RUN, lr=cfg.unlearn_lr, batch_size=cfg.batch_size, momentum=cfg.momentum,
            weight_decay=cfg.weight_decay, clip=cfg.clip, max_drop=cfg.max_drop, max_steps=2,
            batch_norm=cfg.batch_norm, watch=watch,
        )  # fmt: skip
    assert len(passed) == 2
    for number, state in enumerate(passed, start=1):
        theirs = part(tensors, f"unlearned{number}")
        moved = [n for n, v in theirs.items() if not torch.equal(v, part(tensors, "net")[n])]
        assert {"conv1.weight", "norm1.running_mean", "fc.bias"} <= set(moved)
        for name, value in theirs.items():
            same(state[name], value, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_rnp_recovers_as_the_released_code_does(steps: int) -> None:
    tensors, images, _ = opened("rnp")
    forgotten = classifier(part(tensors, "unlearned"), 8)
    cfg = DEFENSES["rnp"].configure(preset="reference")
    before = forgotten.sha256()
    for averaged in (False, True):
        scores, _ = recover(
            forgotten, channel_sites(forgotten), CleanData(images, images), RUN, lr=cfg.recover_lr,
            epochs=steps, batch_size=cfg.batch_size, momentum=cfg.momentum, averaged=averaged,
            batch_norm=cfg.batch_norm,
        )  # fmt: skip
        for name in ("norm1", "norm2"):
            told = torch.stack([tensors[f"masks{i}/{name}"] for i in range(1, steps + 1)])
            assert float(told[-1].min()) < 1
            same(scores[f"network.{name}"], told.mean(0) if averaged else told[-1], atol=1e-5)
    assert forgotten.sha256() == before  # weights and stored statistics


def test_rnp_prunes_as_the_released_code_does() -> None:
    tensors, _, model = opened("rnp")
    masks = {f"network.{name}": mask for name, mask in part(tensors, "masks10").items()}
    cut = keep_above(masks, float(tensors["threshold"]))
    ours = fold(model, channel_sites(model), cut).network.state_dict()
    theirs = part(tensors, "pruned")
    assert sum(int((theirs[f"{name}.weight"] == 0).sum()) for name in ("norm1", "norm2")) == 5
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# ---------------------------------------------------------------------------------------------------
# IMS


def game(model: Classifier, images: Images) -> AlternatingOptimisation:
    """The game of the reference preset, with the five steps and the mask step of what is stored."""
    return AlternatingOptimisation(
        model, images, IMSConfig(**{**REFERENCE, "steps": 5, "budget": 0.005, "lr": 0.1}), RUN
    )


def test_ims_losses_are_those_of_the_released_code() -> None:
    tensors, _, _ = opened("ims")
    p, q = (part(tensors, "logits")[name].log_softmax(1) for name in "pq")
    # Theirs add 1e-8 inside the logarithm.
    same(agree(p, q), tensors["agree"], atol=1e-6)
    same(disagree(p, q), tensors["disagree"], atol=1e-6)


@pytest.mark.parametrize("place", ["first1", "second3", "third2"])
def test_ims_gates_are_those_of_the_released_code(place: str) -> None:
    tensors, _, model = opened("ims")
    theirs = part(tensors, place)
    gates = InvertibleGates(model, gate_sites(model, position="conv"), 20.0)
    with torch.no_grad():
        gates.a.copy_(theirs["a"])
        gates.s.copy_(theirs["s"])
    same(gates.values(), theirs["gates"], atol=1e-6)
    same(gates.values(inverse=True), theirs["inverse"], atol=1e-6)
    same(theirs["gates"] + theirs["inverse"], 1 + theirs["s"], atol=1e-6)


def test_ims_perturbs_as_the_released_code_does() -> None:
    tensors, images, model = opened("ims")
    with frozen(model):
        play = game(model, images)
        for before, place in (("first4", "second1"), ("second2", "second3"), ("third1", "third2")):
            with torch.no_grad():
                play.gates.a.copy_(tensors[f"{before}/a"])
                play.gates.s.copy_(tensors[f"{before}/s"])
            rows = torch.arange(len(images))
            delta = play.perturb(rows, images.pixels.float() / 255, play.base)
            theirs = tensors[f"{place}/delta"]
            assert float(theirs.abs().max()) == pytest.approx(0.005, rel=0.01)  # its hidden budget
            # A pixel whose gradient is rounding only may go either way; the rest agree to 1 % of the budget.
            assert float(((delta - theirs).abs() < 5e-5).float().mean()) > 0.99


def test_ims_plays_its_stages_as_the_released_code_does() -> None:
    tensors, images, model = opened("ims")
    with frozen(model):
        play = game(model, images)
        for label, rounds, sparsity in (("first", 4, 10.0), ("second", 3, 0.0), ("third", 2, 10.0)):
            told = play.stage(label, rounds, sparsity, perturbed=label != "first")
            theirs = part(tensors, f"{label}{rounds}")
            same(play.gates.s, theirs["s"], atol=2e-4)
            same(play.gates.a, theirs["a"], atol=2e-4)
            for where, number in (("first", 1), ("last", rounds)):
                total = told[where][0]["total"]
                assert total == pytest.approx(float(tensors[f"{label}{number}/losses"].sum()), abs=1e-3)


# ---------------------------------------------------------------------------------------------------
# TAC, from the formulas


def test_tac_solves_the_program_of_all_images_and_all_classes() -> None:
    pytest.importorskip("scipy", reason="the solver is SciPy's (extra: scan)")
    tensors, images, model = opened("tac")
    found = latent_shifts(model, Images(images.pixels, None, NAMES), RUN)
    assert found.head.name == "network.fc"
    same(found.shifts, tensors["shifts"], atol=1e-4 * float(tensors["shifts"].abs().max()))
    assert int(found.norms.argmin()) == int(tensors["target"])


def test_tac_hardens_down_the_gradient_of_its_loss() -> None:
    tensors, images, model = opened("tac")
    found = latent_shifts(model, images, RUN)
    objective = shifted_loss(found.head, found.shifts, int(tensors["target"]), RUN, beta=1.0, balanced=False)
    loss = objective(model(images.pixels.float() / 255), images.truth, 0)
    same(loss, tensors["loss"], atol=1e-5)
    theirs: Mapping[str, Any] = part(tensors, "gradient")
    ours = torch.autograd.grad(loss, [model.network.get_parameter(name) for name in theirs])
    for value, expected in zip(ours, theirs.values(), strict=True):
        same(value, expected, atol=1e-4 * float(expected.abs().max()) + 1e-7)
