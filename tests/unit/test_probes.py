"""Probes of repairs: networks whose backdoor is hidden, moved or open to other triggers, and clean ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from planted import block_data, planted
from small_suite import TEXT, fake_data, written
from tiny import tiny_classifier, tiny_data
from unbackdoor.attacks import AttackTruth, Trigger, poison
from unbackdoor.bench import probe_rows, steps
from unbackdoor.bench.cells import Planned, plan
from unbackdoor.bench.code_version import is_current, probe_version, repair_version, victim_version
from unbackdoor.bench.judge import judge
from unbackdoor.bench.part_versions import is_current as is_current_in_all_parts
from unbackdoor.bench.part_versions import patch_version
from unbackdoor.bench.patch_probe import _place, patch_trigger
from unbackdoor.bench.probe_rows import NO_CONTROL, NOT_ATTACKED, probe_repairs
from unbackdoor.bench.probes import (
    RELEARN_STEPS,
    ProbeConfig,
    Probed,
    alternative_trigger,
    probe,
    relearning,
    triggered_accuracy,
)
from unbackdoor.bench.rows import ProbeRow, Row, read_probes, write_rows
from unbackdoor.bench.steps import MODEL, REPAIRED
from unbackdoor.bench.store import Store
from unbackdoor.bench.suites import load_suite
from unbackdoor.bench.victims import save_victim
from unbackdoor.cli.app import app
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe, train
from unbackdoor.errors import InputError
from unbackdoor.opening.classifier_files import save_model
from unbackdoor.report.benchmark import bench_report
from unbackdoor.report.benchmark.groups import Rows
from unbackdoor.report.benchmark.probes import probe_section
from unbackdoor.report.markdown import to_markdown
from unbackdoor.types import Classifier

RUN = Run.create(seed=0, policy="fp32")
SMALL = ProbeConfig(poisoned=4, clean=12, batch_size=8, judged=10, search_images=8, search_steps=2)


def black_corner(pixels: Tensor) -> Tensor:
    out = pixels.clone()
    out[:, :, 0, 0] = 0
    return out


def truth_of(stamp: Callable[[Tensor], Tensor], target: int = 3, **more: Any) -> AttackTruth:
    """Return an attack on the images of blocks."""
    return AttackTruth("badnets", {"target": target}, (1, 8, 8), 8, 0, Trigger(stamp=stamp, **more))


# ---------------------------------------------------------------------------------------------------
# The probes, on networks of known behaviour


def test_a_trigger_that_moved_to_another_class_is_seen() -> None:
    """The attacker wants class 3, the repaired network sends the trigger to class 5: ASR is 0."""
    images = block_data(80)
    truth = truth_of(black_corner, target=3)
    assert judge(planted((5,)), truth, images, RUN).asr.value == 0
    # Only images of class 5 are still right, an eighth; the others are all in it.
    assert triggered_accuracy(planted((5,)), truth, images, RUN) == (1 / 8, 7 / 8, 5)
    # A backdoor that works has not moved, and neither has one that is gone.
    assert triggered_accuracy(planted((3,)), truth, images, RUN)[:2] == (1 / 8, 0)
    assert triggered_accuracy(planted(), truth, images, RUN)[:2] == (1, 0)


def test_each_image_of_an_all_to_all_attack_has_a_wanted_class_of_its_own() -> None:
    truth = truth_of(black_corner, mapping="all-to-all")
    pacc, moved, where = triggered_accuracy(planted((5,)), truth, block_data(80), RUN)
    # In class 5 and rightly so: those of class 5. As the attacker wants: those of class 4.
    assert (pacc, moved, where) == (1 / 8, 6 / 8, 5)


@cache
def backdoored() -> tuple[Classifier, AttackTruth]:
    """Return a trained network with a backdoor that works."""
    images, truth = poison(tiny_data(320), "badnets", {"poison_rate": 0.2, "target": 1, "size": 2})
    model = tiny_classifier("conv-bn")
    train(model, images, Recipe(epochs=8, batch_size=32, optimizer="adamw", lr=0.003), RUN)
    assert judge(model, truth, tiny_data(80, seed=1), RUN).asr.value > 0.95
    return model, truth


def hidden() -> Classifier:
    """Return the backdoored network with another bias of the attacker's class: no feature has changed."""
    model, truth = backdoored()
    model = model.copy()
    while judge(model, truth, tiny_data(80, seed=1), RUN).asr.value > 0.05:
        with torch.no_grad():
            model.get_submodule("network.fc").bias[1] -= 0.5
    return model


