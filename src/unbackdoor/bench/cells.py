"""Cells: the units of a benchmark, addressed by a hash of everything their result depends on.

A victim is trained once and shared by all repairs and scans, in this suite and in others. A repair or a scan
depends on its victim, the method with all options, and the defender's sample. The code that a cell runs is
part of its address (:mod:`unbackdoor.bench.code_version`): where it changes, cells that run it are new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from unbackdoor.attacks import AttackTruth, impossible
from unbackdoor.bench.altered_samples import Alteration, altered, same_classes
from unbackdoor.bench.code_version import repair_version, scan_version, victim_version
from unbackdoor.bench.part_versions import alteration_version
from unbackdoor.bench.steps import facts_of
from unbackdoor.bench.suites import (
    AlterationEntry,
    AttackEntry,
    ModelEntry,
    RecipeEntry,
    Suite,
    architecture,
    architecture_label,
    attack_options,
)
from unbackdoor.data.datasets import DataSet
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine.training import recipe_named
from unbackdoor.errors import ConfigError, UnbackdoorError
from unbackdoor.networks.build import canonical
from unbackdoor.registry import ATTACKS, DEFENSES, SCANNERS, Part
from unbackdoor.types import Images


@dataclass(frozen=True)
class Planned:
    """A cell before it runs.

    Attributes:
        key: Its address.
        kind: ``victim``, ``repair`` or ``scan``.
        spec: All that is needed to do it, JSON-ready.
        parent: Address of the victim of a repair or a scan.
        labels: The columns of its row that are known before it runs.
    """

    key: str
    kind: str
    spec: dict[str, Any]
    parent: str | None
    labels: dict[str, Any]

    def entry(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the form that the store takes."""
        return {"key": self.key, "kind": self.kind, "spec": self.spec, "parent": self.parent}, self.labels


def address(spec: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of a specification."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plan(
    suite: Suite, data: Mapping[str, DataSet], foreign: Mapping[str, Images] | None = None
) -> list[Planned]:
    """Expand a suite into its cells, victims before the repairs that need them.

    Args:
        suite: A suite without faults of its own.
        data: The loaded data sets by name.
        foreign: Images of foreign sets by name. Where they are not there, the cells of an alteration that
            needs them are left out.

    Raises:
        ConfigError: If the data do not allow what the suite asks for; all such faults at once.
    """
    foreign = foreign or {}
    faults = list(_impossible(suite, data, foreign))
    if faults:
        raise ConfigError(f"the suite {suite.label}", faults)
    return list(_cells(suite, data, foreign))


def _cells(suite: Suite, data: Mapping[str, DataSet], foreign: Mapping[str, Images]) -> Iterator[Planned]:
    shared = {
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "precision": suite.precision,
    }
    for entry in suite.data:
        loaded = data[entry.name]
        facts = {
            "dataset": entry.name,
            "data_sha256": [loaded.train.fingerprint(), loaded.test.fingerprint()],
            **facts_of(loaded),
        }
        for model, width, recipe, attack, options, seed in _victims(suite, entry.name):
            part = ATTACKS[attack.name]
            config = part.configure(options).model_dump()
            spec = {
                **shared,
                "kind": "victim",
                **facts,
                "architecture": canonical(architecture(model, width)),
                "recipe": recipe_named(recipe.name, **recipe.changes).model_dump(),
                "attack": attack.name,
                "options": config,
                "code": victim_version(attack.name, model.architecture),
                "seed": seed,
            }
            labels = {
                "suite": suite.name,
                "version": suite.version,
                "dataset": entry.name,
                "architecture": architecture_label(model),
                "width": width,
                "recipe": recipe.title,
                "attack": attack.name,
                "poison_rate": config["poison_rate"],
                "target": None if attack.name == "none" else config["target"],
                "victim_seed": seed,
                "part": suite.split.part(seed) if suite.split else "",
            }
            victim = Planned(address(spec), "victim", spec, None, labels)
            yield victim
            defenders = list(_defenders(suite, loaded.train.classes, foreign))
            yield from _repairs_and_scans(suite, shared, victim, defenders)


def _victims(
    suite: Suite, data: str
) -> Iterator[tuple[ModelEntry, float, RecipeEntry, AttackEntry, dict[str, Any], int]]:
    """Yield every combination of model, width, recipe, attack, options and seed that meets, in order."""
    networks = [(model, width) for model in suite.model for width in model.widths]
    attacks = [
        (attack, options, seed)
        for attack in suite.attack
        for options in attack_options(attack)
        for seed in attack.seeds
    ]
    for (model, width), recipe, (attack, options, seed) in product(networks, suite.recipe, attacks):
        if model.meets(data, recipe.label or recipe.name, attack.name, seed):
            yield model, width, recipe, attack, options, seed


Defender = tuple[str, dict[str, Any] | None, int]  # the name and specification of an alteration, and images


