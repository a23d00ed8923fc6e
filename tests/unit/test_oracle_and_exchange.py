"""Choices that see the truth are marked as such; trained victims travel between stores unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from small_suite import TEXT, fake_data, written
from tiny import tiny_classifier, tiny_data
from unbackdoor.attacks import poison
from unbackdoor.bench import work
from unbackdoor.bench.cells import EPOCH, address, code_version, plan
from unbackdoor.bench.exchange import give, take
from unbackdoor.bench.store import Store, artefact_folder
from unbackdoor.bench.suites import SHIPPED, load_suite
from unbackdoor.bench.victims import save_victim
from unbackdoor.errors import ConfigError, InputError, IntegrityError, UnbackdoorError
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.registry import ATTACKS

ORACLE = """
[[defense]]
name = "fp"
selection = "oracle"
choices = [{ epochs = 0 }, { epochs = 1 }, { epochs = 2 }]
"""
TRIES = {0: {"asr": 80, "acc": 90}, 1: {"asr": 10, "acc": 88}, 2: {"asr": 40, "acc": 90}}


def test_an_oracle_and_its_choices_belong_together(tmp_path: Path) -> None:
    for text in (ORACLE.replace("choices", "#"), ORACLE.replace("selection", "#")):
        with pytest.raises(ConfigError, match="belong together"):
            load_suite(written(tmp_path, TEXT + text))
    with pytest.raises(ConfigError, match="epochs"):
        load_suite(written(tmp_path, TEXT + ORACLE.replace("epochs = 2", "epochs = -2")))


def test_an_oracle_is_a_cell_of_its_own(tmp_path: Path) -> None:
    plain = {cell.key for cell in plan(load_suite(written(tmp_path)), fake_data())}
    cells = plan(load_suite(written(tmp_path, TEXT + ORACLE)), fake_data())
    new = [cell for cell in cells if cell.key not in plain]
    assert {cell.labels["selection"] for cell in new} == {"oracle"}
    assert [options["epochs"] for options in new[0].spec["choices"]] == [0, 1, 2]


def counts(acc: int, asr: int) -> dict[str, Any]:
    """Return scores as a judge records them, of 100 images each."""
    values = {"acc": acc, "asr": asr, "ra": 100 - asr}
    return {
        **{name: value / 100 for name, value in values.items()},
        "counts": {name: {"hits": value, "total": 100} for name, value in values.items()},
    }


def test_the_judge_keeps_the_best_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[int] = []

    def step(function: str, task: Any, folder: Path, limits: Any, private: Any) -> Any:
        if function.endswith("judge_step"):
            return {"scores": counts(**TRIES[at[-1]]), "timings": {"judge": 1.0}}
        at.append(task["spec"]["options"]["epochs"])
        for name in ("repaired.safetensors", "repaired.json", "evidence.json"):
            (folder / name).write_text(str(at[-1]), encoding="utf-8")
        return {"seconds": 2.0, "peak_mb": 1.0, "device": "", "flags": []}

    monkeypatch.setattr(work, "call", step)
    monkeypatch.setattr(work.steps, "hand_over", lambda victim, folder: None)
    drawn = {"dataset": "digits", "data_sha256": [], "clean_images": 4, "seed": 0}
    sample = tmp_path / "samples" / f"{address(drawn)}.safetensors"
    sample.parent.mkdir()
    sample.touch()
    choices = [{"epochs": n} for n in (0, 1, 2)]
    job = {
        "key": "a" * 64, "kind": "repair", "work": "w",
        "spec": {
            "victim": "v" * 64, "options": choices[0], "choices": choices, "precision": "fp32",
            "defense": "fp", **drawn,
        },
        "victim": {"scores": counts(acc=91, asr=100)},
        "place": {"store": str(tmp_path), "limits": {}},
    }  # fmt: skip
    answer = work.execute(job)
    assert at == [0, 1, 2]
    assert answer["result"]["options"] == {"epochs": 1}
    assert answer["result"]["scores"]["asr"] == 0.1
    assert answer["result"]["seconds"] == 6.0
    assert answer["result"]["timings"]["judge"] == 3.0
    kept = artefact_folder(tmp_path / "artefacts", "a" * 64)
    assert {f.name: f.read_text(encoding="utf-8") for f in kept.iterdir()} == {
        "repaired.safetensors": "1", "repaired.json": "1", "evidence.json": "1",
    }  # fmt: skip


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with one victim that a store gave away."""
    cells = plan(load_suite(written(tmp_path)), fake_data())
    victim = next(cell for cell in cells if cell.kind == "victim")
    with Store(tmp_path / "one") as store:
        store.register("try-v1", "x", "", [cell.entry() for cell in cells])
        _, truth = poison(tiny_data(160), "badnets", {}, seed=0)
        save_victim(
            tiny_classifier("conv-bn"), truth, store.artefact(victim.key) / "model.safetensors", history=[]
        )
        store.claim(victim.key)
        store.finish(victim.key, {"scores": counts(90, 100)}, seconds=1.0)
        (folder,) = give(store, "try-v1", tmp_path / "victims")
    assert folder.name == f"badnets-0.1-seed0-{victim.key[:8]}"
    return folder