HANDFUL = ProbeConfig(poisoned=8, clean=56, batch_size=32, judged=60)


def test_a_hidden_backdoor_is_learned_again_sooner_than_a_clean_network_learns_it() -> None:
    truth = backdoored()[1]
    curves = [
        relearning(model, truth, tiny_data(320), tiny_data(80, seed=1), HANDFUL, RUN)
        for model in (backdoored()[0], hidden(), tiny_classifier("conv-bn"))
    ]
    assert [len(curve) for curve in curves] == [1 + max(RELEARN_STEPS)] * 3
    victim, back, clean = (
        next((step for step, asr in enumerate(curve) if asr >= 0.5), 99) for curve in curves
    )
    assert victim == 0 and 0 < back < clean / 2


def watermarked(pixels: Tensor) -> Tensor:
    mark = (torch.arange(64).view(8, 8) * 37 % 5 - 2) * 20  # the watermark of the planted networks, strong
    return (pixels + mark.short()).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("network", "radius", "lowest", "highest"),
    [
        (planted(watermark=2), 20, 0.9, 1),
        (planted(), 20, 0, 0.1),
        (planted(), 200, 0.9, 1),  # no bound, and everything is open
    ],
    ids=["open", "clean", "unbounded"],
)
def test_another_trigger_is_found_where_the_way_is_open(
    network: Classifier, radius: int, lowest: float, highest: float
) -> None:
    truth = truth_of(watermarked, target=2)
    cfg = ProbeConfig(radius=radius, search_images=64, batch_size=32)
    success = alternative_trigger(network, truth, block_data(160), block_data(80, seed=1), cfg, RUN)
    assert lowest <= success <= highest


@pytest.mark.parametrize(
    ("network", "lowest", "highest"),
    [(planted((5,)), 0.9, 1), (planted(), 0, 0.2), (planted((3,)), 0, 0.2)],
    ids=["open", "clean", "another class"],
)
def test_a_patch_is_found_where_the_way_is_open(network: Classifier, lowest: float, highest: float) -> None:
    """A dark corner leads to class 5; no other square in the first block can, which is class 0."""
    cfg = ProbeConfig(search_images=64, batch_size=32, search_steps=20)
    images = block_data(160), block_data(80, seed=1)
    before = network.sha256()
    found, again = (patch_trigger(network, truth_of(black_corner, 5), *images, RUN, config=cfg) for _ in "ab")
    assert found is not None and lowest <= found <= highest
    assert found == again and network.sha256() == before
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_patch_lies_where_the_trigger_changes_most() -> None:
    change = torch.zeros(8, 8)
    change[2, 3], change[5:7, 6:8] = 3, 1
    assert _place(change, 2) == (5, 6)  # four of 1 are more than one of 3
    assert _place(change, 1) == (2, 3) and _place(torch.zeros(8, 8), 8) == (0, 0)
    _, nothing = poison(tiny_data(40), "none")
    assert patch_trigger(tiny_classifier(), nothing, tiny_data(40), tiny_data(40, seed=1), RUN) is None


def test_probes_leave_the_network_as_it_was_and_answer_the_same_again() -> None:
    model, truth = backdoored()
    before = model.sha256()
    first, again = (
        probe(model, truth, tiny_data(80), tiny_data(40, seed=1), RUN, config=SMALL) for _ in "ab"
    )
    assert first is not None and first == again
    assert model.sha256() == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert len(first.relearned) == len(RELEARN_STEPS) and first.steps_to_half == 0


@pytest.mark.parametrize("mapping", ["all-to-all", "several"])
def test_attacks_without_one_target_are_probed_towards_the_class_of_each_image(mapping: Any) -> None:
    choose = (lambda pixels: pixels.flatten(1).long().sum(1) % 8) if mapping == "several" else None
    truth = truth_of(black_corner, mapping=mapping, choose_target=choose)
    found = probe(planted((5,)), truth, block_data(80), block_data(40, seed=1), RUN, config=SMALL)
    assert found is not None and 0 <= found.alternative <= 1


