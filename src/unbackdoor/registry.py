"""One table per kind of part: the names of the parts, their needs and their options.

A part registers itself where it is written::

    @defense("ft", config=FTConfig, paper="...", needs={"images", "labels"})
    def purify(model, data, cfg, *, run): ...

Listings, command-line options, documentation and the contract tests read these tables, so that a name,
a default or a bound stands in one place only.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypedDict, TypeVar, Unpack, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unbackdoor.errors import ConfigError, InputError

if TYPE_CHECKING:
    from torch import nn

    from unbackdoor.types import Classifier, CleanData, Images, Purified, ScanReport, Screening

F = TypeVar("F", bound=Callable[..., Any])
# Convolutions with batch normalisation, convolutions without, and attention.
FAMILIES = frozenset({"conv-bn", "conv", "transformer"})


def option(
    default: Any,
    meaning: str,
    *,
    source: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Declare one option of a config: its default, meaning, bounds and the source of the default.

    Args:
        default: Value used when the user sets none.
        meaning: What it does, with unit and range, in one line.
        source: Paper, reference code or measurement that the default comes from.
        ge: Smallest allowed value.
        gt: Value that must be exceeded.
        le: Largest allowed value.
        lt: Value that must not be reached.
    """
    return Field(
        default, description=meaning, json_schema_extra={"source": source}, ge=ge, gt=gt, le=le, lt=lt
    )


class Config(BaseModel):
    """Options of a part: frozen and strict; one error lists all faults.

    Raises:
        ConfigError: From :meth:`parse`, with every fault at once and near matches for misspelt names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, subject: str) -> Self:
        """Build a config from plain values, reporting all faults in one ConfigError."""
        try:
            # JSON and TOML have lists where an option has a tuple.
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls.model_validate(plain)
        except ValidationError as error:
            raise ConfigError(subject, list(_faults(cls, error))) from None

    @classmethod
    def parse_text(cls, pairs: Mapping[str, str], *, subject: str) -> Self:
        """Build a config from texts such as ``{"epochs": "20"}``, as typed on a command line."""
        try:
            return cls.model_validate_strings(dict(pairs), strict=False)
        except ValidationError as error:
            raise ConfigError(subject, list(_faults(cls, error))) from None


def _faults(config: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"]) or "options"
        if fault["type"] == "extra_forbidden":
            yield f"unknown option {name!r}{near_match(name, config.model_fields)}"
        else:
            yield f"{name}: {fault['msg']}, got {fault['input']!r}"


def near_match(name: str, names: Mapping[str, Any] | list[str]) -> str:
    """Return `` (did you mean ...?)`` for the closest of the names, or an empty text."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True)
class Variant:
    """Another way to run a scanner, which ``scan`` offers as a check of its own.

    Attributes:
        question: What it asks, in words for the report.
        options: What differs from the scanner's defaults.
    """

    question: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class References:
    """How a scanner calibrates itself on clean models: by a number that scans of these have reported.

    Attributes:
        statistic: Name of the finding whose values of clean models are wanted.
        option: Option of the scanner that takes them, a tuple of numbers.
        unrelated: Options that the statistic does not depend on, so that they may differ between the scans.
    """

    statistic: str
    option: str
    unrelated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ScannerFacts:
    """What ``scan`` has to know of a scanner.

    Attributes:
        question: What it asks, in words for the report. A scanner without one runs only where it is named.
        cost: Place in the order of the checks: what costs less comes first. Those of this package have 10 to
            50, from no forward pass to many trainings.
        variants: Further checks by the part of their name behind the colon.
        references: How clean models calibrate it, if they can.
        as_it_is: Whether it is given the model and the images as they are, and not in the form that makes
            networks comparable (:mod:`unbackdoor.engine.canonical_form`).
        most_classes: With more classes than this it runs only where it is named; None is no limit.
    """

    question: str = ""
    cost: float = 100.0
    variants: Mapping[str, Variant] = field(default_factory=dict)
    references: References | None = None
    as_it_is: bool = False
    most_classes: int | None = None


