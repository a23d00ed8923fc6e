"""Fine-tuning at a learning rate that the network bears."""

from __future__ import annotations

import pytest
import torch

from tiny import tiny_classifier, tiny_data
from unbackdoor.engine import fine_tuning
from unbackdoor.engine.fine_tuning import TRIES, fine_tune
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, Trained, train
from unbackdoor.engine.trusted_caller import run as call
from unbackdoor.errors import MethodFailed
from unbackdoor.types import Classifier, CleanData

RUN = Run.create(policy="fp32")
IMAGES = tiny_data(80, seed=1)


@pytest.mark.parametrize("method", ["ft", "fp"])
def test_a_transformer_survives_the_rates_of_the_papers(method: str) -> None:
    model = tiny_classifier("transformer")
    out = call(method, model, CleanData.split(IMAGES), options={"epochs": 20}, precision="fp32")
    assert accuracy(out.model, IMAGES, RUN) > 0.85
    assert out.evidence["lr"] < 0.01, "at the rate of the paper this network falls to chance"


def test_a_rate_that_is_borne_gives_the_weights_of_plain_training() -> None:
    recipe = Recipe(epochs=2, lr=0.01, batch_size=32, schedule="cosine")
    model = tiny_classifier("conv-bn")
    weights = model.sha256()
    tuned = fine_tune(model, IMAGES, recipe, RUN)
    assert model.sha256() == weights
    plain = train(model, IMAGES, recipe, RUN)
    assert tuned.model.sha256() == model.sha256() != weights
    assert (tuned.lr, tuned.losses) == (0.01, plain.losses)


def test_a_rate_at_which_it_diverges_is_lowered() -> None:
    recipe = Recipe(epochs=4, lr=10, batch_size=32, schedule="constant")
    tuned = fine_tune(tiny_classifier("conv"), IMAGES, recipe, RUN)
    assert tuned.lr < 10
    assert accuracy(tuned.model, IMAGES, RUN) > 0.85


@pytest.mark.parametrize("diverges", [True, False])
def test_where_no_rate_is_borne_it_fails(diverges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def ruin(model: Classifier, images: object, recipe: Recipe, run: Run, **_: object) -> Trained:
        rates.append(recipe.lr)
        if diverges:
            raise MethodFailed("training diverged")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return Trained((1.0,), 1)

    monkeypatch.setattr(fine_tuning, "train", ruin)
    with pytest.raises(MethodFailed, match="at every learning rate"):
        fine_tune(tiny_classifier("conv"), IMAGES, Recipe(lr=1), RUN)
    assert rates == pytest.approx([10.0**-k for k in range(TRIES)])


def test_unlearning_a_trigger_excuses_no_destroyed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares with the same training without the trigger, which a rate too high destroys as well."""

    def ruin(model: Classifier, *_: object, **__: object) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()

    monkeypatch.setattr("unbackdoor.defenses.neural_cleanse.train", ruin)
    model = tiny_classifier("conv-bn")
    options = {"steps": 40, "images": 8, "rounds": 2, "epochs": 1}
    out = call("neural_cleanse", model, CleanData.split(IMAGES), options=options, precision="fp32")
    assert out.model.sha256() == model.sha256()
    assert [step["held_out"] for step in out.evidence["rounds"][0]["trace"]] == [0.25] * 5
