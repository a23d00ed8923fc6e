"""Choices that see the truth are marked as such; trained victims travel between stores unchanged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from small_suite import TEXT, fake_data, written
from tiny import tiny_classifier, tiny_data
from unbackdoor.attacks import poison
from unbackdoor.bench import work
from unbackdoor.bench.cells import Planned, address, plan
from unbackdoor.bench.code_version import is_current
from unbackdoor.bench.driver import Agenda
from unbackdoor.bench.exchange import export_victims, import_victims, with_pinned
from unbackdoor.bench.results import rows_of
from unbackdoor.bench.store import Store, artefact_folder
from unbackdoor.bench.suites import SHIPPED, load_suite
from unbackdoor.bench.victims import save_victim
from unbackdoor.errors import ConfigError, InputError, IntegrityError, UnbackdoorError
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.types import Images

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
    drawn = {"dataset": "digits", "data_sha256": [], "augmentation": "none", "clean_images": 4, "seed": 0}
    sample = tmp_path / "samples" / f"{address(work.sample_spec(drawn))}.safetensors"
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
        (folder,) = export_victims(store, "try-v1", tmp_path / "victims")
    assert folder.name == f"badnets-0.1-seed0-{victim.key[:8]}"
    return folder


def test_a_victim_travels(given: Path, tmp_path: Path) -> None:
    cells = plan(load_suite(written(tmp_path)), fake_data())
    with Store(tmp_path / "two") as store:
        (key,) = import_victims(store, given.parent)
        assert import_victims(store, given.parent) == []  # nothing new
        store.register("try-v1", "x", "", [cell.entry() for cell in cells])
        assert store.counts("try-v1")["done"] == 1
        cell = store.get(key)
        assert cell is not None
        assert cell.result == {"scores": counts(90, 100)}
        model = load_model(store.artefact(key) / "model.safetensors")
    assert model.sha256() == tiny_classifier("conv-bn").sha256()


def test_an_own_result_is_not_replaced(given: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "one") as store:
        assert import_victims(store, given.parent) == []


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
            import_victims(store, source)
        assert isinstance(caught.value, UnbackdoorError)
        assert not list((tmp_path / "two" / "artefacts").glob("*/*"))
        assert not list((tmp_path / "two" / "work").glob("*"))


COMMITTED = Path(__file__).parents[2] / "victims" / "cifar10-small-v1"


def older(cells: list[Planned]) -> list[Planned]:
    """Return the victims of a plan as they were addressed before there were versions of all code."""
    out = []
    for cell in cells:
        if cell.kind == "victim":
            left = {k: v for k, v in cell.spec.items() if k not in ("code", "augmentation", "normalisation")}
            spec = {**left, "epoch": 1, "attack_code": "5c3a447fba22d2a9"}
            out.append(replace(cell, key=address(spec), spec=spec))
    return out


@pytest.mark.parametrize("before", ["older form", "other code", "present code"])
def test_a_victim_that_was_taken_over_is_used_whatever_code_trained_it(tmp_path: Path, before: str) -> None:
    cells = plan(load_suite(written(tmp_path)), fake_data())
    victims = [cell for cell in cells if cell.kind == "victim"]
    given = older(cells) if before == "older form" else victims
    if before == "other code":
        specs = [{**cell.spec, "code": "0" * 16} for cell in victims]
        given = [Planned(address(spec), "victim", spec, None, {}) for spec in specs]
    with Store(tmp_path / "store") as store:
        assert with_pinned(store, cells) == cells
        assert store.adopt(given[0].key, given[0].spec, {"scores": counts(90, 100)}, sha256="a" * 64)
        planned = with_pinned(store, cells)
        assert [cell.labels for cell in planned] == [cell.labels for cell in cells]
        assert all(address(cell.spec) == cell.key for cell in planned)
        assert planned[0].key == given[0].key
        looks = [cell for cell in planned if cell.parent == given[0].key]
        assert looks
        assert {cell.spec["victim"] for cell in looks} == {given[0].key}
        assert [cell for cell in planned if cell.parent != given[0].key][1:] == [
            cell for cell in cells if cell.parent != victims[0].key
        ][1:]  # the other victim and its repairs are as they were
        store.register("try-v1", "x", "", [cell.entry() for cell in planned])
        assert store.counts("try-v1")["done"] == 1
        store.claim(looks[0].key)
        store.finish(looks[0].key, {"scores": counts(90, 3), "seconds": 1.0, "commit": "c"}, seconds=1.0)
        (row,) = rows_of(store, "try-v1")
    assert row.code == looks[0].spec["code"]
    spec = given[0].spec
    assert row.victim_code == f"imported {spec.get('code', spec.get('attack_code'))}"
    assert is_current(row)


def test_a_victim_of_another_experiment_does_not_stand_in(tmp_path: Path) -> None:
    cells = plan(load_suite(written(tmp_path)), fake_data())
    changes: list[dict[str, Any]] = [
        {"seed": 7}, {"torch": "1.0"}, {"data_sha256": ["0", "1"]}, {"normalisation": [[0.5], [0.5]]},
        {"options": {"poison_rate": 0.2}}, {"options": {"another": 1}}, {"recipe": {"epochs": 2}},
        {"more": 1},
    ]  # fmt: skip
    with Store(tmp_path / "store") as store:
        for change in changes:
            spec = {**cells[0].spec, "code": "0" * 16, **change}
            assert store.adopt(address(spec), spec, {"scores": counts(90, 100)}, sha256="a" * 64)
        thin = {"kind": "victim", "attack": "badnets"}
        assert store.adopt(address(thin), thin, {"scores": counts(90, 100)}, sha256="a" * 64)
        assert with_pinned(store, cells) == cells


def test_a_victim_from_before_an_option_was_there_stands_in_for_its_default(tmp_path: Path) -> None:
    cells = plan(load_suite(written(tmp_path)), fake_data())
    spec = {**cells[0].spec, "code": "0" * 16}
    spec["recipe"] = {k: v for k, v in spec["recipe"].items() if k not in ("lookahead", "base")}
    spec["options"] = {k: v for k, v in spec["options"].items() if k != "margin"}
    with Store(tmp_path / "store") as store:
        assert store.adopt(address(spec), spec, {"scores": counts(90, 100)}, sha256="a" * 64)
        assert with_pinned(store, cells)[0].key == address(spec)


def test_an_own_victim_of_the_present_code_goes_before_one_that_was_taken_over(tmp_path: Path) -> None:
    cells = plan(load_suite(written(tmp_path)), fake_data())
    with Store(tmp_path / "store") as store:
        store.register("try-v1", "x", "", [cell.entry() for cell in cells])
        store.claim(cells[0].key)
        store.finish(cells[0].key, {"scores": counts(90, 100)}, seconds=1.0)
        old = older(cells)[0]
        store.adopt(old.key, old.spec, {"scores": counts(90, 100)}, sha256="a" * 64)
        assert with_pinned(store, cells) == cells


def test_what_older_code_measured_stays_and_is_of_no_new_plan(tmp_path: Path) -> None:
    cells = plan(load_suite(written(tmp_path)), fake_data())
    old = older(cells)
    with Store(tmp_path / "store") as store:
        store.register("try-v1", "x", "", [cell.entry() for cell in old])
        store.claim(old[0].key)  # trained here: its code is of another time, and nobody pinned it
        store.finish(old[0].key, {"scores": counts(90, 100)}, seconds=1.0)
        planned = with_pinned(store, cells)
        assert planned == cells
        store.register("try-v1", "x", "", [cell.entry() for cell in planned])
        assert store.counts("try-v1")["done"] == 0
        kept = store.get(old[0].key)
        assert kept is not None
        assert kept.result == {"scores": counts(90, 100)}


def test_a_victim_taken_over_before_there_were_pins_is_pinned_by_another_import(
    given: Path, tmp_path: Path
) -> None:
    with Store(tmp_path / "two") as store:
        (key,) = import_victims(store, given.parent)
        store._db.execute("DELETE FROM pinned")
        assert import_victims(store, given.parent) == []
        assert list(store.pinned()) == [key]
        store.collect_garbage()
        assert store.artefact(key).exists()
    with Store(tmp_path / "one") as store:  # it trained the victim itself
        import_victims(store, given.parent)
        assert not store.pinned()


def test_the_committed_victims_are_whole_and_those_of_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path) as store:
        keys = import_victims(store, COMMITTED)
        assert len(keys) == len(list(COMMITTED.glob("*/cell.json"))) >= 6
        suite = load_suite(SHIPPED / "cifar10-small-v1.toml")
        spec = next(iter(store.pinned().values()))
        # CIFAR-10 is not here; images that are quickly made pass for it.
        hashes = dict(zip((12000, 40), spec["data_sha256"], strict=True))
        monkeypatch.setattr(Images, "fingerprint", lambda images: hashes[len(images)])
        monkeypatch.setattr("torch.__version__", f"{spec['torch']}.0")
        cells = plan(suite, {"cifar10": fake_data(3000)["digits"]})
        planned = with_pinned(store, cells)
        assert {cell.key for cell in planned if cell.kind == "victim"} == set(keys)
        store.register(suite.label, suite.sha256(), "", [cell.entry() for cell in planned])
        assert store.counts(suite.label)["done"] == len(keys)
        assert Agenda(store, suite.label).left == len(planned) - len(keys)
