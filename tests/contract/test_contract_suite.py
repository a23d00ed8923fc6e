"""The contract suite catches a bad method: for each contract, one that breaks it and nothing much besides."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ConfigDict

import unbackdoor.plugins as up
from unbackdoor.engine import rng, trusted_caller
from unbackdoor.errors import InputError
from unbackdoor.registry import DEFENSES, SCANNERS, SUSPICION, Part
from unbackdoor.testing import (
    Kind,
    check_attack,
    check_defense,
    check_scanner,
    check_screener,
    checks_of,
)

DOCUMENTED = """Do a thing.

Paper:   none. Needs: images. Changes: nothing. Departs: in nothing. Cost: none. Blind: always.
"""
KINDS: tuple[Kind, ...] = ("defense", "scanner", "screener", "attack")


class Options(up.Config):
    """Options of a method."""

    strength: float = up.option(0.5, "how much", source="a test", ge=0)


class Unexplained(up.Config):
    """An option that nothing is said of."""

    strength: float = 0.5


class Unsourced(up.Config):
    """An option whose default comes from nowhere."""

    strength: float = up.option(0.5, "how much", source="")


class AttackOptions(up.AttackConfig):
    """Options of an attack."""


class Loose(up.AttackConfig):
    """Accepts what it does not know."""

    model_config = ConfigDict(extra="ignore")


def part(kind: Kind, function: Callable[..., Any], **facts: Any) -> Part[Any]:
    """Return a part that nobody else meets, documented unless the function says something else."""
    if function.__doc__ is None:
        function.__doc__ = DOCUMENTED
    config = AttackOptions if kind == "attack" else Options
    needs = frozenset() if kind == "attack" else frozenset({"images"})
    return Part("local", kind, function, **{"config": config, "paper": "none", "needs": needs, **facts})


def returned(kind: Kind, model: Any, inputs: Any, evidence: dict[str, Any]) -> Any:
    """Return what an honest method of a kind returns that finds nothing."""
    if kind == "defense":
        return up.Purified(model, evidence)
    if kind == "scanner":
        findings = [up.Finding(name, 0.0, "large", 1.0, "none") for name in evidence]
        return up.ScanReport("no evidence found", tuple(findings), coverage=("a look",))
    n = len(inputs)
    return up.Screening(
        torch.zeros(n), torch.ones(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n).bool(), evidence
    )


Act = Callable[[Any, Any, Any], Any]


def method(kind: Kind, act: Act, *, evidence: dict[str, Any] | None = None, **facts: Any) -> Part[Any]:
    """Return a method that acts on (model, data, run), and answers as an honest one or as the act does."""
    if kind == "screener":

        def screen(model: Any, data: Any, inputs: Any, cfg: Any, *, run: Any) -> Any:
            out = act(model, data, run)
            return returned(kind, model, inputs, evidence or {}) if out is None else out

        return part(kind, screen, **facts)

    def purify(model: Any, data: Any, cfg: Any, *, run: Any) -> Any:
        out = act(model, data, run)
        return returned(kind, model, None, evidence or {}) if out is None else out

    return part(kind, purify, **facts)


def trigger(act: Callable[[torch.Tensor], torch.Tensor], **facts: Any) -> Part[Any]:
    """Return an attack with this stamp."""

    def attack(cfg: Any, *, shape: Any, classes: int, seed: int) -> Any:
        return up.Trigger(stamp=act)

    return part("attack", attack, **facts)


def bright(pixels: torch.Tensor) -> torch.Tensor:
    """Whiten one pixel."""
    out = pixels.clone()
    out[..., 0, 0] = 255 - out[..., 0, 0]
    return out


def nothing(model: Any, data: Any, run: Any) -> None:
    """Look at the images with the model, as every method does."""
    up.predict(model, data.all, run)


def honest(model: Any, data: Any, run: Any) -> None:
    """Look, and say so if there is nothing to see."""
    if not bool(up.predict(model, data.all, run).isfinite().all()):
        raise up.MethodFailed("the logits are not finite")


# ---------------------------------------------------------------------------------------------------
# What each contract must catch


def forgets(model: Any, data: Any, run: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


def believes_all(model: Any, data: Any, run: Any) -> None:
    if run.suspicion is not None:
        forgets(model, data, run)


def not_numbers(model: Any, data: Any, run: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


def hook(model: Any, data: Any, run: Any) -> None:
    model.register_forward_hook(lambda *given: None)


def global_hook(model: Any, data: Any, run: Any) -> None:
    torch.nn.modules.module.register_module_forward_hook(lambda *given: None)


def training_mode(model: Any, data: Any, run: Any) -> None:
    model.train()


def global_draw(model: Any, data: Any, run: Any) -> None:
    torch.rand(1)


def python_draw(model: Any, data: Any, run: Any) -> None:
    random.random()


def other_form(model: Any, data: Any, run: Any) -> None:
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(layer.weight[:-1])


def hidden_draw(kind: Kind) -> Part[Any]:
    """Draw from the global generator and put it back: nothing left behind, and no seed decides."""

    def act(model: Any, data: Any, run: Any) -> Any:
        with torch.random.fork_rng():
            noise = float(torch.rand(1))
        if kind == "scanner":
            return up.ScanReport(
                "no evidence found", (up.Finding("x", noise, "l", 1.0, "n"),), coverage=("a",)
            )
        drawn.update(noise=noise)
        return None

    drawn: dict[str, Any] = {}
    return method(kind, act, evidence=drawn)


def counts(kind: Kind) -> Part[Any]:
    """Remember earlier calls."""
    calls: list[int] = []
    said: dict[str, Any] = {}

    def act(model: Any, data: Any, run: Any) -> Any:
        calls.append(1)
        said.update(calls=len(calls))
        if kind == "scanner":
            found = up.Finding("calls", float(len(calls)), "large", 1.0, "none")
            return up.ScanReport("no evidence found", (found,), coverage=("a look",))
        return None

    return method(kind, act, evidence=said)


def swallows(model: Any, data: Any, run: Any) -> None:
    with suppress(RuntimeError):
        nothing(model, data, run)


def hides(model: Any, data: Any, run: Any) -> None:
    try:
        nothing(model, data, run)
    except RuntimeError:
        raise up.MethodFailed("something went wrong") from None


def leaks_when_it_raises(model: Any, data: Any, run: Any) -> None:
    torch.set_grad_enabled(False)
    nothing(model, data, run)
    torch.set_grad_enabled(True)


def reads_labels(model: Any, data: Any, run: Any) -> None:
    data.fit.labels.sum()


def needs_images(model: Any, data: Any, run: Any) -> None:
    data.fit.pixels[0]


def two_of_each(model: Any, data: Any, run: Any) -> None:
    if len(data) < 8:
        raise up.TooFewImages("too few")


def second_class(model: Any, data: Any, run: Any) -> None:
    (data.all.truth == 1).nonzero()[0]


def classes_apart(model: Any, data: Any, run: Any) -> None:
    spread = float(up.predict(model, data.all, run).std(0).sum())
    if not spread > 1e-3:
        raise IndexError("no class stands apart")


def first_convolution(model: Any, data: Any, run: Any) -> None:
    next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))


def first_norm(model: Any, data: Any, run: Any) -> None:
    next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def norms_only(model: Any, data: Any, run: Any) -> None:
    if not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()):
        raise up.UnsupportedModel("there is no norm")


def clean_logits(model: Any, data: Any, run: Any) -> Any:
    """Say that nothing is wrong, whatever the network answers."""
    return


def signature(kind: Kind) -> Part[Any]:
    return part(kind, lambda model, data, run: None)


def undocumented(kind: Kind) -> Part[Any]:
    def function(model: Any) -> None:
        """Do a thing."""

    return part(kind, function)


def on_methods(act: Act, **facts: Any) -> Callable[[Kind], Part[Any]]:
    return lambda kind: method(kind, act, **facts)


def ignorant(kind: Kind) -> Part[Any]:
    """Take options of a config that accepts anything."""
    return part(kind, lambda cfg: None, config=Loose)


Case = tuple[Callable[[Kind], Part[Any]], str]
EVERYBODY: dict[str, list[Case]] = {
    "signature": [(signature, r"expected \['")],
    "documentation": [
        (undocumented, "lacks Paper:"),
        (lambda kind: part(kind, lambda: None, paper=""), "no paper"),
        (lambda kind: part(kind, lambda: None, presets={"odd": {"strength": 1.0}}), "the preset odd"),
    ],
    "options": [
        (lambda kind: part(kind, lambda: None, config=Unexplained), "'strength' has no meaning"),
        (lambda kind: part(kind, lambda: None, config=Unsourced), "'strength' has no source"),
        (lambda kind: part(kind, lambda: None, quick={"speed": 9}), "unknown option 'speed'"),
        (
            lambda kind: part(kind, lambda: None, config=Options, presets={"same": {"strength": 0.5}}),
            "the default under another name",
        ),
        (
            lambda kind: part(kind, lambda: None, config=Options, presets={"bad": {"force": 1}}),
            "unknown option 'force'",
        ),
    ],
    "unknown options": [(ignorant, "unknown options were accepted")],
}
LOOKERS: dict[str, list[Case]] = {
    "any family": [
        (on_methods(first_norm), "raised StopIteration"),
        (on_methods(norms_only), "claims the family conv, and refused it"),
        (on_methods(nothing, families={"conv", "gru"}), "no family"),
        (on_methods(nothing, families=set()), "claims no family"),
        (on_methods(global_draw), "torch's global generator"),
        (on_methods(python_draw), "Python's global generator"),
        (on_methods(global_hook), "global forward hooks"),
        (on_methods(lambda model, data, run: 7), "returned no"),
    ],
    "same seed, same bytes": [(hidden_draw, "differ"), (counts, "differ")],
    "evidence": [(on_methods(nothing, evidence={"attack success rate": 0.0}), "judges itself")],
    "failure half-way": [
        (on_methods(swallows), "swallowed|does not say so"),
        (on_methods(hides), "hidden behind"),
        (on_methods(leaks_when_it_raises), "the gradient mode"),
    ],
    "declared needs": [(on_methods(reads_labels), "raised AttributeError")],
    "few images": [(on_methods(second_class), "raised IndexError")],
    "useless networks": [(on_methods(classes_apart), "raised IndexError")],
    "odd networks": [(on_methods(first_convolution), "raised StopIteration")],
}
BROKEN: dict[Kind, dict[str, list[Case]]] = {
    "defense": {
        **EVERYBODY,
        **LOOKERS,
        "any family": [
            *LOOKERS["any family"],
            (on_methods(forgets), "must be on more than 0.7"),
            (on_methods(not_numbers), "not finite"),
            (on_methods(hook), "a hook on"),
            (on_methods(training_mode), "training mode"),
            (on_methods(other_form), "changed the form"),
        ],
        "evidence": [
            *LOOKERS["evidence"],
            (on_methods(nothing, evidence={"loss": float("nan")}), "not JSON compliant"),
            (on_methods(nothing, evidence={"mask": torch.zeros(1)}), "not JSON serializable"),
            (on_methods(nothing, evidence={"a": [{"ASR": 0.0}]}), "judges itself: ASR"),
        ],
        "declared needs": [
            *LOOKERS["declared needs"],
            (on_methods(needs_images, needs=set()), "raised IndexError"),
        ],
        "a wrong suspicion": [
            (
                lambda kind: replace(on_methods(believes_all)(kind), traits=frozenset({SUSPICION})),
                "of the clean images",
            ),
        ],
        "few images": [*LOOKERS["few images"], (on_methods(two_of_each), "must work with it")],
    },
    "scanner": {
        **EVERYBODY,
        **LOOKERS,
        "any family": [
            *LOOKERS["any family"],
            (on_methods(lambda *given: up.ScanReport("backdoor found")), "a clean network is accused"),
            (on_methods(lambda *given: up.ScanReport("undecided")), "does not say which checks ran"),
        ],
        "evidence": [
            *LOOKERS["evidence"],
            (
                on_methods(
                    lambda *given: up.ScanReport("undecided", (up.Finding("x", float("nan"), "l", 1, "n"),))
                ),
                "not finite",
            ),
            (
                on_methods(lambda *given: up.ScanReport("undecided", (up.Finding("x", 1.0, "", 1, "n"),))),
                "direction",
            ),
            (on_methods(lambda *given: up.ScanReport("undecided", errors={"a": "b"})), "a check crashed"),
        ],
        "declared needs": [
            *LOOKERS["declared needs"],
            (on_methods(needs_images, needs=set()), "raised IndexError"),
        ],
        "useless networks": [
            *LOOKERS["useless networks"],
            (on_methods(clean_logits), "an undecided report"),
        ],
    },
    "screener": {**EVERYBODY, **LOOKERS},
    "attack": {
        **EVERYBODY,
        "any size": [
            (lambda kind: trigger(lambda pixels: pixels.clone()), "the stamp changes nothing"),
            (lambda kind: trigger(lambda pixels: bright(pixels).float()), "dtypes match"),
            (lambda kind: trigger(lambda pixels: pixels.bitwise_not_()), "stamping changed"),
            (lambda kind: trigger(lambda pixels: bright(pixels)[..., :8, :8]), "returns|size|shape"),
            (lambda kind: trigger(lambda pixels: torch.rand_like(pixels.float()).byte()), "left behind"),
        ],
        "seed": [(lambda kind: noisy(), "differ")],
        "truth as JSON": [(lambda kind: forgetful(), "another one")],
    },
}


def noisy() -> Part[Any]:
    """An attack that draws its pattern from the global generator, and puts it back."""

    def attack(cfg: Any, *, shape: Any, classes: int, seed: int) -> Any:
        with torch.random.fork_rng():
            noise = torch.randint(0, 256, shape).to(torch.uint8)
        return up.Trigger(stamp=lambda pixels: pixels ^ noise)

    return part("attack", attack)


def forgetful() -> Part[Any]:
    """An attack whose pattern depends on how often it was made."""
    made: list[int] = []

    def attack(cfg: Any, *, shape: Any, classes: int, seed: int) -> Any:
        made.append(1)
        number = len(made)
        return up.Trigger(stamp=lambda pixels: pixels ^ number)

    return part("attack", attack)


CASES = [
    pytest.param(kind, contract, broken, words, id=f"{kind}-{contract.replace(' ', '-')}-{number}")
    for kind, contracts in BROKEN.items()
    for contract, cases in contracts.items()
    for number, (broken, words) in enumerate(cases)
]
ALL = {
    "attack": check_attack,
    "defense": check_defense,
    "scanner": check_scanner,
    "screener": check_screener,
}


@pytest.mark.parametrize(("kind", "contract", "broken", "words"), CASES)
def test_a_bad_method_is_caught(
    kind: Kind, contract: str, broken: Callable[[Kind], Part[Any]], words: str
) -> None:
    sentence = f"(?s)the {kind} 'local' breaks the contract '{contract}'.*({words})"
    (check,) = [check for check in checks_of(kind) if check.name == contract]
    with rng.seeded(0), pytest.raises(AssertionError, match=sentence):
        check(broken(kind))


# The trusted caller and the poisoning keep these for every part, so it takes a broken one of those.
KEPT_BY_THE_CALLER = {"bad input", "asked share"}


def test_every_contract_catches_something() -> None:
    for kind in KINDS:
        names = {check.name for check in checks_of(kind)}
        assert names - KEPT_BY_THE_CALLER - {"no way to the truth"} == set(BROKEN[kind])


@pytest.mark.parametrize("kind", ["defense", "scanner", "screener"])
def test_input_that_the_caller_lets_through_is_caught(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = [check for check in checks_of(kind) if check.name == "bad input"]
    check(method(kind, honest))
    monkeypatch.setattr(trusted_caller, "check_inputs", lambda *given: None)
    with pytest.raises(AssertionError, match="a weight that is no number"):
        check(method(kind, honest))


def test_a_share_that_is_not_the_asked_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = [check for check in checks_of("attack") if check.name == "asked share"]
    check(trigger(bright))
    monkeypatch.setattr(sys.modules["unbackdoor.attacks.poison"], "_poison_count", lambda images, truth: 3)
    with pytest.raises(AssertionError, match="expected 13 poisoned images, got 3"):
        check(trigger(bright))


@pytest.mark.parametrize(
    "line",
    [
        "import unbackdoor.bench.judge",
        "from unbackdoor.attacks import AttackTruth",
        "from unbackdoor import attacks",
        "from unbackdoor.data import datasets",
        "from unbackdoor.data.datasets import load_dataset",
        "from unbackdoor import load_dataset",
    ],
)
def test_a_method_that_imports_the_truth_is_caught(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "method_that_peeks"
    (tmp_path / f"{name}.py").write_text(
        f"def purify(model, data, cfg, *, run):\n    {line}\n", encoding="utf-8"
    )
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    sys.modules[name] = module
    (check,) = [check for check in checks_of("defense") if check.name == "no way to the truth"]
    with pytest.raises(AssertionError, match="it imports unbackdoor"):
        check(part("defense", module.purify))


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_method_passes(kind: Kind) -> None:
    """Or the tests above would show nothing."""
    ALL[kind](trigger(bright) if kind == "attack" else method(kind, honest))


def test_a_method_need_not_work_on_every_family() -> None:
    (check,) = [check for check in checks_of("defense") if check.name == "any family"]
    check(method("defense", norms_only, families={"conv-bn"}))


def test_all_broken_contracts_are_named_at_once() -> None:
    with pytest.raises(AssertionError) as caught:
        check_attack(trigger(lambda pixels: pixels.clone(), config=Unsourced, paper=""))
    for contract in ("documentation", "options", "any size"):
        assert f"breaks the contract {contract!r}" in str(caught.value)


def test_a_method_is_named_by_name_function_or_part() -> None:
    (check,) = [check for check in checks_of("defense") if check.name == "signature"]
    check("none")
    check(DEFENSES["none"])
    check(DEFENSES["none"].function)
    with pytest.raises(InputError, match="not registered as defense"):
        check(nothing)
    with pytest.raises(InputError, match="did you mean 'none'"):
        check("nine")
    with pytest.raises(InputError, match="another kind"):
        check(SCANNERS["tac"])
    with pytest.raises(InputError, match="no such kind"):
        list(checks_of("heal"))  # type: ignore[arg-type]
