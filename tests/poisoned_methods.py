"""Defenses that misbehave, each in its own way: a plug-in that tests install beside a benchmark run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from unbackdoor.engine.run import Run
from unbackdoor.registry import Config, defense, option
from unbackdoor.types import Classifier, CleanData, Purified


class PoisonConfig(Config):
    """Where the method goes that it must not go."""

    place: str = option("", "file or folder outside of its own", source="a test")


def poison(act: Callable[[Classifier, str], None]) -> Callable[[Classifier, str], None]:
    """Register what an act does to a model as a defense called ``poison_`` and the act's name."""

    @defense(f"poison_{act.__name__}", config=PoisonConfig, paper="a test", needs={"images"})
    def purify(model: Classifier, data: CleanData, cfg: PoisonConfig, *, run: Run) -> Purified:
        print(f"about to do it: {act.__name__}", flush=True)
        act(model, cfg.place)
        return Purified(model)

    return act


@poison
def raises(model: Classifier, place: str) -> None:
    """Fail with a message."""
    raise RuntimeError("no such luck")


@poison
def hangs(model: Classifier, place: str) -> None:
    """Never end, and do not listen to being asked."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


@poison
def nan(model: Classifier, place: str) -> None:
    """Return weights that are no numbers."""
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


@poison
def memory(model: Classifier, place: str) -> None:
    """Take more and more."""
    hoard = []
    while True:
        hoard.append(bytearray(64 << 20))


@poison
def writes(model: Classifier, place: str) -> None:
    """Leave a file where it does not belong."""
    Path(place).write_text("gotcha", encoding="utf-8")


@poison
def store(model: Classifier, place: str) -> None:
    """Read the results of others."""
    Path(place).read_bytes()


@poison
def truth(model: Classifier, place: str) -> None:
    """Go through the artefacts for the record of the attack."""
    for folder in os.listdir(place):  # noqa: PTH208  a glob would pass over what is refused
        print(folder)


@poison
def data_file(model: Classifier, place: str) -> None:
    """Read the file of the test images."""
    Path(place).read_bytes()


@poison
def test_images(model: Classifier, place: str) -> None:
    """Load the test images by the door that the judge uses."""
    from unbackdoor.data.datasets import load_dataset

    load_dataset("digits")


@poison
def program(model: Classifier, place: str) -> None:
    """Have another program do it."""
    import subprocess

    subprocess.run(["touch", place], check=True)


@poison
def socket(model: Classifier, place: str) -> None:
    """Have somebody to talk to."""
    from socket import create_connection

    create_connection(("127.0.0.1", 9))


@poison
def leaves(model: Classifier, place: str) -> None:
    """End without a word."""
    os._exit(0)


@poison
def forges(model: Classifier, place: str) -> None:
    """Answer in the place of the step that called it, with what is no answer."""
    Path("result.json").write_text('{"result": {"seconds": "none", "flags": 7}}', encoding="utf-8")
    os._exit(0)