@dataclass(frozen=True)
class Part(Generic[F]):
    """A registered part: an attack, a defense, a scanner, a screener or an architecture."""

    name: str
    kind: str
    function: F
    config: type[Config]
    paper: str
    needs: frozenset[str]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    traits: frozenset[str] = frozenset()
    version: int = 1
    scanning: ScannerFacts = ScannerFacts()
    quick: Mapping[str, Any] = field(default_factory=dict)  # options that make it quick on a tiny network
    families: frozenset[str] = FAMILIES

    @property
    def summary(self) -> str:
        """First sentence of the documentation of the part's module, or of its function where that differs."""
        module = inspect.getmodule(self.function)
        own_file = module is not None and self.name in module.__name__.split(".")[-2:]
        text = inspect.getdoc(module if own_file else self.function)
        return (text or "").strip().split("\n\n")[0].replace("\n", " ")

    def configure(self, values: Mapping[str, Any] | None = None, *, preset: str | None = None) -> Config:
        """Return the config of a preset with the given values laid over it.

        Raises:
            ConfigError: If the preset is unknown or a value does not fit; all faults at once.
        """
        return self.config.parse({**self._preset(preset), **(values or {})}, subject=self._subject)

    def configure_text(self, pairs: Mapping[str, str], *, preset: str | None = None) -> Config:
        """Like :meth:`configure` for values typed as text."""
        base = {name: str(value) for name, value in self._preset(preset).items()}
        return self.config.parse_text({**base, **pairs}, subject=self._subject)

    @property
    def _subject(self) -> str:
        return f"the {self.kind} {self.name!r}"

    def _preset(self, name: str | None) -> Mapping[str, Any]:
        if name is None or (name == "default" and name not in self.presets):
            return {}
        if name not in self.presets:
            available = ", ".join(["default", *self.presets])
            raise ConfigError(
                self._subject,
                [f"unknown preset {name!r}{near_match(name, self.presets)}; it has: {available}"],
            )
        return self.presets[name]


