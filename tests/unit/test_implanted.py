"""Backdoors put into a network that knew its task: one clean base serves many victims."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import tiny_data
from unbackdoor.bench import victims
from unbackdoor.bench.victims import VictimSpec, train_victim
from unbackdoor.data.datasets import DataSet
from unbackdoor.engine import training
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import RECIPES, Recipe
from unbackdoor.errors import ConfigError

DATA = DataSet("tiny", tiny_data(160), tiny_data(40, seed=1), "none", (), ())
QUICK = {"batch_size": 32, "reflect": 1}


@pytest.fixture(autouse=True)
def quick_base(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = RECIPES["fast"].model_copy(update={**QUICK, "epochs": 3})
    monkeypatch.setattr(training, "RECIPES", {**RECIPES, "quick": fast, "twice": Recipe(base="quick")})


def spec(attack: str, base: str = "quick") -> VictimSpec:
    recipe = RECIPES["implanted"].model_copy(update={**QUICK, "epochs": 1, "base": base})
    return VictimSpec("tiny", "airbench[width=4]", recipe, attack=attack, seed=3)


def test_the_base_is_trained_once_and_stays_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = []

    def counted(*args, label: str, **more):  # type: ignore[no-untyped-def]
        labels.append(label)
        return training.train(*args, label=label, **more)

    monkeypatch.setattr(victims, "train", counted)
    run = Run.create(seed=3, policy="fp32")
    badnets, _ = train_victim(spec("badnets"), DATA, run, bases=tmp_path)
    blended, _ = train_victim(spec("blended"), DATA, run, bases=tmp_path)
    assert labels == ["clean network", "training", "training"]
    assert badnets.sha256() != blended.sha256()
    assert len(list(tmp_path.iterdir())) == 1
    again, _ = train_victim(spec("badnets"), DATA, run)
    assert again.sha256() == badnets.sha256()


def test_a_clean_victim_of_the_same_recipe_is_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(victims, "RECIPES", training.RECIPES | {"on quick": spec("badnets").recipe})
    run = Run.create(seed=3, policy="fp32")
    clean = VictimSpec("tiny", "airbench[width=4]", training.RECIPES["quick"], attack="none", seed=3)
    alone, _ = train_victim(clean, DATA, run)
    first, _ = train_victim(clean, DATA, run, bases=tmp_path)
    (base,) = tmp_path.iterdir()
    written = base.stat().st_mtime_ns
    train_victim(spec("badnets"), DATA, run, bases=tmp_path)
    again, _ = train_victim(clean, DATA, run, bases=tmp_path)
    assert alone.sha256() == first.sha256() == again.sha256()
    assert [file.stat().st_mtime_ns for file in tmp_path.iterdir()] == [written]


def test_a_base_is_of_its_own_seed_and_images(tmp_path: Path) -> None:
    train_victim(spec("badnets"), DATA, Run.create(seed=3, policy="fp32"), bases=tmp_path)
    train_victim(spec("badnets"), DATA, Run.create(seed=4, policy="fp32"), bases=tmp_path)
    other = DataSet("tiny", tiny_data(160, seed=7), DATA.test, "none", (), ())
    train_victim(spec("badnets"), other, Run.create(seed=3, policy="fp32"), bases=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_base_on_a_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="base of its own"):
        train_victim(spec("badnets", base="twice"), DATA, Run.create(seed=3, policy="fp32"))
