"""Suites: frozen, versioned descriptions of what is measured.

A suite is a TOML file that names everything a number depends on. All mistakes in it are reported at once,
before anything runs; a changed suite under an old version is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unbackdoor.bench.altered_samples import Alteration
from unbackdoor.data.datasets import dataset_names
from unbackdoor.engine.training import RECIPES, recipe_named
from unbackdoor.errors import ConfigError, InputError, IntegrityError
from unbackdoor.files import read_text, write_json
from unbackdoor.networks.build import configure
from unbackdoor.registry import ATTACKS, DEFENSES, SCANNERS, Registry, near_match
from unbackdoor.toml_text import parse_toml

SHIPPED = Path(__file__).parent / "suite_files"  # the suites that come with the package
_MAX_SUITE = 1 << 20  # bytes
_NO_IMAGES = "defender: clean_images or per_class must name a number of images"
LOCK = "LOCK.json"  # beside the suites: the hash of every version that was ever run
Metric = Literal["acc", "asr", "ra", "der"]
Selection = Literal["held-out clean", "oracle"]
SplitPart = Literal["tuning", "test"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataEntry(_Table):
    """A data set, pinned by the fingerprints of its two parts; empty where it is bundled with the code."""

    name: str
    train_sha256: str = ""
    test_sha256: str = ""


class ModelEntry(_Table):
    """An architecture at some widths, crossed with everything, or with what is named: empty means all."""

    architecture: str
    widths: tuple[float, ...] = Field(min_length=1)
    options: Mapping[str, Any] = {}
    data: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def meets(self, data: str, recipe: str, attack: str, seed: int) -> bool:
        """Return whether the suite includes victims of this kind."""
        conditions = ((self.data, data), (self.recipes, recipe), (self.attacks, attack), (self.seeds, seed))
        return all(not allowed or value in allowed for allowed, value in conditions)


class RecipeEntry(_Table):
    """How victims are trained: a named recipe and what differs from it, and what rows call that."""

    name: str = "plain"
    changes: Mapping[str, Any] = {}
    label: str = Field(default="", pattern=r"^[a-z0-9.*-]*$")

    @property
    def title(self) -> str:
        """The name in rows: the label, or the recipe's own name, with a star where something differs."""
        return self.label or (f"{self.name}*" if self.changes else self.name)


class AttackEntry(_Table):
    """An attack at some rates, targets and seeds; every combination is a victim."""

    name: str
    poison_rates: tuple[float, ...] = (0.1,)
    targets: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    options: Mapping[str, Any] = {}


class DefenderEntry(_Table):
    """What the defenders own: numbers of clean images, in all or of each class, and seeds of the draws."""

    clean_images: tuple[int, ...] = ()
    per_class: tuple[int, ...] = ()
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)

    def counts(self, classes: int) -> tuple[int, ...]:
        """Return the numbers of clean images of a data set, each once."""
        return tuple(dict.fromkeys((*self.clean_images, *(classes * number for number in self.per_class))))


