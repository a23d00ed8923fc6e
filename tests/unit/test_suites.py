"""Suites: all mistakes at once, frozen versions, and cells that depend on what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from small_suite import TEXT, fake_data, written
from unbackdoor.attacks import poison
from unbackdoor.bench.cells import _victims, plan
from unbackdoor.bench.code_version import repair_version
from unbackdoor.bench.suites import SHIPPED, Suite, architecture, check_lock, find_suite, load_suite
from unbackdoor.data.splits import reserve
from unbackdoor.errors import ConfigError, InputError, IntegrityError
from unbackdoor.registry import ATTACKS, DEFENSES


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda f: f.stem)
def test_the_shipped_suites_are_sound_and_locked(file: Path) -> None:
    suite = load_suite(file)
    check_lock(suite, SHIPPED, write=False)
    assert suite.about
    # What every result is held against: doing nothing, tuning only, pruning at random.
    assert {"none", "ft", "random_prune"} <= {defense.name for defense in suite.defense}


def test_cells_are_shared_and_ordered(tmp_path: Path) -> None:
    cells = plan(load_suite(written(tmp_path)), fake_data())
    assert [cell.kind for cell in cells].count("victim") == 2
    assert len(cells) == 2 + 2 * 2 * 3
    assert len({cell.key for cell in cells}) == len(cells)
    seen = set()
    for cell in cells:
        assert cell.parent is None or cell.parent in seen
        seen.add(cell.key)
    again = plan(load_suite(written(tmp_path)), fake_data())
    assert [cell.key for cell in again] == [cell.key for cell in cells]


def test_a_method_is_told_nothing_of_the_attack(tmp_path: Path) -> None:
    for cell in plan(load_suite(written(tmp_path)), fake_data()):
        if cell.kind == "repair":
            assert not {"attack", "target", "poison_rate"} & set(cell.spec)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = (
        TEXT.replace('"badnets"', '"badnet"')
        .replace('"rnp"', '"rpn"')
        .replace('"small_cnn"', '"smal_cnn"')
        .replace('name = "digits"', 'name = "digitz"')
    )
    with pytest.raises(ConfigError) as caught:
        load_suite(written(tmp_path, text))
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 4
    for near in ("badnets", "rnp", "small_cnn", "digits"):
        assert f"did you mean {near!r}" in faults


def test_a_typo_in_a_key_has_a_near_match(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"defender.clean_image'.*did you mean 'clean_images'") as caught:
        load_suite(written(tmp_path, TEXT.replace("clean_images", "clean_image")))
    assert len(caught.value.faults) == 2  # the unknown key, and the missing one


def test_the_controls_must_be_there(tmp_path: Path) -> None:
    text = TEXT.replace('[[attack]]\nname = "none"\n', "").replace('[[defense]]\nname = "none"\n', "")
    with pytest.raises(ConfigError) as caught:
        load_suite(written(tmp_path, text))
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["defense", "attack"]


def test_what_the_data_do_not_allow_is_reported_at_once(tmp_path: Path) -> None:
    text = TEXT.replace('[[attack]]\nname = "badnets"', '[[attack]]\nname = "sig"\npoison_rates = [0.1, 0.5]')
    text = text.replace("clean_images = [4]", "clean_images = [4, 4000]")
    with pytest.raises(ConfigError) as caught:
        plan(load_suite(written(tmp_path, text)), fake_data())
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 2
    assert "clean_images 4000 of digits" in faults
    assert "poison_rate 0.5 asks for 76 images of class 0, and there are 38" in faults


def test_every_attack_that_the_data_do_not_allow_is_in_the_plan(tmp_path: Path) -> None:
    # 4 classes of 38 training images each: 114 are outside the target class.
    entry = '[[attack]]\nname = "badnets"\npoison_rates = [0.75, 0.8, 0.9]\ntargets = [0, 9]'
    with pytest.raises(ConfigError) as caught:
        plan(load_suite(written(tmp_path, TEXT.replace('[[attack]]\nname = "badnets"', entry))), fake_data())
    faults = caught.value.faults
    assert len(faults) == 5
    assert sum("target: must be below 4 classes, got 9" in fault for fault in faults) == 3
    told = (
        "asks for 122 images outside the target class, and there are 114; the highest possible rate is 0.75"
    )
    assert told in faults[1]
    training, _ = reserve(fake_data()["digits"].train)
    with pytest.raises(ConfigError, match="asks for 122 images outside the target class"):
        poison(training, "badnets", {"poison_rate": 0.8})


def test_other_data_than_the_suite_pins_are_refused(tmp_path: Path) -> None:
    text = TEXT.replace('name = "digits"', 'name = "digits"\ntrain_sha256 = "00"')
    with pytest.raises(ConfigError, match="is not the one of the suite"):
        plan(load_suite(written(tmp_path, text)), fake_data())


def test_a_version_is_frozen(tmp_path: Path) -> None:
    suite = load_suite(written(tmp_path))
    check_lock(suite, tmp_path)
    check_lock(suite, tmp_path)
    reworded = load_suite(written(tmp_path, TEXT.replace("version = 1", 'version = 1\nabout = "words"')))
    check_lock(reworded, tmp_path)
    changed = load_suite(written(tmp_path, TEXT.replace("seeds = [0, 1]", "seeds = [0, 2]")))
    with pytest.raises(IntegrityError, match="try-v2"):
        check_lock(changed, tmp_path)
    raised = Suite.model_validate({**changed.model_dump(), "version": 2})
    check_lock(raised, tmp_path)


def test_files_are_named_by_their_label(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be called try-v1\.toml"):
        load_suite(written(tmp_path, name="other.toml"))
    with pytest.raises(ConfigError, match="not TOML"):
        load_suite(written(tmp_path, "name = "))
    with pytest.raises(InputError, match="did you mean 'try-v1'"):
        find_suite("tri-v1", written(tmp_path).parent)


def test_a_part_may_raise_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    part, before = DEFENSES["rnp"], repair_version("rnp", "none", "small_cnn")
    monkeypatch.setitem(DEFENSES._parts, "rnp", replace(part, version=part.version + 1))
    assert repair_version("rnp", "none", "small_cnn") != before


def test_a_model_meets_only_what_it_names(tmp_path: Path) -> None:
    whole = TEXT.replace('name = "none"\n[defender]', 'name = "none"\nseeds = [0, 1, 2]\n[defender]')
    second = (
        '[[model]]\narchitecture = "small_cnn"\nwidths = [8]\nattacks = ["none"]\nseeds = [1]\n[[attack]]'
    )
    cut = whole.replace("[[attack]]", second, 1)
    cells = plan(load_suite(written(tmp_path, cut)), fake_data())
    victims = [cell.labels for cell in cells if cell.kind == "victim"]
    assert [(v["width"], v["attack"], v["victim_seed"]) for v in victims] == [
        (4, "badnets", 0), (4, "none", 0), (4, "none", 1), (4, "none", 2), (8, "none", 1),
    ]  # fmt: skip
    # What is not said leaves the hash of older suites as it was.
    assert "seeds" not in str(load_suite(written(tmp_path, whole)).model_dump(exclude_defaults=True)["model"])


def test_a_model_cannot_meet_what_the_suite_does_not_have(tmp_path: Path) -> None:
    cut = TEXT.replace("widths = [4]", 'widths = [4]\nattacks = ["badnet"]\nrecipes = ["long"]\nseeds = [7]')
    with pytest.raises(ConfigError) as caught:
        load_suite(written(tmp_path, cut))
    assert len(caught.value.faults) == 3
    assert "did you mean 'badnets'?" in str(caught.value)


SPLIT = """
[split]
tuning = [0, 1]
test = [2]
"""


def test_a_split_names_the_part_of_every_row_and_changes_no_older_suite(tmp_path: Path) -> None:
    text = TEXT.replace('name = "badnets"', 'name = "badnets"\nseeds = [0, 1, 2]') + SPLIT
    cells = plan(load_suite(written(tmp_path, text)), fake_data())
    parts = {(cell.labels["victim_seed"], cell.labels["part"]) for cell in cells}
    assert parts == {(0, "tuning"), (1, "tuning"), (2, "test")}
    assert {cell.labels["part"] for cell in plan(load_suite(written(tmp_path)), fake_data())} == {""}
    bare = load_suite(written(tmp_path))
    assert "split" not in bare.model_dump(exclude_none=True)
    assert load_suite(written(tmp_path, TEXT + SPLIT)).sha256() != bare.sha256()


@pytest.mark.parametrize(
    ("split", "fault"),
    [
        ("tuning = [0, 1]\ntest = [1, 2]", "in both parts: seed 1"),
        ("tuning = [1]\ntest = [2]", "in neither part: seed 0"),
        ("tuning = [0]\ntest = []", "split.test"),
    ],
)
def test_a_split_that_leaks_or_leaves_out_is_refused(tmp_path: Path, split: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        load_suite(written(tmp_path, f"{TEXT}[split]\n{split}\n"))


def test_options_of_a_network_are_in_its_rows(tmp_path: Path) -> None:
    text = TEXT.replace('"small_cnn"', '"airbench"\noptions = { expansion = 1 }')
    cells = plan(load_suite(written(tmp_path, text)), fake_data())
    assert {cell.labels["architecture"] for cell in cells} == {"airbench[expansion=1]"}
    assert repair_version("rnp", "badnets", "airbench[expansion=1]") == repair_version(
        "rnp", "badnets", "airbench"
    )


def test_the_zoo_is_large_paired_and_split() -> None:
    suite = load_suite(SHIPPED / "zoo-v1.toml")
    assert suite.split is not None
    assert not set(suite.split.tuning) & set(suite.split.test)
    kinds: dict[bool, list[tuple[str, ...]]] = {True: [], False: []}
    seeds: dict[str, set[int]] = {"tuning": set(), "test": set()}
    for data in ("cifar10", "gtsrb32"):
        for model, width, _, attack, _, seed in _victims(suite, data):
            victim = (data, architecture(model, width), str(seed), suite.split.part(seed))
            kinds[attack.name == "none"].append(victim)
            seeds[suite.split.part(seed)].add(seed)
    clean, backdoored = kinds[True], kinds[False]
    assert len(clean) >= 200 and len(backdoored) >= 120
    assert set(backdoored) <= set(clean)  # a counterpart of the same seed and architecture
    assert sum(v[-1] == "test" for v in clean) >= 150
    assert sum(v[-1] == "tuning" for v in clean + backdoored) <= len(clean + backdoored) / 3
    assert not seeds["tuning"] & seeds["test"]
    families = {name.partition("[")[0] for _, name, _, _ in backdoored}
    assert len(families) >= 4


def test_the_suite_of_attacks_has_them_all() -> None:
    suite = load_suite(SHIPPED / "attacks-v1.toml")
    assert {entry.name for entry in suite.attack} == {*ATTACKS} - {"picture"}  # which is the user's own
    victims = [*_victims(suite, "cifar10")]
    assert {attack.name for _, _, _, attack, _, _ in victims} == {entry.name for entry in suite.attack}
    controls = {
        (model.architecture, recipe.name) for model, _, recipe, a, _, _ in victims if a.name == "none"
    }
    assert {(model.architecture, recipe.name) for model, _, recipe, _, _, _ in victims} == controls
    # Rows know an attack by these; one kind more needs a seed of its own.
    keys = [(r.name, a.name, o.get("poison_rate"), o.get("target"), seed) for _, _, r, a, o, seed in victims]
    assert len(keys) == len(set(keys))


def test_two_changes_of_one_recipe_have_labels(tmp_path: Path) -> None:
    recipes = (
        '[[recipe]]\nname = "fast"\nlabel = "fast-4"\nchanges = { epochs = 4 }\n'
        '[[recipe]]\nname = "fast"\nchanges = { epochs = 7 }\n[[recipe]]\nname = "fast"\n'
    )
    cells = plan(load_suite(written(tmp_path, TEXT + recipes)), fake_data())
    assert {cell.labels["recipe"] for cell in cells} == {"fast-4", "fast*", "fast"}
    chosen = TEXT.replace("widths = [4]", 'widths = [4]\nrecipes = ["fast-4"]') + recipes
    cells = plan(load_suite(written(tmp_path, chosen)), fake_data())
    assert {cell.labels["recipe"] for cell in cells} == {"fast-4"}