def _defenders(suite: Suite, classes: int, foreign: Mapping[str, Images]) -> Iterator[Defender]:
    """Yield the defenders of a suite, first those whose images are as they were drawn."""
    yield from (("", None, count) for count in suite.defender.counts(classes))
    for entry in suite.alteration:
        spec = entry.alteration
        if entry.foreign:
            if entry.foreign not in foreign:
                continue
            spec["foreign_sha256"] = foreign[entry.foreign].fingerprint()
        yield from ((entry.name, spec, count) for count in entry.counts(classes, suite.defender))


def _repairs_and_scans(
    suite: Suite, shared: Mapping[str, Any], victim: Planned, defenders: Sequence[Defender]
) -> Iterator[Planned]:
    """Yield the repairs and scans of a victim, for every defender and seed of the draw."""
    parts = (victim.labels["attack"], victim.labels["architecture"])
    for (name, alteration, count), seed in product(defenders, suite.defender.seeds):
        # Nothing of an alteration stands in the specification of a cell that has none.
        more: dict[str, Any] = {}
        if alteration is not None:
            more = {"altered": alteration, "altered_code": alteration_version()}
        defender_spec = {
            **shared,
            "victim": victim.key,
            **{name: victim.spec[name] for name in ("dataset", "data_sha256", "augmentation")},
            "clean_images": count,
            "seed": seed,
            **more,
        }
        labels = {**victim.labels, "clean_images": count, "defender_seed": seed}
        if alteration is not None:
            labels["altered"] = name
        for defense in suite.defense:
            part: Part[Any] = DEFENSES[defense.name]
            for preset in defense.presets:
                spec = {
                    **defender_spec,
                    "kind": "repair",
                    "defense": defense.name,
                    "options": part.configure(defense.options, preset=preset).model_dump(),
                    "code": repair_version(defense.name, *parts),
                    "selection": defense.selection,
                }
                if defense.choices:
                    tables = [{**defense.options, **choice} for choice in defense.choices]
                    spec["choices"] = [part.configure(t, preset=preset).model_dump() for t in tables]
                named = {"defense": defense.name, "preset": preset if not defense.options else f"{preset}*"}
                labelled = {**labels, **named, "selection": defense.selection}
                yield Planned(address(spec), "repair", spec, victim.key, labelled)
        for scanner in suite.scanner:
            part = SCANNERS[scanner.name]
            for preset in scanner.presets:
                spec = {
                    **defender_spec,
                    "kind": "scan",
                    "scanner": scanner.name,
                    "options": part.configure(scanner.options, preset=preset).model_dump(),
                    "code": scan_version(scanner.name, *parts),
                }
                named = {"scanner": scanner.name, "preset": preset if not scanner.options else f"{preset}*"}
                yield Planned(address(spec), "scan", spec, victim.key, {**labels, **named})


def _impossible(suite: Suite, data: Mapping[str, DataSet], foreign: Mapping[str, Images]) -> Iterator[str]:
    for entry in suite.data:
        loaded = data[entry.name]
        for part, expected, images in (
            ("train", entry.train_sha256, loaded.train),
            ("test", entry.test_sha256, loaded.test),
        ):
            if expected and images.fingerprint() != expected:
                yield (
                    f"data {entry.name}: the {part} part is not the one of the suite: "
                    f"expected {expected[:12]}, got {images.fingerprint()[:12]}"
                )
        training, pool = reserve(loaded.train)
        for count in suite.defender.counts(pool.classes):
            try:
                draw_clean(pool, count=count, seed=suite.defender.seeds[0])
            except UnbackdoorError as error:
                yield f"defender.clean_images {count} of {entry.name}: {error}"
        for alteration in suite.alteration:
            if alteration.foreign and alteration.foreign not in foreign:
                continue
            try:
                _alter(pool, alteration, suite, foreign)
            except UnbackdoorError as error:
                yield f"alteration {alteration.name} of {entry.name}: {error}"
        planned = [attack for _, _, _, attack, _, _ in _victims(suite, entry.name)]
        for attack in suite.attack:
            if attack not in planned:
                continue
            for options in attack_options(attack):
                truth = AttackTruth.describe(
                    attack.name, options, shape=training.shape, classes=training.classes, seed=0
                )
                for fault in impossible(training, truth):
                    yield f"attack {attack.name} on {entry.name}: {fault}"


def _alter(pool: Images, entry: AlterationEntry, suite: Suite, foreign: Mapping[str, Images]) -> None:
    """Draw what an alteration asks for, once for each number of images."""
    what = Alteration(**entry.alteration)
    source = same_classes(foreign[what.foreign], pool, what.classes) if what.foreign else pool
    for count in entry.counts(pool.classes, suite.defender):
        altered(source, what, count=count, seed=suite.defender.seeds[0])