class AlterationEntry(Alteration):
    """Further defenders, whose images are altered; crossed with all methods and seeds.

    Without ``clean_images`` and ``per_class`` of its own it has those of the defender.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    clean_images: tuple[int, ...] = ()
    per_class: tuple[int, ...] = ()

    def counts(self, classes: int, defender: DefenderEntry) -> tuple[int, ...]:
        """Return the numbers of clean images of a data set."""
        own = DefenderEntry(clean_images=self.clean_images, per_class=self.per_class)
        return own.counts(classes) or defender.counts(classes)

    @property
    def alteration(self) -> dict[str, Any]:
        """What is done, as a specification has it: without what says nothing, so that more may be added."""
        own = ("name", "clean_images", "per_class")
        return self.model_dump(mode="json", exclude=set(own), exclude_defaults=True)


class DefenseEntry(_Table):
    """A defense with some presets.

    With ``selection = "oracle"`` it is run once for every table of ``choices``, laid over ``options``, and
    the judge keeps the one with the best true result: what a choice that saw the attack would have reached.
    """

    name: str
    presets: tuple[str, ...] = ("default",)
    options: Mapping[str, Any] = {}
    selection: Selection = "held-out clean"
    choices: tuple[Mapping[str, Any], ...] = ()


class ScannerEntry(_Table):
    """A scanner with some presets."""

    name: str
    presets: tuple[str, ...] = ("default",)
    options: Mapping[str, Any] = {}


class SplitEntry(_Table):
    """Which victims methods may be developed on, and which they are judged on; by the seed of the victim."""

    tuning: tuple[int, ...] = Field(min_length=1)
    test: tuple[int, ...] = Field(min_length=1)

    def part(self, seed: int) -> SplitPart:
        """Return the part of a seed that one of them has."""
        return "tuning" if seed in self.tuning else "test"


class LimitEntry(_Table):
    """What one cell may take."""

    seconds: float = Field(default=3600, gt=0)
    memory_mb: int = Field(default=8192, ge=256)


class Suite(_Table):
    """A whole suite; see the fields of its tables."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    version: int = Field(ge=1)
    about: str = ""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    metrics: tuple[Metric, ...] = ("acc", "asr", "ra", "der")
    data: tuple[DataEntry, ...] = Field(min_length=1)
    model: tuple[ModelEntry, ...] = Field(min_length=1)
    recipe: tuple[RecipeEntry, ...] = (RecipeEntry(),)
    attack: tuple[AttackEntry, ...] = Field(min_length=1)
    defender: DefenderEntry
    alteration: tuple[AlterationEntry, ...] = ()
    defense: tuple[DefenseEntry, ...] = Field(min_length=1)
    scanner: tuple[ScannerEntry, ...] = ()
    split: SplitEntry | None = None
    limit: LimitEntry = LimitEntry()

    @property
    def label(self) -> str:
        """Name and version, such as ``smoke-v1``."""
        return f"{self.name}-v{self.version}"

    def sha256(self) -> str:
        """Return the hash of everything that decides a number; words about the suite do not."""
        content = self.model_dump(exclude={"about", "limit"}, mode="json")
        # What came later is left out where it says nothing, so that older suites keep their hash.
        if not self.scanner:
            del content["scanner"]
        if self.split is None:
            del content["split"]
        if not self.defender.per_class:
            del content["defender"]["per_class"]
        content["alteration"] = [
            entry.model_dump(mode="json", exclude_defaults=True) for entry in self.alteration
        ]
        if not self.alteration:
            del content["alteration"]
        for defense in content["defense"]:
            if not defense["choices"]:
                del defense["choices"]
        for recipe in content["recipe"]:
            if not recipe["label"]:
                del recipe["label"]
        for model in content["model"]:
            for key in ("data", "recipes", "attacks", "seeds"):
                if not model[key]:
                    del model[key]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def find_suite(name: str, folder: Path) -> Path:
    """Return the file of a suite given by path or by label.

    Raises:
        InputError: If there is none; the closest label is named.
    """
    if name.endswith(".toml"):
        if Path(name).is_file():
            return Path(name)
        raise InputError("the suite file does not exist", where=name)
    files = {file.stem: file for file in sorted(folder.glob("*.toml"))}
    if name not in files:
        raise InputError(
            f"there is no suite {name!r}{near_match(name, files)}",
            expected="one of " + (", ".join(files) or "none"),
            where=folder,
        )
    return files[name]


def load_suite(file: Path) -> Suite:
    """Read and check a suite.

    Raises:
        ConfigError: With every mistake that can be seen without the data.
    """
    subject = f"the suite {file.name}"
    try:
        text = read_text(file, subject, limit=_MAX_SUITE)
    except InputError as error:
        raise ConfigError(subject, [f"it is not TOML: {error.got}"]) from None
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise ConfigError(subject, [str(error)]) from None
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        found = [_fault(fault, values) for fault in error.errors()]
        defender = values.get("defender")
        if isinstance(defender, dict) and not {"clean_images", "per_class"} & defender.keys():
            found.append(_NO_IMAGES)
        raise ConfigError(subject, found) from None
    faults = list(_faults(suite))
    if file.stem != suite.label:
        faults.append(f"the file of {suite.label} must be called {suite.label}.toml, and is {file.name}")
    if faults:
        raise ConfigError(subject, faults)
    return suite


def check_lock(suite: Suite, folder: Path, *, write: bool = True) -> None:
    """Refuse a suite whose content changed under its version; record a version seen for the first time.

    Raises:
        IntegrityError: If the content differs from what the version stood for.
    """
    file = folder / LOCK
    locked: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    digest = suite.sha256()
    if locked.get(suite.label, digest) != digest:
        raise IntegrityError(
            f"the content of {suite.label} changed under the same version",
            expected=locked[suite.label][:12],
            got=digest[:12],
            where=file,
            remedy=f"Undo the change, or copy the suite to {suite.name}-v{suite.version + 1} and change that",
        )
    if write and suite.label not in locked:
        write_json(file, dict(sorted({**locked, suite.label: digest}.items())))


