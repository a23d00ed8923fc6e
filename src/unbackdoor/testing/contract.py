"""Contracts, and how a part is held to one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from unbackdoor.engine.trusted_caller import run, scan, screen
from unbackdoor.errors import InputError, MethodFailed, UnbackdoorError, UnsupportedModel
from unbackdoor.registry import ATTACKS, DEFENSES, SCANNERS, SCREENERS, Part, Registry
from unbackdoor.testing.examples import tiny_data
from unbackdoor.triggers import Suspicion
from unbackdoor.types import Classifier, CleanData, Images, Purified, ScanReport, Screening

Kind = Literal["attack", "defense", "scanner", "screener"]
Method: TypeAlias = str | Part[Any] | Callable[..., Any]
Result: TypeAlias = Purified | ScanReport | Screening

REGISTRIES: dict[str, Registry[Any]] = {
    "attack": ATTACKS,
    "defense": DEFENSES,
    "scanner": SCANNERS,
    "screener": SCREENERS,
}
PARAMETERS = {kind: [*table.positional, *table.keywords] for kind, table in REGISTRIES.items()}


@dataclass(frozen=True)
class Subject:
    """The part that is held to its contract, and the options it is run with."""

    part: Part[Any]
    options: Mapping[str, Any]

    def call(
        self,
        model: Classifier,
        data: CleanData,
        *,
        inputs: Images | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        suspicion: Suspicion | None = None,
    ) -> Result:
        """Run it by its trusted caller, on the CPU in fp32."""
        how: dict[str, Any] = {
            "options": self.options if options is None else options,
            "precision": "fp32",
            "seed": seed,
        }
        if self.part.kind == "screener":
            screened = tiny_data(48, seed=7) if inputs is None else inputs
            return screen(self.part, model, data, screened, **how)
        if self.part.kind == "scanner":
            return scan(self.part, model, data, **how)
        return run(self.part, model, data, suspicion=suspicion, **how)

    def attempt(
        self, situation: str, model: Classifier, data: CleanData, inputs: Images | None = None
    ) -> Result | None:
        """Return the result, or None where it refused with an error that it found by itself.

        Either way, the model and the data must be as they were.
        """
        before = state_of(model), data.fingerprint()
        try:
            result: Result | None = self.call(model, data, inputs=inputs)
        except (InputError, UnsupportedModel, MethodFailed) as error:
            demand(
                " raised " not in str(error),
                f"{situation}: expected a result, or an error of its own that says why not, got: {error}",
            )
            result = None
        demand((state_of(model), data.fingerprint()) == before, f"{situation}: something was left behind")
        return result


@dataclass(frozen=True)
class Check:
    """One contract of one kind of part; calling it with a part raises AssertionError where that is broken.

    Attributes:
        kind: ``attack``, ``defense``, ``scanner`` or ``screener``.
        name: What the contract is called in messages.
        meaning: What it asks for, in one sentence.
    """

    kind: Kind
    name: str
    meaning: str
    function: Callable[[Subject], None]

    def __call__(self, method: Method, *, options: Mapping[str, Any] | None = None) -> None:
        """Hold a part to the contract.

        Args:
            method: Its registered name, the registered function, or the part.
            options: Options that make it quick; by default those of its registration.

        Raises:
            AssertionError: If it breaks the contract.
        """
        part = part_of(self.kind, method)
        try:
            self.function(Subject(part, part.quick if options is None else options))
        except Exception as error:
            reason = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
            raise AssertionError(
                f"the {self.kind} {part.name!r} breaks the contract {self.name!r} ({self.meaning}): {reason}"
            ) from error

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


_CHECKS: list[tuple[tuple[Kind, ...], str, str, Callable[[Subject], None]]] = []
METHODS: tuple[Kind, ...] = ("defense", "scanner", "screener")


def contract(
    *kinds: Kind, name: str, meaning: str
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enter a function among the checks of some kinds; see :class:`Check`."""

    def enter(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        _CHECKS.append((kinds, name, meaning, function))
        return function

    return enter


def checks_of(kind: Kind) -> Iterator[Check]:
    """Yield the checks of a kind of part, for one test each.

    Args:
        kind: ``attack``, ``defense``, ``scanner`` or ``screener``.

    Raises:
        InputError: If there is no such kind.
    """
    if kind not in get_args(Kind):
        raise InputError("there is no such kind of part", expected=" | ".join(get_args(Kind)), got=repr(kind))
    for kinds, name, meaning, function in _CHECKS:
        if kind in kinds:
            yield Check(kind, name, meaning, function)


def part_of(kind: str, method: Method) -> Part[Any]:
    """Return the part of a name or a function; raises InputError where there is none of the kind."""
    if isinstance(method, str):
        return REGISTRIES[kind][method]
    if isinstance(method, Part):
        part = method
    else:
        there = [REGISTRIES[kind][name] for name in REGISTRIES[kind]]
        registered = [part for part in there if part.function is method]
        if not registered:
            raise InputError(
                f"the function is not registered as {kind}", got=getattr(method, "__qualname__", method)
            )
        part = registered[0]
    if part.kind != kind:
        raise InputError("the part is of another kind", expected=kind, got=part.kind, where=part.name)
    return part


def demand(holds: bool, message: str) -> None:
    """Raise AssertionError with the message unless something holds."""
    if not holds:
        raise AssertionError(message)


def raises(kind: type[UnbackdoorError], words: str, call: Callable[[], object], situation: str) -> None:
    """Demand that a call refuses with one of our errors, in these words."""
    try:
        call()
    except kind as error:
        demand(re.search(words, str(error)) is not None, f"{situation}: expected {words!r}, got: {error}")
        return
    except Exception as error:
        message = f"{situation}: expected {kind.__name__}, got {type(error).__name__}: {error}"
        raise AssertionError(message) from error
    raise AssertionError(f"{situation}: expected {kind.__name__}, and it was accepted")


def state_of(model: Classifier) -> list[object]:
    """Return all that a method could leave on a model."""
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return [model.sha256(), hooks, grads, [m.training for m in model.modules()]]
