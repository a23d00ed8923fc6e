"""Screeners: what each of them looks at, by hand; what the trusted caller shows and refuses; the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from planted import NAMES, block_data, planted
from unbackdoor.cli import app
from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import conformal_p_values, features, normal_p_values
from unbackdoor.engine.trusted_caller import screen
from unbackdoor.errors import InputError, IntegrityError, MethodFailed
from unbackdoor.opening.classifier_files import save_model
from unbackdoor.registry import INPUT_LABELS, SCREENERS, Config, Part
from unbackdoor.screeners.activation_clustering import silhouette, two_means
from unbackdoor.types import Classifier, CleanData, Images, Screening

MODEL = planted((2,))
CLEAN = CleanData.split(block_data(480, seed=5))
EMPTY = CleanData.empty((1, 8, 8), NAMES)
RUN = Run.create(seed=0, policy="fp32")


def stamped(images: Images, rows: Tensor) -> Images:
    """Return the images with a black corner in some rows, which sends them to class 2."""
    pixels = images.pixels.clone()
    pixels[rows, :, 0, 0] = 0
    return replace(images, pixels=pixels)


def mixed() -> tuple[Images, Tensor]:
    """Return 40 images of unknown origin, and which of them are triggered."""
    images = block_data(40, seed=9)
    triggered = (torch.arange(40) % 4 == 1) & (images.truth != 2)
    return stamped(images, triggered.nonzero().flatten()), triggered


def training_set() -> tuple[Images, Tensor]:
    """Return a training set with a poisoned class, and which of its images are poisoned."""
    images = block_data(320, seed=7)
    poisoned = (torch.arange(320) % 16 == 3) | (torch.arange(320) % 32 == 5)
    labels = images.truth.clone()
    labels[poisoned] = 2
    return replace(stamped(images, poisoned.nonzero().flatten()), labels=labels), poisoned


# ---------------------------------------------------------------------------------------------------
# Each of them


def test_strip_sees_what_decides_alone() -> None:
    inputs, triggered = mixed()
    # Overlays at half weight: the white corners of these images hide a black one under a full overlay.
    found = screen("strip", MODEL, CLEAN, inputs, options={"overlays": 10, "strength": 0.3}, precision="fp32")
    assert float(found.scores[triggered].mean()) > float(found.scores[~triggered].mean())
    assert found.evidence["clean_images"] == len(CLEAN.select) and found.evidence["overlays"] == 10


def test_strip_by_hand() -> None:
    inputs = block_data(6, seed=1)
    found = screen("strip", MODEL, CLEAN, inputs, options={"overlays": 1000}, precision="fp32")
    x, overlays = inputs.pixels.float() / 255, CLEAN.fit.pixels.float() / 255
    with torch.no_grad():
        logs = [MODEL((one + overlays).clamp(0, 1)).log_softmax(1) for one in x]
    wanted = torch.stack([(log.exp() * log).sum(1).mean() for log in logs])
    assert torch.allclose(found.scores, wanted, atol=1e-4)
    some = screen("strip", MODEL, CLEAN, inputs.subset([4]), options={"overlays": 1000}, precision="fp32")
    assert torch.allclose(some.scores, found.scores[4:5], atol=1e-5)


def test_scale_up_sees_what_amplifying_leaves() -> None:
    inputs, triggered = mixed()
    found = screen("scale_up", MODEL, CLEAN, inputs, precision="fp32")
    # Black stays black under any factor, while bright blocks all become white.
    assert float(found.scores[triggered].mean()) > float(found.scores[~triggered].mean())
    assert bool(((found.p_values > 0) & (found.p_values <= 1)).all())


@pytest.mark.parametrize("method", ["spectral_signatures", "activation_clustering"])
@pytest.mark.parametrize("data", [CLEAN, EMPTY], ids=["clean images", "none"])
def test_poisoned_images_of_a_training_set_are_found(method: str, data: CleanData) -> None:
    inputs, poisoned = training_set()
    found = screen(method, MODEL, data, inputs, precision="fp32")
    hit = found.suspicious & poisoned
    assert int(hit.sum()) >= 0.9 * int(poisoned.sum())
    assert int((found.suspicious & ~poisoned).sum()) <= 0.1 * int((~poisoned).sum())
    if method == "activation_clustering":
        assert found.evidence["suspicious_classes"] == [2]
        assert found.evidence["p_value_of_the_classes"] < 0.05
    json.dumps(dict(found.evidence), allow_nan=False)


@pytest.mark.parametrize("method", ["spectral_signatures", "activation_clustering"])
def test_a_clean_training_set_is_left_alone(method: str) -> None:
    found = screen(method, MODEL, CLEAN, block_data(320, seed=8), precision="fp32")
    assert int(found.suspicious.sum()) <= 0.05 * 320


def test_features_are_those_of_the_head() -> None:
    images = block_data(16)
    latent, logits = features(MODEL, images, RUN)
    assert latent.shape == (16, 13)
    head = MODEL.network.fc
    assert torch.allclose(latent @ head.weight.detach().T + head.bias.detach(), logits, atol=1e-4)


def test_p_values_by_hand() -> None:
    known = torch.tensor([1.0, 2.0, 3.0])
    assert conformal_p_values(torch.tensor([0.0, 2.0, 4.0]), known).tolist() == [1.0, 0.75, 0.25]
    assert normal_p_values(torch.tensor([0.0, 1.6449])).tolist() == pytest.approx([0.5, 0.05], abs=1e-4)


def test_two_groups_and_their_silhouette() -> None:
    points = torch.tensor([[0.0], [0.1], [0.2], [0.1], [9.0], [9.1]], dtype=torch.float64)
    centres, small = two_means(points, torch.Generator().manual_seed(0))
    assert small.tolist() == [False] * 4 + [True] * 2
    assert centres.flatten().tolist() == pytest.approx([0.1, 9.05])
    assert silhouette(points, small) > 0.95
    assert silhouette(points, torch.arange(6) == 0) == 0.0
    same = torch.zeros(5, 2, dtype=torch.float64)
    two_means(same, torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------
# The caller


def part(body: Callable[..., Any], needs: frozenset[str] = frozenset()) -> Part[Any]:
    def look(model: Classifier, data: CleanData, inputs: Images, cfg: Config, *, run: Run) -> Any:
        return body(model, data, inputs)

    return Part("rogue", "screener", look, Config, "", needs)


def screening(n: int, **changes: Any) -> Screening:
    values: dict[str, Any] = {
        "scores": torch.zeros(n),
        "p_values": torch.full((n,), 0.5),
        "predicted": torch.zeros(n, dtype=torch.int64),
        "suspicious": torch.zeros(n, dtype=torch.bool),
        **changes,
    }
    return Screening(**values)


def test_labels_are_shown_to_those_that_need_them_only() -> None:
    seen: list[Any] = []
    inputs = replace(block_data(8), name="poisoned by badnets")

    def body(model: Classifier, data: CleanData, shown: Images) -> Screening:
        seen.append((shown.labels is None, shown.name))
        shown.pixels.zero_()  # a copy
        return screening(8)

    report = screen(part(body), MODEL, EMPTY, inputs, seed=4)
    screen(part(body, frozenset({INPUT_LABELS})), MODEL, EMPTY, inputs)
    assert seen == [(True, "clean images"), (False, "clean images")]
    assert (report.method["name"], report.method["seed"]) == ("rogue", 4) and report.seconds > 0
    assert int(inputs.pixels.max()) > 0
    with pytest.raises(InputError, match="needs labelled images"):
        screen(part(body, frozenset({INPUT_LABELS})), MODEL, EMPTY, replace(inputs, labels=None))
    with pytest.raises(InputError, match="no image to screen"):
        screen(part(body), MODEL, EMPTY, inputs.subset([]))


@pytest.mark.parametrize(
    "made",
    [
        "fine",
        screening(7),
        screening(8, scores=[0.0] * 8),
        screening(8, scores=torch.full((8,), torch.nan)),
        screening(8, p_values=torch.full((8,), 1.5)),
        screening(8, predicted=torch.full((8,), 8)),
        screening(8, suspicious=torch.zeros(8)),
    ],
    ids=["none", "too few", "a list", "nan", "p 1.5", "class 8", "no bool"],
)
def test_a_screening_that_says_nothing_usable_is_refused(made: Any) -> None:
    with pytest.raises(MethodFailed, match="screener 'rogue'"):
        screen(part(lambda m, d, i: made), MODEL, EMPTY, block_data(8))


def test_a_screener_only_looks() -> None:
    def meddles(model: Classifier, data: CleanData, inputs: Images) -> Screening:
        torch.set_grad_enabled(False)
        return screening(8)

    with pytest.raises(IntegrityError, match="the gradient mode"):
        screen(part(meddles), MODEL, EMPTY, block_data(8))


def test_too_few_clean_images_are_told() -> None:
    few = CleanData.split(block_data(40))
    found = screen("scale_up", MODEL, few, mixed()[0], precision="fp32")
    assert "nothing can be suspicious" in found.evidence["note"] and not bool(found.suspicious.any())


# ---------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its card, clean images, suspects and a training set."""
    from tiny import tiny_classifier, tiny_data

    folder = tmp_path_factory.mktemp("screen")
    save_model(tiny_classifier("conv-bn"), folder / "model.safetensors")
    names = np.array(tiny_data(4).class_names)
    for name, count in (("clean", 120), ("suspects", 30), ("training", 80)):
        images = tiny_data(count, seed=len(name))
        np.savez(
            folder / f"{name}.npz",
            images=images.pixels[:, 0].numpy(),
            labels=images.truth.numpy(),
            class_names=names,
        )
    return folder