def test_a_victim_travels(given: Path, tmp_path: Path) -> None:
    cells = plan(load_suite(written(tmp_path)), fake_data())
    with Store(tmp_path / "two") as store:
        (key,) = take(store, given.parent)
        assert take(store, given.parent) == []  # nothing new
        store.register("try-v1", "x", "", [cell.entry() for cell in cells])
        assert store.counts("try-v1")["done"] == 1
        cell = store.get(key)
        assert cell is not None
        assert cell.result == {"scores": counts(90, 100)}
        model = load_model(store.artefact(key) / "model.safetensors")
    assert model.sha256() == tiny_classifier("conv-bn").sha256()


def test_an_own_result_is_not_replaced(given: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "one") as store:
        assert take(store, given.parent) == []


@pytest.mark.parametrize("harm", ["weights", "spec", "missing", "no json", "path", "no scores", "empty"])
def test_a_harmed_victim_is_refused(given: Path, tmp_path: Path, harm: str) -> None:
    cell = given / "cell.json"
    told = json.loads(cell.read_text(encoding="utf-8"))
    if harm == "weights":
        data = bytearray((given / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (given / "model.safetensors").write_bytes(data)
    elif harm == "spec":
        told["spec"]["seed"] = 5
    elif harm == "missing":
        (given / "model.json").unlink()
    elif harm == "path":
        told["sha256"]["../../outside"] = "0" * 64
    elif harm == "no scores":
        told["result"] = {}
    text = "no" if harm == "no json" else json.dumps(told)
    cell.write_text(text, encoding="utf-8")
    source = tmp_path / "nowhere" if harm == "empty" else given.parent
    with Store(tmp_path / "two") as store:
        with pytest.raises((InputError, IntegrityError)) as caught:
            take(store, source)
        assert isinstance(caught.value, UnbackdoorError)
        assert not list((tmp_path / "two" / "artefacts").glob("*/*"))
        assert not list((tmp_path / "two" / "work").glob("*"))


COMMITTED = Path(__file__).parents[2] / "victims" / "cifar10-small-v1"


def test_the_committed_victims_are_whole_and_those_of_the_suite(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        keys = take(store, COMMITTED)
        assert len(keys) == len(list(COMMITTED.glob("*/cell.json"))) >= 6
        suite = load_suite(SHIPPED / "cifar10-small-v1.toml")
        attacks = {attack.name for attack in suite.attack}
        for key in keys:
            cell = store.get(key)
            assert cell is not None
            part = ATTACKS[cell.spec["attack"]]
            assert cell.spec["attack"] in attacks
            # What the address depends on and the data sets do not: raise the version of the suite otherwise.
            assert (cell.spec["epoch"], cell.spec["attack_code"]) == (EPOCH, code_version(part))
            assert cell.spec["options"] == part.configure(cell.spec["options"]).model_dump()
