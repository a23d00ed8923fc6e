"""Clean unlearning stops in its band, and takes back what goes too far."""

from __future__ import annotations

import pytest
import torch

from tiny import tiny_classifier, tiny_data
from unbackdoor.engine import unlearning
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.unlearning import unlearn
from unbackdoor.errors import MethodFailed
from unbackdoor.networks import build

DATA = tiny_data(80, seed=1)
RUN = Run.create(seed=0, policy="fp32")


@pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
@pytest.mark.parametrize("lr", [0.001, 0.01, 1.0])
def test_it_ends_in_the_band_from_any_first_step_size(lr: float, batch_norm: str) -> None:
    model = tiny_classifier("conv-bn")
    weights = model.sha256()
    out = unlearn(model, DATA, RUN, lr=lr, batch_size=32, batch_norm=batch_norm)  # type: ignore[arg-type]
    assert model.sha256() == weights
    assert 0.125 <= out.accuracy <= 0.35
    assert out.accuracy == accuracy(out.model, DATA, RUN)
    falls = [a[1] - b[1] for a, b in zip(out.trace, out.trace[1:], strict=False)]
    assert max(falls) <= 0.15 + 1e-9
    assert not out.model.training


def test_the_gradient_is_clipped_after_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    real = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):  # type: ignore[no-untyped-def]
        parameters = list(parameters)
        before = real(parameters, limit)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        norms.append(float(after))
        assert float(before) > 0
        return before

    monkeypatch.setattr(unlearning.torch.nn.utils, "clip_grad_norm_", spy)
    unlearn(tiny_classifier("conv-bn"), DATA, RUN, lr=0.05, batch_size=32, clip=0.01)
    assert norms
    assert max(norms) <= 0.01 * 1.001


def test_frozen_statistics_stay() -> None:
    model = tiny_classifier("conv-bn")
    out = unlearn(model, DATA, RUN, lr=0.01, batch_size=32, batch_norm="frozen").model
    for name, value in model.named_buffers():
        assert torch.equal(value, out.get_buffer(name))


def test_a_model_that_knows_nothing_is_refused() -> None:
    model = build("small_cnn[width=8]", input_shape=(1, 8, 8), class_names=DATA.class_names, seed=5)
    with pytest.raises(MethodFailed, match="nothing to unlearn"):
        unlearn(model, DATA, RUN, lr=0.01, batch_size=32)


def test_giving_up_is_said_with_the_facts() -> None:
    with pytest.raises(MethodFailed, match="after 1 steps"):
        unlearn(tiny_classifier("conv-bn"), DATA, RUN, lr=1e-6, batch_size=32, max_steps=1)
