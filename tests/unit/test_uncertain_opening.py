"""A model that was opened with a low accuracy, in another order or as a guess is never firmly judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.cases import Case, open_case
from unbackdoor.engine.run import Run
from unbackdoor.opening.provenance import ArchitectureOrigin
from unbackdoor.registry import SCANNERS, Config, scanner
from unbackdoor.types import Finding, Images, ScanReport

RUN = Run.create(seed=0, policy="fp32")
ARCH = "small_cnn[width=8]"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = tiny_classifier("conv-bn")
    torch.save(model.network.state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def opened(path: Path, images: Images) -> Case:
    model = tiny_classifier("conv-bn")
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    return open_case(path, images, run=RUN, arch=ARCH, mean=mean, std=std)


def relabelled(targets: list[int]) -> Images:
    images = tiny_data(240, seed=5)
    return replace(images, labels=torch.tensor(targets)[images.truth])


@pytest.fixture
def accuser() -> Iterator[None]:
    """Register a scanner that accuses every model."""
    list(SCANNERS)

    @scanner("accuser", config=Config, question="Is it a model?", cost=1)
    def look(model: object, data: object, cfg: object, *, run: object) -> ScanReport:
        return ScanReport("backdoor found", (Finding("size", 1.0, "small", 0.5, "made up", 1e-6, (1,)),))

    yield
    SCANNERS._parts.pop("accuser")


def test_a_model_that_was_opened_rightly_leaves_no_doubt(path: Path, accuser: None) -> None:
    case = opened(path, tiny_data(240, seed=5))
    assert case.doubts == ()
    audit = unbackdoor.scan(case, checks="accuser")
    assert (audit.verdict, audit.classes, audit.doubts) == ("backdoor found", (1,), ())


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ([1, 2, 3, 0], "Clean accuracy is only"),
        ([0, 2, 1, 3], "another order"),
    ],
)
def test_labels_in_another_order_leave_a_doubt(
    path: Path, accuser: None, targets: list[int], text: str
) -> None:
    case = opened(path, relabelled(targets))
    (doubt,) = case.doubts
    assert text in doubt
    audit = unbackdoor.scan(case, checks="accuser")
    assert (audit.verdict, audit.classes) == ("undecided", ())
    assert audit.reasons[0] == doubt and audit.doubts == (doubt,)
    assert "class 1" in audit.reasons[1]


def test_an_order_that_would_be_right_more_often_leaves_a_doubt_at_any_accuracy(path: Path) -> None:
    case = opened(path, tiny_data(240, seed=5))
    assert case.opened is not None
    provenance = case.opened.provenance
    assert provenance.inference is not None and not provenance.doubts
    inference = {**provenance.inference, "class_order": ["b", "a", "c", "d"]}
    (doubt,) = replace(provenance, inference=inference).doubts
    assert "another order" in doubt


def test_images_of_another_task_leave_a_doubt(path: Path, accuser: None) -> None:
    images = tiny_data(240, seed=5)
    draws = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, images.pixels.shape, generator=draws).to(torch.uint8)
    case = opened(path, replace(images, pixels=noise))
    assert "Clean accuracy is only" in case.doubts[0]
    assert unbackdoor.scan(case, checks="accuser").verdict == "undecided"


@pytest.mark.parametrize(
    ("source", "fitting", "labelled", "doubted"),
    [
        ("guessed from names and shapes of the tensors", (ARCH, "vgg11"), False, True),
        ("guessed from names and shapes of the tensors", (ARCH, "vgg11"), True, False),
        ("guessed from names and shapes of the tensors", (ARCH,), False, False),
        ("named by the user", (ARCH, "vgg11"), False, False),
    ],
)
def test_a_network_that_was_guessed_among_several_is_doubted_without_labels(
    path: Path, source: str, fitting: tuple[str, ...], labelled: bool, doubted: bool
) -> None:
    images = tiny_data(240, seed=5)
    case = opened(path, images if labelled else replace(images, labels=None))
    assert case.opened is not None
    origin = ArchitectureOrigin(ARCH, source, fitting=fitting)
    provenance = replace(case.opened.provenance, architecture=origin)
    assert bool(provenance.doubts) == doubted
    assert not doubted or "vgg11" in provenance.doubts[0]
    assert provenance.to_dict()["doubts"] == list(provenance.doubts)
