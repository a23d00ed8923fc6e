"""The trainer: what it computes, how it resumes, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tiny import ARCHITECTURES, NAMES, tiny_data
from unbackdoor.engine.precision import has_native_bf16, resolve
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import RECIPES, Recipe, _rate, _steps, recipe_named, train
from unbackdoor.errors import ConfigError, InputError, IntegrityError, MethodFailed
from unbackdoor.networks import build
from unbackdoor.types import Classifier, Images, T

DATA = tiny_data(64)
SHORT = Recipe(epochs=4, batch_size=16, lr=0.05, augmentation="crop")


def fresh(seed: int = 0, kind: str = "conv-bn") -> Classifier:
    return build(ARCHITECTURES[kind], input_shape=(1, 8, 8), class_names=NAMES, seed=seed)


class Killed(BaseException):
    """Stands for a kill: not an Exception, so nothing may catch it."""


def killer(after: int):  # type: ignore[no-untyped-def]
    def show(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        for done, item in enumerate(items):
            if done == after:
                raise Killed
            yield item

    return show


def test_the_default_is_what_the_field_uses() -> None:
    plain = RECIPES["plain"]
    assert (plain.optimizer, plain.momentum, plain.weight_decay) == ("sgd", 0.9, 5e-4)
    assert plain.label_smoothing == plain.mixup == 0


def test_one_step_equals_plain_sgd_by_hand() -> None:
    model, twin = fresh(), fresh()
    recipe = Recipe(epochs=1, batch_size=64, lr=0.1, schedule="constant", momentum=0, weight_decay=0)
    train(model, DATA, recipe, Run.create(policy="fp32"))
    twin.train()
    torch.nn.functional.cross_entropy(twin(DATA.pixels.float() / 255), DATA.truth).backward()
    for got, start in zip(model.parameters(), twin.parameters(), strict=True):
        assert start.grad is not None
        assert torch.allclose(got, start - 0.1 * start.grad, atol=1e-5)


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = fresh()
    train(whole, DATA, SHORT, Run.create(seed=3, policy="fp32"))
    file = tmp_path / "checkpoint"
    killed = fresh()
    with pytest.raises(Killed):
        train(killed, DATA, SHORT, Run.create(seed=3, policy="fp32", progress=killer(10)), checkpoint=file)
    assert file.exists()
    resumed = fresh()
    told = train(resumed, DATA, SHORT, Run.create(seed=3, policy="fp32"), checkpoint=file)
    assert told.resumed_from == 2
    assert len(told.losses) == 4
    assert resumed.sha256() == whole.sha256()
    assert not file.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train(fresh(), DATA, SHORT, Run.create(seed=3, progress=killer(10)), checkpoint=file)
    with pytest.raises(IntegrityError, match="another training run"):
        train(fresh(), DATA, SHORT, Run.create(seed=4), checkpoint=file)


@pytest.mark.parametrize(
    "changes", [{}, {"mixup": 0.4}, {"label_smoothing": 0.1}, {"optimizer": "adamw", "lr": 0.003}]
)
def test_every_variant_is_deterministic_and_learns(changes: dict[str, float]) -> None:
    recipe = Recipe(**{**SHORT.model_dump(), "epochs": 8, **changes})
    shas = set()
    for _ in range(2):
        model = fresh()
        told = train(model, DATA, recipe, Run.create(seed=1))
        shas.add(model.sha256())
    assert len(shas) == 1
    assert told.losses[-1] < told.losses[0]
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_divergence_is_said() -> None:
    model = fresh(kind="conv")
    with torch.no_grad():
        next(model.parameters()).mul_(1e30)
    with pytest.raises(MethodFailed, match="training diverged"):
        train(model, DATA, SHORT, Run.create(policy="fp32"))


def test_labels_are_needed() -> None:
    bare = Images(DATA.pixels, None, DATA.class_names)
    with pytest.raises(InputError, match="labels are needed"):
        train(fresh(), bare, SHORT, Run.create())


def test_a_last_batch_of_one_image_is_left_out() -> None:
    assert [_steps(n, 16) for n in (1, 16, 17, 18, 33)] == [1, 1, 1, 2, 2]
    train(fresh(), tiny_data(33), Recipe(epochs=1, batch_size=16), Run.create())


def test_schedules_by_hand() -> None:
    one_cycle = Recipe(warmup=0.25)
    assert _rate(one_cycle, 0.25) == 1
    assert _rate(one_cycle, 0.125) == 0.5
    assert _rate(one_cycle, 0.625) == pytest.approx(0.5)
    assert _rate(Recipe(schedule="constant"), 0.9) == 1
    assert _rate(Recipe(schedule="cosine"), 0.5) == pytest.approx(0.5)
    assert _rate(Recipe(schedule="cosine"), 0.0) == 1


def test_recipes_by_name() -> None:
    assert recipe_named("plain", epochs=3).epochs == 3
    with pytest.raises(ConfigError, match="did you mean 'plain'"):
        recipe_named("plane")
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        recipe_named("plain", epoch=3)


def test_precision_follows_the_processor() -> None:
    cpu = torch.device("cpu")
    assert resolve("fp32", cpu).name == "fp32"
    assert resolve("bf16", cpu).name == "bf16"
    auto = resolve("auto", cpu)
    assert auto.name == ("bf16" if has_native_bf16(cpu) else "fp32")
    assert auto.reason
    for policy in ("fp32", "bf16"):
        model = fresh()
        told = train(model, DATA, SHORT, Run.create(policy=policy))
        assert math.isfinite(told.losses[-1])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