def call(files: Path, *arguments: str | Path, code: int = 0) -> Any:
    given = ["screen", files / "model.safetensors", "--quiet", "--precision", "fp32", *arguments]
    outcome = CliRunner().invoke(app, [str(a) for a in given], catch_exceptions=False)
    assert outcome.exit_code == code, outcome.stderr
    return outcome


def test_the_command_screens_single_inputs(files: Path, tmp_path: Path) -> None:
    clean = ["--data", files / "clean.npz", "--images", files / "suspects.npz", "--method", "strip"]
    quick = ["--set", "overlays=5", "--set", "alpha=0.05"]
    told = json.loads(call(files, *clean, *quick, "--json").stdout)
    assert len(told["scores"]) == len(told["names"]) == 30 and "labels" not in told
    assert told["method"]["options"]["overlays"] == 5
    out = tmp_path / "new" / "found.csv"
    out.parent.mkdir()
    shown = call(files, *clean, *quick, "--out", out).stdout
    assert "of 30 images are suspicious" in shown and "The most suspicious" in shown
    # At the usual alpha so few clean images can mark nothing, which --quiet does not hide.
    assert "nothing can be suspicious" in " ".join(call(files, *clean, "--set", "overlays=5").stdout.split())
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 and rows[3]["image"] == "row 3"
    assert [float(row["score"]) for row in rows] == pytest.approx(told["scores"])
    assert "the file exists" in call(files, *clean, "--out", out, code=2).stderr