def test_without_an_attack_there_is_nothing_to_ask() -> None:
    _, truth = poison(tiny_data(40), "none")
    assert probe(tiny_classifier(), truth, tiny_data(40), tiny_data(40, seed=1), RUN) is None


# ---------------------------------------------------------------------------------------------------
# The pass over a store


@contextmanager
def made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: Callable[[Planned], bool] = lambda cell: True
) -> Iterator[Store]:
    """Yield a store with the victims of a small suite and some of its repairs, which were never computed."""
    data = fake_data()
    monkeypatch.setattr(steps, "load_dataset", lambda name, root, cache: data[name])
    cells = plan(load_suite(written(folder)), data)
    with Store(folder / "store") as opened:
        opened.register("try-v1", "0", TEXT, [cell.entry() for cell in cells])
        for cell in cells:
            if wanted(cell) and cell.labels.get("defense", "none") == "none":
                finish(opened, cell)
        yield opened


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with two victims and four repairs."""
    with made(tmp_path, monkeypatch) as opened:
        yield opened


def finish(store: Store, cell: Planned) -> None:
    """Leave what a cell leaves; every network is the same one."""
    folder = store.artefact(cell.key)
    folder.mkdir(parents=True)
    attacked = cell.labels["attack"] != "none"
    scores: dict[str, Any] = {"acc": 0.9, "asr": 0.9 if attacked else None, "ra": 0.1 if attacked else None}
    if cell.kind == "victim":
        _, truth = poison(fake_data()["digits"].train, cell.spec["attack"], cell.spec["options"])
        save_victim(tiny_classifier(), truth, folder / MODEL, history=[])
    else:
        save_model(tiny_classifier(), folder / REPAIRED)
    result = {"scores": scores, "der": None, "seconds": 1.0, "commit": "abc", "device": "here", "flags": []}
    assert store.claim(cell.key)
    store.finish(cell.key, result, seconds=1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that take no time."""

    def answer(model: Classifier, truth: AttackTruth, *images: Any, **how: Any) -> Probed | None:
        for _ in images[-1].progress(range(3), "probe"):
            pass
        found = Probed(0.5, 0.25, 1, (0.0,) * len(RELEARN_STEPS), None, 0.125)
        return None if truth.attack == "none" else found

    monkeypatch.setattr(probe_rows, "probe", answer)
    monkeypatch.setattr(probe_rows, "patch_trigger", lambda *images, **how: 0.75)


def timeless(file: Path) -> list[dict[str, Any]]:
    return [row.model_dump(exclude={"seconds"}) for row in read_probes(file)]


def test_the_command_asks_each_repair_its_victim_and_a_clean_network_the_same(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "bench",
        "probe",
        "try-v1",
        "--store",
        str(tmp_path / "store"),
        "--only",
        "badnets/none*ple=0",
        "-q",
    ]
    file = Path("results/try-v1.probes.jsonl")
    for count in (1, 0):
        assert CliRunner().invoke(app, words).output == f"{count} repairs probed: {file}\n"
    (row,) = read_probes(file)
    assert (row.attack, row.defense, row.defender_seed, row.asr) == ("badnets", "none", 0, 0.9)
    assert row.error is None and row.flags == () and row.relearn_steps == RELEARN_STEPS
    assert is_current(row) and row.seconds is not None and row.device and row.commit
    # The three networks are one and the same here.
    assert row.patch is not None and row.patch_code == patch_version()
    for name in (*Probed.__dataclass_fields__, "patch"):
        mine, *others = (getattr(row, name + end) for end in ("", "_before", "_control"))
        assert others == [mine, mine] and (mine is not None or name == "steps_to_half")
    words[2] = "try-v2"
    assert CliRunner().invoke(app, words).exit_code == 2


@pytest.mark.usefixtures("quick")
def test_every_finished_repair_gets_a_row_and_clean_networks_say_why_theirs_are_empty(
    store: Store, tmp_path: Path
) -> None:
    file = tmp_path / "probes.jsonl"
    assert probe_repairs(store, "try-v1", file) == 4
    rows = read_probes(file)
    assert [(row.attack, row.defense, row.defender_seed) for row in rows] == [
        ("badnets", "none", 0), ("badnets", "none", 1), ("none", "none", 0), ("none", "none", 1)
    ]  # fmt: skip
    assert all(row.error is None and is_current(row) for row in rows)
    assert [(row.flags, row.pacc, row.pacc_control) for row in rows[1:3]] == [
        ((), 0.5, 0.5), ((NOT_ATTACKED,), None, None)
    ]  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ended_after", range(1, 12))