def _fault(fault: Any, values: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key {where!r}{_near_key(fault['loc'])}"
    return f"{where}: {fault['msg']}" + (f", got {fault['input']!r}" if fault["type"] != "missing" else "")


def _near_key(path: tuple[int | str, ...]) -> str:
    """Suggest a key of the table that the path leads to."""
    model: type[BaseModel] = Suite
    for part in path[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            inner = re.search(r"(\w+Entry)", str(model.model_fields[part].annotation))
            if inner:
                model = globals()[inner.group(1)]
    return near_match(str(path[-1]), model.model_fields)


def _faults(suite: Suite) -> Iterator[str]:
    for data in suite.data:
        if data.name not in dataset_names():
            yield _unknown("data set", data.name, dataset_names())
    for model in suite.model:
        for width in model.widths:
            yield from _caught(lambda m=model, w=width: configure(architecture(m, w)))
        yield from _cross_faults(suite, model)
    for recipe in suite.recipe:
        if recipe.name not in RECIPES:
            yield _unknown("recipe", recipe.name, list(RECIPES))
        else:
            yield from _caught(lambda r=recipe: recipe_named(r.name, **r.changes))
    for attack in suite.attack:
        yield from _attack_faults(attack)
    for defense in suite.defense:
        tables = [{**defense.options, **choice} for choice in defense.choices or ({},)]
        yield from _part_faults(DEFENSES, defense.name, [(p, t) for p in defense.presets for t in tables])
        if (defense.selection == "oracle") != bool(defense.choices):
            yield f'defense {defense.name}: selection = "oracle" and a list of choices belong together'
    for scanner in suite.scanner:
        yield from _part_faults(SCANNERS, scanner.name, [(p, scanner.options) for p in scanner.presets])
    if suite.split is not None:
        yield from _split_faults(suite.split, {seed for attack in suite.attack for seed in attack.seeds})
    if "none" not in {defense.name for defense in suite.defense}:
        yield "defense: the null row 'none' is missing; every suite runs it"
    if "none" not in {attack.name for attack in suite.attack}:
        yield "attack: the clean control 'none' is missing; every suite runs it"
    if not suite.defender.counts(1):
        yield _NO_IMAGES
    for where, entry in (
        ("defender", suite.defender),
        *(("alteration", entry) for entry in suite.alteration),
    ):
        for amount in ("clean_images", "per_class"):
            if min(getattr(entry, amount), default=1) < 1:
                yield f"{where}.{amount}: must be at least 1, got {min(getattr(entry, amount))}"
    yield from _alteration_faults(suite.alteration)


def _alteration_faults(entries: Sequence[AlterationEntry]) -> Iterator[str]:
    names = [entry.name for entry in entries]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"alteration: two are called {name!r}"
    for entry in entries:
        if not entry.alteration:
            yield f"alteration {entry.name}: nothing is altered"
        if entry.classes and not entry.foreign:
            yield f"alteration {entry.name}: classes belong to a foreign set, and none is named"


def _cross_faults(suite: Suite, model: ModelEntry) -> Iterator[str]:
    """Yield what a model is to be crossed with and the suite does not have."""
    seeds = {str(seed) for attack in suite.attack for seed in attack.seeds}
    for kind, requested, available in (
        ("data set", model.data, [entry.name for entry in suite.data]),
        ("recipe", model.recipes, [entry.label or entry.name for entry in suite.recipe]),
        ("attack", model.attacks, [entry.name for entry in suite.attack]),
        ("seed", tuple(map(str, model.seeds)), sorted(seeds)),
    ):
        for name in requested:
            if name not in available:
                yield f"model {model.architecture}: {_unknown(kind + ' of this suite', name, available)}"


def _split_faults(split: SplitEntry, seeds: set[int]) -> Iterator[str]:
    """Yield the seeds that are in both parts, and those of victims that are in neither."""
    for faulty, words in (
        (set(split.tuning) & set(split.test), "in both parts"),
        (seeds - set(split.tuning) - set(split.test), "in neither part"),
    ):
        if faulty:
            yield f"split: {words}: seed " + ", ".join(map(str, sorted(faulty)))


def _attack_faults(attack: AttackEntry) -> Iterator[str]:
    if attack.name not in ATTACKS:
        yield _unknown("attack", attack.name, list(ATTACKS))
        return
    for options in attack_options(attack):
        yield from _caught(lambda o=options: ATTACKS[attack.name].configure(o))


def _part_faults(
    table: Registry[Any], name: str, settings: list[tuple[str, Mapping[str, Any]]]
) -> Iterator[str]:
    if name not in table:
        yield _unknown(table.kind, name, list(table))
        return
    for preset, options in settings:
        yield from _caught(lambda p=preset, o=options: table[name].configure(o, preset=p))


def attack_options(attack: AttackEntry) -> Iterator[dict[str, Any]]:
    """Yield the options of every combination of rate and target; the clean control has only one."""
    if attack.name == "none":
        yield dict(attack.options)
        return
    for rate in attack.poison_rates:
        for target in attack.targets:
            yield {**attack.options, "poison_rate": rate, "target": target}


def architecture(model: ModelEntry, width: float) -> str:
    """Return the specification string of a model entry at one width."""
    width_text = int(width) if float(width).is_integer() and model.architecture != "mobilenet_v2" else width
    options = ",".join([f"width={width_text}", *(f"{k}={v}" for k, v in model.options.items())])
    return f"{model.architecture}[{options}]"


def architecture_label(model: ModelEntry) -> str:
    """Return what a model entry is called in rows: without its width, which is a column of its own."""
    options = ",".join(f"{key}={value}" for key, value in model.options.items())
    return f"{model.architecture}[{options}]" if options else model.architecture


def _unknown(kind: str, name: str, available: list[str]) -> str:
    return f"unknown {kind} {name!r}{near_match(name, available)}; there are: {', '.join(available)}"


def _caught(check: Any) -> Iterator[str]:
    try:
        check()
    except ConfigError as error:
        yield from (f"{error.subject}: {fault}" for fault in error.faults)