def test_the_command_screens_a_training_set_without_clean_images(files: Path) -> None:
    told = call(files, "--images", files / "training.npz", "--method", "spectral_signatures", "--json").stdout
    assert len(json.loads(told)["labels"]) == 80


def test_the_command_opens_what_others_saved_and_fits_the_images(files: Path, tmp_path: Path) -> None:
    from PIL import Image

    from tiny import tiny_classifier, tiny_data

    torch.save({"net": tiny_classifier("conv-bn").network.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "suspects").mkdir()
    for i, pixels in enumerate(tiny_data(3).pixels):
        # In colour, and of different sizes.
        image = Image.fromarray(pixels[0].numpy()).convert("RGB").resize((8 + i, 9))
        image.save(tmp_path / "suspects" / f"{i}.png")
    given = [tmp_path / "model.pth", "--arch", "small_cnn[width=8]", "--data", files / "clean.npz", "--json"]
    given += ["--images", tmp_path / "suspects", "--method", "scale_up", "--precision", "fp32"]
    outcome = CliRunner().invoke(app, ["screen", *map(str, given)], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["names"] == ["0.png", "1.png", "2.png"]
    assert "turned grey" in outcome.stderr


@pytest.mark.parametrize("form", ["names", "indices", "table", "csv"])
def test_the_images_of_a_training_set_are_called_by_their_files(
    files: Path, tmp_path: Path, form: str
) -> None:
    """Folders called by numbers and tables once ended in a KeyError; a class may be left out."""
    from PIL import Image

    from tiny import tiny_data

    images = tiny_data(80)
    expected, lines = [], ["file,label"]
    for k, name in enumerate(images.class_names[:3]):
        folder = name if form == "names" else str(k)
        (tmp_path / folder).mkdir()
        for i in (images.truth == k).nonzero().flatten().tolist():
            Image.fromarray(images.pixels[i, 0].numpy()).save(tmp_path / folder / f"{i:02}.png")
            expected.append(f"{folder}/{i:02}.png")
            lines.append(f"{expected[-1]},{name}")
    if form in ("table", "csv"):
        expected.reverse()
        (tmp_path / "labels.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    given = tmp_path / "labels.csv" if form == "csv" else tmp_path
    told = json.loads(call(files, "--images", given, "--method", "spectral_signatures", "--json").stdout)
    assert told["names"] == expected and set(told["labels"]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "strip"], "compares with clean images; give --data"),
        (["--method", "stirp"], "did you mean 'strip'?"),
        (["--method", "spectral_signatures", "--clean", "5"], "draw from a named data set"),
        (["--method", "spectral_signatures", "--set", "fewset=3"], "did you mean 'fewest'?"),
    ],
)
def test_wrong_use_is_told(files: Path, arguments: list[str], expected: str) -> None:
    outcome = call(files, "--images", files / "suspects.npz", *arguments, code=2)
    assert expected in " ".join(outcome.stderr.split())


def test_screeners_are_listed() -> None:
    listed = CliRunner().invoke(app, ["list", "screeners", "--json"], catch_exceptions=False)
    names = [entry["name"] for entry in json.loads(listed.stdout)["screeners"]]
    assert names == sorted(SCREENERS)
    assert {"activation_clustering", "rnp", "scale_up", "spectral_signatures", "strip"} < {*names}