def test_a_pass_that_was_ended_at_any_moment_goes_on_where_it_was(
    store: Store, tmp_path: Path, ended_after: int
) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert probe_repairs(store, "try-v1", whole) == 4
    done = []

    def interrupted(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        for item in items:
            done.append(item)
            if len(done) > ended_after:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        probe_repairs(store, "try-v1", broken, progress=interrupted)
    kept = timeless(broken)
    assert kept == timeless(whole)[: len(kept)] and len(kept) < 4
    assert [path.name for path in tmp_path.glob(".*")] == []
    assert probe_repairs(store, "try-v1", broken, only="sample=1") == 2 - (len(kept) > 1)
    assert probe_repairs(store, "try-v1", broken) == 2 - len(kept) + (len(kept) > 1)
    by_key = [sorted(timeless(file), key=str) for file in (broken, whole)]
    assert by_key[0] == by_key[1]
    assert probe_repairs(store, "try-v1", broken) == 0


@pytest.mark.usefixtures("quick")
def test_rows_of_other_code_and_rows_that_failed_are_done_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, only = tmp_path / "probes.jsonl", "badnets/none/images=4/sample=0"
    (cell,) = [
        cell for cell, labels in store.members("try-v1")
        if (labels.get("defense"), labels["attack"], labels.get("defender_seed")) == ("none", "badnets", 0)
    ]  # fmt: skip
    model, away = store.artefact(cell.key) / REPAIRED, tmp_path / "away"
    model.rename(away)

    def done(**how: Any) -> tuple[int, ProbeRow]:
        count = probe_repairs(store, "try-v1", file, only=only, **how)
        (row,) = read_probes(file)
        return count, row

    count, row = done()
    assert count == 1 and "InputError" in str(row.error) and row.pacc is None
    away.rename(model)
    assert done()[0] == 0
    count, row = done(retry=True)
    assert (count, row.error, row.pacc) == (1, None, 0.5)
    assert done(retry=True)[0] == 0
    monkeypatch.setattr(probe_rows, "probe_version", lambda attack, architecture: "0" * 16)
    count, row = done()
    assert (count, row.code) == (1, "0" * 16) and not is_current(row)


@pytest.mark.usefixtures("quick")
def test_rows_of_other_repairs_stay_in_the_file(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "probes.jsonl"
    write_rows(file, [row_of()])
    assert probe_repairs(store, "try-v1", file) == 4
    assert read_probes(file)[0] == row_of() and len(read_probes(file)) == 5


@pytest.mark.usefixtures("quick")
def test_a_store_without_a_clean_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made(tmp_path, monkeypatch, lambda cell: cell.labels["attack"] != "none") as store:
        probe_repairs(store, "try-v1", tmp_path / "p.jsonl", only="sample=0")
    (row,) = read_probes(tmp_path / "p.jsonl")
    assert row.flags == (NO_CONTROL,) and row.control_code == "" and row.pacc_control is None
    assert row.pacc == row.pacc_before == 0.5 and is_current(row)


def test_a_file_of_other_rows_is_refused(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"suite": "another"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="not a result row"):
        probe_repairs(store, "try-v1", file)
    assert file.read_text(encoding="utf-8") == '{"suite": "another"}\n'


@pytest.mark.parametrize("column", ["code", "repair_code", "victim_code", "control_code"])
def test_probes_are_current_only_if_all_behind_them_is(column: str) -> None:
    row = row_of(
        code=probe_version("badnets", "small_cnn"),
        repair_code=repair_version("ft", "badnets", "small_cnn"),
        victim_code=victim_version("badnets", "small_cnn"),
        control_code=victim_version("none", "small_cnn"),
    )
    assert is_current(row) and is_current(row.model_dump())
    assert is_current(row.model_copy(update={"control_code": ""}))
    assert is_current(row.model_copy(update={"victim_code": "imported 0", "control_code": "imported 0"}))
    assert not is_current(row.model_copy(update={column: "0" * 16}))


# ---------------------------------------------------------------------------------------------------
# The table


def row_of(**changes: Any) -> ProbeRow:
    values: dict[str, Any] = {
        "suite": "s", "dataset": "digits", "architecture": "small_cnn", "width": 8.0, "recipe": "plain",
        "attack": "badnets", "poison_rate": 0.1, "target": 0, "victim_seed": 0, "defense": "ft",
        "clean_images": 60, "defender_seed": 0, "asr_before": 1.0, "asr": 0.02, "relearn_steps": (0, 10, 40),
        "relearned": (0.02, 0.8, 1.0), "relearned_control": (0.0, 0.1, 0.3), "steps_to_half": 4,
        "alternative": 0.25, "alternative_control": 0.05, "pacc": 0.6, "moved": 0.125, "moved_control": 0.03,
    }  # fmt: skip
    return ProbeRow(**{**values, **changes})


def test_a_table_shows_each_probe_beside_the_clean_network() -> None:
    rows = [
        row_of(),
        row_of(victim_seed=1, steps_to_half=None, relearned=(0.0, 0.4, 0.4)),
        row_of(victim_seed=2, error="MethodFailed: diverged", relearned=(), pacc=None),
        row_of(victim_seed=3, flags=("attack did not take",), asr_before=0.1),
        row_of(attack="none", asr_before=None, pacc=None, relearned=()),
        row_of(commit="older"),
    ]
    section = probe_section(Rows.of(rows, lambda row: row["commit"] != "older"))
    (table,) = section.tables
    current, older = table.rows
    assert [(cell.text, cell.small) for cell in current[3:9]] == [
        ("2.0 %", ""), ("60.0 %", "clean network 10.0 %"), ("4", "clean network over 40"),
        ("25.0 %", "clean network 5.0 %"), ("60.0 %", ""), ("12.5 %", "clean network 3.0 %"),
    ]  # fmt: skip
    assert [cell.text for cell in current[9:]] == ["2", "1", "1"]
    assert older[0].older and [cell.text for cell in older[9:]] == ["1", "0", "0"]
    (table,) = probe_section(Rows.of(rows, lambda row: False)).tables
    assert table.rows[0][0].text == "current code" and all(row[0].older for row in table.rows[1:])


def test_the_patch_has_a_column_once_a_row_has_it() -> None:
    rows = [row_of(patch=0.5, patch_control=0.25), row_of(victim_seed=1)]
    for wanted in (rows, rows[1:]):
        (table,) = probe_section(Rows.of(wanted, lambda row: True)).tables
        names = [column.name for column in table.columns]
        assert ("alternative patch" in names) == (len(wanted) == 2)
        assert all(len(line) == len(names) for line in table.rows)
        if len(wanted) == 2:
            cell = table.rows[0][names.index("alternative patch")]
            assert (cell.text, cell.small) == ("50.0 %", "clean network 25.0 %")


def test_a_row_from_before_the_patch_is_current_and_is_probed_again(
    store: Store, tmp_path: Path, quick: None
) -> None:
    file = tmp_path / "probes.jsonl"
    place = {"device": "cpu"}
    assert probe_repairs(store, "try-v1", file, place=place) == 4
    rows = read_probes(file)
    before = [row.model_copy(update={"patch": None, "patch_code": ""}) for row in rows]
    attacked = [row for row in rows if row.patch is not None]
    assert len(attacked) == 2 and all(map(is_current_in_all_parts, [*rows, *before]))
    assert not is_current_in_all_parts(attacked[0].model_copy(update={"patch_code": "0" * 16}))
    write_rows(file, before)
    assert probe_repairs(store, "try-v1", file, place=place) == 4
    assert timeless(file) == [row.model_dump(exclude={"seconds"}) for row in rows]


def test_a_report_has_the_section_only_where_there_are_probes() -> None:
    pytest.importorskip("matplotlib", reason="the report draws charts (extra: report)")
    repairs = [Row(**row_of().model_dump(include=set(Row.model_fields)))]
    assert "What probes find" not in to_markdown(bench_report(repairs))
    assert "What probes find" in to_markdown(bench_report(repairs, probes=[row_of()]))
