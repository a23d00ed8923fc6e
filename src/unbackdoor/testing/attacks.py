"""Contracts on attacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unbackdoor.engine import rng
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.engine.trusted_caller import Surroundings
from unbackdoor.networks import build
from unbackdoor.testing.contract import Subject, contract, demand
from unbackdoor.testing.examples import QUADRANTS
from unbackdoor.types import Images

SHAPES = [(1, 8, 8), (3, 32, 32), (3, 20, 28), (4, 64, 64)]


def _noise(shape: tuple[int, int, int], count: int = 40) -> Images:
    draws = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (count, *shape), generator=draws).to(torch.uint8)
    return Images(pixels, torch.arange(count) % 4, QUADRANTS, "noise")


def _poisoned(
    subject: Subject, clean: Images, rate: float | None = None, seed: int = 1
) -> tuple[Images, Any]:
    """Return the images that an attack poisons, the same ones where it controls training, and the truth."""
    from unbackdoor.attacks.poison import impossible, spread
    from unbackdoor.attacks.truth import AttackTruth

    part, before = subject.part, Surroundings.take()
    overrides = {} if rate is None else {"poison_rate": rate}
    config = part.configure({**overrides, **subject.options})
    trigger = part.function(config, shape=clean.shape, classes=clean.classes, seed=seed)
    truth = AttackTruth(part.name, config.model_dump(), clean.shape, clean.classes, seed, trigger)
    faults = impossible(clean, truth)
    demand(not faults, "; ".join(faults))
    if trigger.learning is None:
        out = spread(clean, truth)
    else:
        surroundings = Run.create(seed=seed, policy="fp32")
        tensors = trigger.learning.fit(clean, surroundings)
        if trigger.learning.train is None:
            out = spread(clean, truth.learned(tensors))
        else:
            out = clean, truth.learned(_learned_with_victim(trigger, clean, tensors, surroundings))
    demand(not before.changed(), f"left behind: {', '.join(before.changed())}")
    return out


def _learned_with_victim(
    trigger: Any, clean: Images, tensors: Mapping[str, Tensor], surroundings: Run
) -> Mapping[str, Tensor]:
    model = build("small_cnn[width=4]", input_shape=clean.shape, class_names=clean.class_names, seed=0)
    learned: Mapping[str, Tensor] = trigger.learning.train(
        model,
        clean,
        tensors,
        Recipe(epochs=1, batch_size=32, lr=0.02),
        surroundings,
        augmentation="none",
        checkpoint=None,
        label="training",
    )
    return learned


def _is_clean(truth: Any) -> bool:
    return bool(truth.trigger.mapping == "none")


def _rate(subject: Subject, rate: float) -> float | None:
    """Return the rate, or None for an attack that poisons nothing."""
    return None if subject.part.configure(subject.options).model_dump()["poison_rate"] == 0 else rate


@contract(
    "attack",
    name="any size",
    meaning="images of any size and channel count are triggered, and only the chosen rows change",
)
def _any_size(subject: Subject) -> None:
    from unbackdoor.attacks.poison import stamped

    for shape in SHAPES:
        clean = _noise(shape)
        before = clean.fingerprint()
        images, truth = _poisoned(subject, clean, _rate(subject, 0.2))
        demand(clean.fingerprint() == before, f"{shape}: the clean images changed")
        triggered = stamped(clean.pixels, truth)
        demand(clean.fingerprint() == before, f"{shape}: stamping changed the images it was given")
        same_form = triggered.shape == clean.pixels.shape and triggered.dtype == torch.uint8
        demand(same_form, f"{shape}: the stamp returns {triggered.dtype} of {tuple(triggered.shape)}")
        demand(torch.equal(triggered, stamped(clean.pixels, truth)), f"{shape}: stamping twice differs")
        unchanged = torch.equal(triggered, clean.pixels)
        demand(unchanged == _is_clean(truth), f"{shape}: the stamp changes nothing")
        demand(images.pixels.shape == clean.pixels.shape, f"{shape}: the images changed their form")
        touched = set(truth.poisoned.tolist()) | set(truth.decoys.tolist())
        same = (images.pixels == clean.pixels).flatten(1).all(1)
        spared = all(bool(same[i]) for i in range(len(clean)) if i not in touched)
        demand(spared, f"{shape}: an image changed that was not chosen")
        if truth.trigger.in_training is None:
            chosen = torch.equal(images.pixels[truth.poisoned], triggered[truth.poisoned])
            demand(chosen, f"{shape}: a poisoned image is not the stamped one")
        else:
            demand(not bool(same[truth.poisoned].any()), f"{shape}: a poisoned image did not change")


@contract(
    "attack", name="seed", meaning="the same seed gives the same bytes, and global generators do not matter"
)
def _attack_seed(subject: Subject) -> None:
    from unbackdoor.attacks.poison import stamped

    outputs = []
    for number in (1, 2):
        with rng.seeded(number):
            images, truth = _poisoned(subject, _noise((3, 16, 16)), _rate(subject, 0.1))
            outputs.append((images.fingerprint(), stamped(_noise((3, 16, 16)).pixels, truth)))
    same = outputs[0][0] == outputs[1][0] and torch.equal(outputs[0][1], outputs[1][1])
    demand(same, "two calls with one seed differ")


@contract(
    "attack",
    name="truth as JSON",
    meaning="options, seed and learned tensors make the same trigger again",
)
def _truth_as_json(subject: Subject) -> None:
    from unbackdoor.attacks.poison import stamped

    clean = _noise((3, 16, 16))
    _, truth = _poisoned(subject, clean, _rate(subject, 0.1), seed=5)
    spec = json.loads(json.dumps(truth.spec(), allow_nan=False))
    config = subject.part.configure(spec["options"])
    trigger = subject.part.function(
        config, shape=tuple(spec["shape"]), classes=spec["classes"], seed=spec["seed"]
    )
    twin = replace(truth, trigger=trigger)
    if trigger.learning is not None:
        twin = twin.learned(truth.tensors)
    same = torch.equal(stamped(clean.pixels, twin), stamped(clean.pixels, truth))
    demand(same and twin.target == truth.target, "the trigger made again is another one")


@contract(
    "attack",
    name="asked share",
    meaning="as many images are poisoned as the rate asks for, and their labels are the wanted ones",
)
def _poison_share(subject: Subject) -> None:
    clean = _noise((1, 16, 16), count=100)
    images, truth = _poisoned(subject, clean, _rate(subject, 0.13), seed=0)
    if _is_clean(truth) or (truth.trigger.learning and truth.trigger.learning.train):
        demand(images.fingerprint() == clean.fingerprint(), "the images changed")
        return
    expected_count = round(truth.options["poison_rate"] * len(clean))
    demand(
        len(truth.poisoned) == expected_count,
        f"expected {expected_count} poisoned images, got {len(truth.poisoned)}",
    )
    expected_labels = truth.targets_of(clean)
    demand(
        torch.equal(images.truth[truth.poisoned], expected_labels[truth.poisoned]),
        "a label is not the wanted one",
    )
    rest = torch.ones(len(clean), dtype=torch.bool)
    rest[truth.poisoned] = False
    demand(torch.equal(images.truth[rest], clean.truth[rest]), "a label changed that was not chosen")
    # ASR must not count images that are of the wanted class anyway.
    eligible = truth.eligible(clean)
    demand(
        bool((truth.targets_of(eligible) != eligible.truth).all()),
        "ASR would count the wanted class",
    )