class Registry(Generic[F]):
    """The parts of one kind by name; their package is imported at the first look-up.

    Other distributions add parts of their own: the modules that they name as entry points of a group called
    like the package are imported too, and register what they hold.

    Args:
        kind: Word used in messages, such as ``defense``.
        package: Package whose import registers the parts. Named, not imported, because the tables lie
            below the parts.
        positional: Names of the positional parameters of a part's function; checked where there are any.
        keywords: Names of its keyword-only parameters.
    """

    def __init__(
        self, kind: str, package: str, *, positional: tuple[str, ...] = (), keywords: tuple[str, ...] = ()
    ) -> None:
        self.kind = kind
        self.positional = positional
        self.keywords = keywords
        self._package = package
        self._parts: dict[str, Part[F]] = {}
        self._complete = False

    def register(
        self,
        name: str,
        *,
        config: type[Config] = Config,
        paper: str = "",
        needs: set[str] | frozenset[str] = frozenset(),
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        traits: set[str] | frozenset[str] = frozenset(),
        version: int = 1,
        scanning: ScannerFacts | None = None,
        quick: Mapping[str, Any] | None = None,
        families: set[str] | frozenset[str] = FAMILIES,
    ) -> Callable[[F], F]:
        """Return a decorator that enters a function under ``name``; a second owner of a name is refused.

        Args:
            name: What users call it.
            config: Its options.
            paper: Where it comes from, or what it is.
            needs: What it must be given: ``images``, ``labels``, :data:`ONE_A_CLASS`, :data:`INPUT_LABELS`.
            presets: Named options that differ from the defaults.
            traits: Properties that other parts of the package ask for, such as ``control``.
            version: Raised whenever its results change.
            quick: Options with which it takes a second on a tiny network; its mathematics stays the same.
                The contract suite of :mod:`unbackdoor.testing` runs it with them.
            families: Families of networks it works on, of :data:`FAMILIES`.

        Raises:
            ConfigError: From the decorator, if the name is taken, or the function does not take what every
                part of its kind takes.
        """

        def enter(function: F) -> F:
            if name in self._parts and self._parts[name].function.__module__ != function.__module__:
                raise ConfigError(f"the {self.kind} registry", [f"the name {name!r} is taken"])
            if faults := self._misfits(function, config):
                raise ConfigError(f"the {self.kind} {name!r}", faults)
            self._parts[name] = Part(
                name=name,
                kind=self.kind,
                function=function,
                config=config,
                paper=paper,
                needs=frozenset(needs),
                presets=MappingProxyType({k: MappingProxyType(dict(v)) for k, v in (presets or {}).items()}),
                traits=frozenset(traits),
                version=version,
                scanning=scanning or ScannerFacts(),
                quick=MappingProxyType(dict(quick or {})),
                families=frozenset(families),
            )
            return function

        return enter

    def _misfits(self, function: Callable[..., Any], config: type[Config]) -> list[str]:
        """Return faults in a function's parameters as sentences; types are left to a type checker."""
        if not self.positional:
            return []
        faults = []
        signature = inspect.signature(function)
        expected = (*self.positional, *self.keywords)
        if tuple(signature.parameters) != expected:
            faults.append(
                f"its parameters must be {', '.join(expected)}, got {', '.join(signature.parameters)}"
            )
        else:
            try:
                signature.bind(*self.positional, **dict.fromkeys(self.keywords))
            except TypeError as error:
                called = ", ".join([*self.positional, *(f"{name}=..." for name in self.keywords)])
                faults.append(f"it cannot be called with ({called}): {error}")
        try:
            annotated = inspect.get_annotations(function, eval_str=True).get("cfg")
        except Exception:  # noqa: BLE001  a name that is imported for type checking only
            annotated = None
        # Any is a class as well.
        if (
            isinstance(annotated, type)
            and issubclass(annotated, Config)
            and not issubclass(config, annotated)
        ):
            faults.append(f"it takes {annotated.__name__} as cfg, and is registered with {config.__name__}")
        return faults

    def __getitem__(self, name: str) -> Part[F]:
        parts = self._loaded()
        if name not in parts:
            raise InputError(
                f"unknown {self.kind} {name!r}{near_match(name, parts)}",
                expected="one of " + ", ".join(sorted(parts)),
            )
        return parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __contains__(self, name: object) -> bool:
        return name in self._loaded()

    def __len__(self) -> int:
        return len(self._loaded())

    def _loaded(self) -> dict[str, Part[F]]:
        importlib.import_module(self._package)
        if not self._complete:
            self._complete = True  # now, because a plug-in may look something up while it is imported
            for entry in importlib.metadata.entry_points(group=self._package):
                self._load(entry)
        return self._parts

    def _load(self, entry: importlib.metadata.EntryPoint) -> None:
        try:
            entry.load()
        except Exception as error:
            self._complete = False
            owner = entry.dist.name if entry.dist else "the package it belongs to"
            raise InputError(
                f"the {self.kind} plug-in {entry.name!r} cannot be loaded",
                got=f"{type(error).__name__}: {error}",
                where=entry.value,
                remedy=f"Update or uninstall {owner}",
            ) from error


# ---------------------------------------------------------------------------------------------------
# The kinds


C = TypeVar("C", bound=Config)
Options = TypeVar("Options", bound=Config, contravariant=True)

# The run of a method, the trigger of an attack and the geometry of an architecture are defined in rooms above
# this one; they are Any here, and the packages that call the functions know them.


class DefenseFunction(Protocol[Options]):
    """A defense: repairs the copy of the model that it is given."""

    def __call__(self, model: Classifier, data: CleanData, cfg: Options, *, run: Any) -> Purified:
        """Return the repaired model and what the method has to say of itself."""
        ...


class ScannerFunction(Protocol[Options]):
    """A scanner: looks at a model for a backdoor."""

    def __call__(self, model: Classifier, data: CleanData, cfg: Options, *, run: Any) -> ScanReport:
        """Return what was looked for and found."""
        ...


class ScreenerFunction(Protocol[Options]):
    """A screener: looks at images of unknown origin."""

    def __call__(
        self, model: Classifier, data: CleanData, inputs: Images, cfg: Options, *, run: Any
    ) -> Screening:
        """Return a score for each image."""
        ...


class AttackFunction(Protocol[Options]):
    """An attack: makes a trigger for images of a shape (C, H, W)."""

    def __call__(self, cfg: Options, *, shape: tuple[int, int, int], classes: int, seed: int) -> Any:
        """Return the trigger, an ``unbackdoor.attacks.Trigger``."""
        ...


class ArchitectureFunction(Protocol[Options]):
    """An architecture: makes an untrained network."""

    def __call__(self, cfg: Options, geometry: Any) -> nn.Module:
        """Return a network from normalised images to logits."""
        ...


