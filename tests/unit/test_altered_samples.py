"""Defenders whose images are altered: what is done to them, and that no other cell notices."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from small_suite import TEXT, fake_data, written
from tiny import tiny_data
from unbackdoor.bench import part_versions as versions
from unbackdoor.bench import work
from unbackdoor.bench.altered_samples import (
    Alteration,
    altered,
    altered_sample_step,
    blurred,
    foreign_images,
    same_classes,
)
from unbackdoor.bench.cells import Planned, address, plan
from unbackdoor.bench.code_version import repair_version, victim_version
from unbackdoor.bench.driver import matches, name_of
from unbackdoor.bench.part_versions import alteration_version, is_current
from unbackdoor.bench.rows import ProbeRow, Row, ScanRow
from unbackdoor.bench.steps import SAMPLE
from unbackdoor.bench.suites import SHIPPED, load_suite
from unbackdoor.bench.work import sample_spec
from unbackdoor.cli.app import app
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.errors import ConfigError, InputError, IntegrityError
from unbackdoor.report.benchmark import leaderboard
from unbackdoor.report.benchmark.groups import Setting
from unbackdoor.types import Images

CLASSES = tuple("abcde")


def pool(each: int = 60, classes: tuple[str, ...] = CLASSES) -> Images:
    draws = torch.Generator().manual_seed(0)
    count = each * len(classes)
    pixels = torch.randint(0, 256, (count, 3, 6, 6), generator=draws, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % len(classes), classes, "pool")


def sample(count: int = 100, seed: int = 0, **what: Any) -> Images:
    return altered(pool(), Alteration(**what), count=count, seed=seed)


# ---------------------------------------------------------------------------------------------------
# What is done


@pytest.mark.parametrize(
    "what",
    [{"imbalance": 10}, {"mislabelled": 0.05}, {"brightness": 0.5}, {"blur": 1.0},
     {"imbalance": 4, "mislabelled": 0.1, "brightness": 1.5, "blur": 0.5}],
    ids=str,
)  # fmt: skip
def test_it_is_decided_by_the_seed(what: dict[str, Any]) -> None:
    one, again, other = sample(**what), sample(**what), sample(seed=1, **what)
    assert torch.equal(one.pixels, again.pixels) and torch.equal(one.truth, again.truth)
    assert len(one) == 100 and not torch.equal(one.pixels, other.pixels)
    assert one.pixels.dtype == torch.uint8 and one.shape == (3, 6, 6)


def test_an_alteration_of_the_pixels_leaves_the_draw_as_it_is() -> None:
    drawn = draw_clean(pool(), count=100, seed=0)
    for what in ({"brightness": 0.5}, {"blur": 1.0}, {}):
        assert torch.equal(sample(**what).truth, drawn.truth)
    assert torch.equal(sample().pixels, drawn.pixels)
    assert torch.equal(sample(mislabelled=0.05).pixels, drawn.pixels)


def test_classes_follow_a_geometric_row() -> None:
    counts = sample(imbalance=16).truth.bincount(minlength=5)
    # 100 / (1 + 1/2 + 1/4 + 1/8 + 1/16), halved four times: 51.6, 25.8, 12.9, 6.5, 3.2.
    assert sorted(counts.tolist(), reverse=True) == [52, 26, 13, 6, 3]
    assert len({tuple(sample(imbalance=16, seed=s).truth.bincount().tolist()) for s in range(6)}) > 1
    with pytest.raises(InputError, match="too few images"):
        sample(count=200, imbalance=16)


@pytest.mark.parametrize(("share", "wrong"), [(0.05, 5), (0.5, 50), (0.001, 1)])
def test_mislabelled_images_have_another_class(share: float, wrong: int) -> None:
    drawn, found = draw_clean(pool(), count=100, seed=0), sample(mislabelled=share)
    assert int((drawn.truth != found.truth).sum()) == wrong
    assert found.truth.min() >= 0 and found.truth.max() < 5


def test_brightness_is_a_factor_and_ends_at_the_edges() -> None:
    drawn = draw_clean(pool(), count=100, seed=0).pixels.double()
    assert torch.equal(sample(brightness=0.6).pixels, (0.6 * drawn).round().to(torch.uint8))
    assert torch.equal(sample(brightness=2).pixels, (2 * drawn).clamp(max=255).to(torch.uint8))


def test_blur_is_a_gaussian() -> None:
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 4] = 255
    found = blurred(image, 1.0)[0, 0].double()
    # exp(-r^2 / 2) over its sum along each axis: 0.3991 in the middle, so 255 * 0.3991 ^ 2 = 40.6.
    assert found[4, 4] == 41 and found[4, 5] == found[5, 4] == 25 and torch.equal(found, found.T)
    assert abs(float(found.sum()) - 255) < 8  # but for rounding
    even = torch.full((2, 3, 5, 7), 90, dtype=torch.uint8)
    assert torch.equal(blurred(even, 3.0), even)  # the border is continued, however far the kernel reaches


def test_foreign_images_are_those_of_the_classes_that_both_have() -> None:
    foreign = pool(4, ("z", "car", "b"))
    found = same_classes(foreign, pool(), {"car": "e"})
    assert sorted(set(found.truth.tolist())) == [1, 4] and len(found) == 8 and found.class_names == CLASSES
    assert torch.equal(found.pixels[found.truth == 4], foreign.pixels[foreign.truth == 1])
    grey = Images(foreign.pixels[:, :1, :5], foreign.labels, ("a", "b", "c"), "grey")
    assert same_classes(grey, pool(), {}).shape == (3, 6, 6)
    for classes, names in (
        ({}, ("x", "y", "z")),
        ({"car": "q"}, ("z", "car", "b")),
        ({"q": "a"}, ("a", "b", "c")),
    ):
        with pytest.raises(InputError):
            same_classes(replace(foreign, class_names=names), pool(), classes)
    with pytest.raises(InputError, match="several foreign classes"):
        same_classes(pool(4, ("a", "car", "b")), pool(), {"car": "a"})
    # Classes that the foreign set lacks are simply not there.
    drawn = altered(found, Alteration(), count=6, seed=0)
    assert set(drawn.truth.tolist()) == {1, 4}


# ---------------------------------------------------------------------------------------------------
# Suites


ALTERED = """
[[alteration]]
name = "dark"
brightness = 0.5
[[alteration]]
name = "wrong"
clean_images = [4, 8]
mislabelled = 0.25
"""


def cells(folder: Path, text: str, foreign: dict[str, Images] | None = None) -> list[Planned]:
    return plan(load_suite(written(folder, text)), fake_data(), foreign)


def test_an_alteration_adds_cells_and_changes_no_address(tmp_path: Path) -> None:
    before = {cell.key: cell.labels for cell in cells(tmp_path, TEXT)}
    made = {cell.key: cell for cell in cells(tmp_path, TEXT + ALTERED)}
    assert before.keys() < made.keys()
    assert all(made[key].labels == labels and "altered" not in labels for key, labels in before.items())
    new = [cell for key, cell in made.items() if key not in before]
    # Two victims, two seeds, three methods: once at 4 images, and at 4 and 8.
    assert len(new) == 2 * 2 * 3 * 3 and {cell.labels["altered"] for cell in new} == {"dark", "wrong"}
    dark = next(cell for cell in new if cell.labels["altered"] == "dark")
    assert dark.spec["altered"] == {"brightness": 0.5} and dark.spec["altered_code"] == alteration_version()
    assert "altered" in sample_spec(dark.spec)
    plain = made[next(key for key in before if made[key].kind == "repair")]
    assert set(sample_spec(plain.spec)) == {
        "dataset", "data_sha256", "augmentation", "clean_images", "seed", "code"
    }  # fmt: skip
    assert "/images=4/altered=dark/sample=0/" in name_of(dark.labels)
    assert matches(name_of(dark.labels), "altered=dark") and not matches(name_of(plain.labels), "altered=*")


def test_the_name_of_an_alteration_is_in_no_address(tmp_path: Path) -> None:
    one, other = (
        {cell.key for cell in cells(tmp_path, TEXT + ALTERED.replace("dark", name))}
        for name in ("dark", "dim")
    )
    assert one == other
    assert one != {cell.key for cell in cells(tmp_path, TEXT + ALTERED.replace("0.5", "0.6"))}


def test_images_a_class_are_a_number_of_images(tmp_path: Path) -> None:
    classes = fake_data()["digits"].train.classes
    one = cells(tmp_path, TEXT.replace("clean_images = [4]", f"clean_images = [{2 * classes}]"))
    other = cells(tmp_path, TEXT.replace("clean_images = [4]", "per_class = [2]"))
    assert [cell.key for cell in one] == [cell.key for cell in other]
    both = cells(
        tmp_path, TEXT.replace("clean_images = [4]", f"clean_images = [{2 * classes}]\nper_class = [2]")
    )
    assert [cell.key for cell in one] == [cell.key for cell in both]


def test_what_came_later_changes_the_hash_of_no_older_suite() -> None:
    locked = json.loads((SHIPPED / "LOCK.json").read_text())
    for label in ("smoke-v1", "repairs-small-v1", "axes-small-v1"):
        assert load_suite(SHIPPED / f"{label}.toml").sha256() == locked[label]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ('[[alteration]]\nname = "x"\n', "alteration x: nothing is altered"),
        (2 * '[[alteration]]\nname = "x"\nblur = 1\n', "two are called 'x'"),
        ('[[alteration]]\nname = "x"\nblur = 1\nclasses = { a = "b" }\n', "belong to a foreign set"),
        ('[[alteration]]\nname = "x"\nblur = 1\nper_class = [0]\n', "alteration.per_class: must be"),
        ('[[alteration]]\nname = "x"\nmislabelled = 1.5\n', "alteration.0.mislabelled"),
        ('[[alteration]]\nname = "x"\nbrightness = -1\n', "alteration.0.brightness"),
        ('[[alteration]]\nname = "x"\nblurr = 1\n', "did you mean 'blur'"),
        ('[[alteration]]\nname = "X/../y"\nblur = 1\n', "alteration.0.name"),
        ('[[alteration]]\nname = "x"\nforeign = "../secret"\n', "alteration.0.foreign"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, change: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_suite(written(tmp_path, TEXT + change))
    assert fault in "\n".join(caught.value.faults)


def test_a_defender_without_a_number_of_images_is_a_mistake(tmp_path: Path) -> None:
    for text, fault in (
        ("", "must name a number of images"),
        ("per_class = [0]", "per_class: must be at least 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_suite(written(tmp_path, TEXT.replace("clean_images = [4]", text)))
        assert fault in "\n".join(caught.value.faults)


def test_what_the_data_do_not_allow_is_found_before_anything_runs(tmp_path: Path) -> None:
    entry = '[[alteration]]\nname = "x"\nimbalance = 1000\nclean_images = [8]\n'
    with pytest.raises(ConfigError, match="alteration x of digits"):
        cells(tmp_path, TEXT + entry)
    entry = '[[alteration]]\nname = "x"\nforeign = "others"\n'
    with pytest.raises(ConfigError, match="none of the classes"):
        cells(tmp_path, TEXT + entry, {"others": pool(4, ("q",))})


FOREIGN = '[[alteration]]\nname = "else"\nforeign = "others"\n'


def test_cells_of_foreign_images_are_left_out_where_there_are_none(tmp_path: Path) -> None:
    assert [c.key for c in cells(tmp_path, TEXT + FOREIGN)] == [c.key for c in cells(tmp_path, TEXT)]
    others = replace(tiny_data(40, seed=5), name="others")
    with_them = cells(tmp_path, TEXT + FOREIGN, {"others": others})
    new = [cell for cell in with_them if cell.labels.get("altered")]
    assert {cell.spec["altered"]["foreign_sha256"] for cell in new} == {others.fingerprint()}
    other = cells(tmp_path, TEXT + FOREIGN, {"others": replace(tiny_data(40, seed=6), name="others")})
    assert not {c.key for c in new} & {c.key for c in other}


# ---------------------------------------------------------------------------------------------------
# The step, and the rows


def task(root: Path | None = None, **spec: Any) -> dict[str, Any]:
    from unbackdoor.data.datasets import load_dataset

    data = load_dataset("digits")
    return {
        "spec": {
            "dataset": "digits", "data_sha256": [data.train.fingerprint(), data.test.fingerprint()],
            "clean_images": 20, "seed": 3, **spec,
        },
        "place": {"data_root": str(root) if root else None},
    }  # fmt: skip


def test_the_step_writes_the_altered_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    from unbackdoor.data.datasets import load_dataset

    assert altered_sample_step(task(altered={"brightness": 0.5}), tmp_path) == {"images": 20}
    wanted = altered(reserve(load_dataset("digits").train)[1], Alteration(brightness=0.5), count=20, seed=3)
    held = load_file(tmp_path / SAMPLE)
    assert torch.equal(held["pixels"], wanted.pixels) and torch.equal(held["labels"], wanted.truth)


def test_the_step_takes_foreign_images_from_the_data_root_and_only_those_of_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    draws = np.random.default_rng(0)
    for label in ("3", "7"):
        (tmp_path / "others" / label).mkdir(parents=True)
        for number in range(12):
            picture = draws.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "others" / label / f"{number}.png")
    found = foreign_images("others", tmp_path, None)
    spec = {"foreign": "others", "foreign_sha256": found.fingerprint()}
    altered_sample_step(task(tmp_path, altered=spec), tmp_path)
    assert load_file(tmp_path / SAMPLE)["labels"].bincount(minlength=10).tolist() == [
        0,
        0,
        0,
        10,
        0,
        0,
        0,
        10,
        0,
        0,
    ]
    with pytest.raises(IntegrityError, match="not those that were planned with"):
        altered_sample_step(task(tmp_path, altered={**spec, "foreign_sha256": "0"}), tmp_path)
    for root in (tmp_path / "nowhere", None):
        with pytest.raises(InputError, match="no foreign images 'others'"):
            foreign_images("others", root, None)


def row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "suite": "try", "dataset": "digits", "architecture": "small_cnn", "width": 4, "recipe": "plain",
        "attack": "badnets", "poison_rate": 0.1, "target": 0, "victim_seed": 0, "defense": "ft",
        "clean_images": 20, "defender_seed": 0, "acc_before": 0.9, "asr_before": 1.0, "acc": 0.9, "asr": 0.1,
        "ra": 0.8, "der": 0.95, "seconds": 1.0, "code": repair_version("ft", "badnets", "small_cnn"),
        "victim_code": victim_version("badnets", "small_cnn"),
    }  # fmt: skip
    return Row(**{**values, **changes})


def test_a_row_is_current_if_the_code_that_altered_its_images_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, dark = row(), row(altered="dark", altered_code=alteration_version())
    assert is_current(plain) and is_current(dark) and is_current(dark.model_dump())
    assert not is_current(row(altered="dark")) and not is_current(row(altered="dark", altered_code="0"))
    assert not is_current(row(altered="dark", altered_code=alteration_version(), code="0"))
    monkeypatch.setattr(versions, "alteration_version", lambda: "other")
    assert is_current(plain) and not is_current(dark)


def test_rows_of_altered_images_are_other_experiments_and_in_no_mean_of_the_others() -> None:
    rows = [row(), row(altered="dark", asr=0.9), row(altered="dark", asr=0.7, defender_seed=1)]
    assert len({one.key() for one in rows}) == 3 and len({Setting.of(one) for one in rows}) == 2
    pytest.importorskip("matplotlib", reason="the charts of a report (extra: report)")
    document = leaderboard(rows, is_current=lambda row: True)
    (table,) = (t for s in document.sections for t in s.tables if t.identifier == "methods-0")
    lines = {line[3].small: line[4].text for line in table.rows}
    assert lines == {"": "10.0 %", "dark": "80.0 %"}
    entry = next(e for s in document.sections for e in s.entries if json.loads(e.config)["altered"] == "dark")
    assert "altered: dark" in entry.title and "/altered=dark/" in entry.commands[0]
    for kind in (Row, ScanRow, ProbeRow):
        assert "altered" in kind.key_columns() and "altered_code" not in kind.key_columns()


@pytest.mark.parametrize("name", ["altered_sample", "sample"])
def test_an_altered_sample_has_a_step_and_a_place_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = []

    def step(self: Any, name: str, *, folder: Path, **more: Any) -> dict[str, Any]:
        asked.append(name)
        (folder / SAMPLE).write_bytes(b"")
        return {}

    monkeypatch.setattr(work._Work, "step", step)
    monkeypatch.setattr(work.steps, "hand_over", lambda victim, folder: None)
    monkeypatch.setattr(work, "_require_answer", lambda answer, kinds: None)
    hidden: list[Path] = []
    monkeypatch.setattr(work._Work, "_call", lambda *given: hidden.extend(given[-1]) or {"seconds": 1.0})
    altered = {"foreign": "others", "foreign_sha256": "0"}
    more = {"altered": altered, "altered_code": "c"} if name == "altered_sample" else {}
    (tmp_path / "data").mkdir()
    place = {"store": str(tmp_path), "data_root": str(tmp_path / "data")}
    spec = {**task()["spec"], "augmentation": "none", "victim": "0" * 64, "precision": "fp32", **more}
    one = work._Work({"spec": spec, "place": place, "work": "w"}, tmp_path, [])  # type: ignore[typeddict-item]
    one.confined("method", {})
    assert asked == [name]
    # The method must not read the foreign images, as it must not read any data set.
    assert (tmp_path / "data" / "others" in hidden) == (name == "altered_sample")
    (held,) = (tmp_path / "samples").iterdir()
    assert held.stem == address(sample_spec(spec))
    one.confined("method", {})  # from the store, the second time
    assert asked == [name]
    module = importlib.import_module(work._MODULES.get(name, work._STEPS))
    assert callable(getattr(module, f"{name}_step"))


@pytest.mark.slow
def test_a_suite_with_alterations_runs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smoke cell: the null method on digits that are partly mislabelled; the foreign ones are left out."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (extra: digits)")
    text = TEXT.replace('name = "plain"', "") + ALTERED + FOREIGN
    text = text.replace('[[attack]]\nname = "badnets"\n', "")
    recipe = '[[recipe]]\nname = "plain"\nchanges = { epochs = 1, augmentation = "none" }\n'
    file = written(tmp_path, text + recipe)
    monkeypatch.chdir(tmp_path)
    words = ["bench", "run", str(file), "--only", "none/images=4/altered=wrong/sample=0", "--workers", "1"]
    done = CliRunner().invoke(app, [*words, "--suites", str(tmp_path), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "The cells of else are left out" in done.stderr
    done = CliRunner().invoke(app, ["bench", "export", "try-v1", "--out", "rows.jsonl"])
    assert done.exit_code == 0, done.output
    (found,) = (Row(**json.loads(line)) for line in Path("rows.jsonl").read_text().splitlines())
    assert (found.altered, found.clean_images, found.error) == ("wrong", 4, None)
    assert found.altered_code == alteration_version() and is_current(found)