class Facts(TypedDict, total=False):
    """What a registration may say of a part; see :meth:`Registry.register`."""

    paper: str
    needs: set[str] | frozenset[str]
    presets: Mapping[str, Mapping[str, Any]] | None
    traits: set[str] | frozenset[str]
    version: int
    quick: Mapping[str, Any] | None
    families: set[str] | frozenset[str]


_METHOD_PARAMETERS: dict[str, tuple[str, ...]] = {
    "positional": ("model", "data", "cfg"),
    "keywords": ("run",),
}
INPUT_LABELS = (
    "input labels"  # a need of screeners of training sets: they are shown the labels of what they screen
)
SUSPICION = "suspicion"  # a trait of defenses: they begin with suspected classes and triggers; see ``Run``
ONE_A_CLASS = "as many images as classes"  # a need of defenses

DEFENSES: Registry[DefenseFunction[Any]] = Registry("defense", "unbackdoor.defenses", **_METHOD_PARAMETERS)
ATTACKS: Registry[AttackFunction[Any]] = Registry(
    "attack", "unbackdoor.attacks", positional=("cfg",), keywords=("shape", "classes", "seed")
)
SCANNERS: Registry[ScannerFunction[Any]] = Registry("scanner", "unbackdoor.scanners", **_METHOD_PARAMETERS)
SCREENERS: Registry[ScreenerFunction[Any]] = Registry(
    "screener",
    "unbackdoor.screeners",
    positional=("model", "data", "inputs", "cfg"),
    keywords=("run",),
)
ARCHITECTURES: Registry[ArchitectureFunction[Any]] = Registry(
    "architecture", "unbackdoor.networks", positional=("cfg", "geometry")
)


def defense(
    name: str, *, config: type[C], **facts: Unpack[Facts]
) -> Callable[[DefenseFunction[C]], DefenseFunction[C]]:
    """Return a decorator that registers a defense; see :meth:`Registry.register`."""
    return DEFENSES.register(name, config=config, **facts)


def attack(
    name: str, *, config: type[C], **facts: Unpack[Facts]
) -> Callable[[AttackFunction[C]], AttackFunction[C]]:
    """Return a decorator that registers an attack; see :meth:`Registry.register`."""
    return ATTACKS.register(name, config=config, **facts)


def screener(
    name: str, *, config: type[C], **facts: Unpack[Facts]
) -> Callable[[ScreenerFunction[C]], ScreenerFunction[C]]:
    """Return a decorator that registers a screener; see :meth:`Registry.register`."""
    return SCREENERS.register(name, config=config, **facts)


def architecture(
    name: str, *, config: type[C], **facts: Unpack[Facts]
) -> Callable[[ArchitectureFunction[C]], ArchitectureFunction[C]]:
    """Return a decorator that registers an architecture; see :meth:`Registry.register`."""
    return ARCHITECTURES.register(name, config=config, **facts)


def scanner(
    name: str,
    *,
    config: type[C],
    question: str = "",
    cost: float = ScannerFacts.cost,
    variants: Mapping[str, Variant] | None = None,
    references: References | None = None,
    as_it_is: bool = False,
    most_classes: int | None = None,
    **facts: Unpack[Facts],
) -> Callable[[ScannerFunction[C]], ScannerFunction[C]]:
    """Return a decorator that registers a scanner; ``scan`` learns all it has to know of it from here.

    Args:
        name: Name of the scanner, and of its check.
        config: Its options.
        question: See :class:`ScannerFacts`, as for the next four.
        cost: Likewise.
        variants: Likewise.
        references: Likewise.
        as_it_is: Likewise.
        most_classes: Likewise.
        **facts: See :meth:`Registry.register`.

    Raises:
        ConfigError: If the name is taken, or options of a variant do not fit.
    """
    for key, variant in (variants or {}).items():
        config.parse(variant.options, subject=f"the variant {key!r} of the scanner {name!r}")
    scanning = ScannerFacts(
        question, cost, MappingProxyType(dict(variants or {})), references, as_it_is, most_classes
    )
    return SCANNERS.register(name, config=config, scanning=scanning, **facts)


def load_all(package: str) -> None:
    """Import every public module of a package, so that its parts register themselves."""
    import pkgutil

    parent = cast(Any, importlib.import_module(package))
    for module in pkgutil.iter_modules(parent.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
