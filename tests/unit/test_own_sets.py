"""Sets and triggered images of the user, the device that is there, and rows for other programs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.devices import resolved_device
from unbackdoor.bench.row_tables import write_csv, write_table
from unbackdoor.bench.rows import Row, ScanRow
from unbackdoor.cli.app import app
from unbackdoor.data.own_set import load_own_set
from unbackdoor.errors import ConfigError, InputError

IMAGES = tiny_data(80, seed=3)


def save(path: Path, images: unbackdoor.Images = IMAGES, *, labels: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"labels": images.truth.numpy(), "class_names": np.array(images.class_names)} if labels else {}
    np.savez(path, images=images.pixels.numpy()[:, 0], **more)
    return path


def test_a_set_is_held_out_from_always_alike(tmp_path: Path) -> None:
    one, two = (load_own_set(save(tmp_path / "mine.npz")) for _ in range(2))
    assert one.test.fingerprint() == two.test.fingerprint()
    assert len(one.train) + len(one.test) == 80 and len(one.test) == 16
    rows = {row.numpy().tobytes() for row in one.train.pixels}
    assert not any(row.numpy().tobytes() in rows for row in one.test.pixels)
    values = one.train.pixels.double() / 255
    assert one.mean == pytest.approx((float(values.mean()),)) and one.std == pytest.approx(
        (float(values.std()),)
    )
    whole = load_own_set(tmp_path / "mine.npz", whole=True)
    assert len(whole.test) == 80


@pytest.mark.parametrize("names", [("train.npz", "test.npz"), ("training.npz", "val.npz")])
def test_parts_of_its_own_are_taken(tmp_path: Path, names: tuple[str, str]) -> None:
    save(tmp_path / names[0], IMAGES.subset(range(60)))
    save(tmp_path / names[1], IMAGES.subset(range(60, 80)))
    data = load_own_set(tmp_path)
    assert (len(data.train), len(data.test)) == (60, 20)
    assert data.test.class_names == data.train.class_names == IMAGES.class_names


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no labels"):
        load_own_set(save(tmp_path / "a.npz", labels=False))
    one_each = IMAGES.subset([IMAGES.truth.tolist().index(k) for k in range(4)])
    with pytest.raises(InputError, match="too few"):
        load_own_set(save(tmp_path / "b.npz", one_each))
    with pytest.raises(InputError):
        load_own_set(tmp_path / "nothing.npz")
    with pytest.raises(InputError):
        unbackdoor.train(str(tmp_path / "nothing"))
    one_colour = unbackdoor.Images(
        torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b")
    )
    assert load_own_set(save(tmp_path / "c.npz", one_colour)).std == (1.0,)


def test_training_and_measuring_on_a_set_of_ones_own(tmp_path: Path) -> None:
    path = save(tmp_path / "mine.npz")
    victim = unbackdoor.train(
        str(path), architecture="small_cnn[width=8]", target=1, attack_options={"size": 2},
        options={"epochs": 1, "batch_size": 32}, precision="fp32",
    )  # fmt: skip
    assert victim.dataset == "mine.npz" and victim.scores.acc.total == 16
    done = unbackdoor.evaluate(victim.model, path, truth=victim.truth, precision="fp32")
    assert done.scores.acc.total == 80


def triggered(model: Any, target: int) -> unbackdoor.Images:
    pixels = IMAGES.pixels.clone()
    pixels[:, :, :2, :2] = 255
    return unbackdoor.Images(pixels, IMAGES.labels, IMAGES.class_names)


def test_triggered_images_of_ones_own_are_measured(tmp_path: Path) -> None:
    model, path = tiny_classifier("conv-bn"), save(tmp_path / "mine.npz")
    images = triggered(model, 2)
    with torch.no_grad():
        said = model.eval()(images.pixels.float() / 255).argmax(1)
    others = IMAGES.truth != 2
    done = unbackdoor.evaluate(model, path, triggered=images, target=2, precision="fp32")
    assert done.scores.asr == unbackdoor.Rate(int((said[others] == 2).sum()), int(others.sum()))
    assert done.scores.ra.hits == int((said[others] == IMAGES.truth[others]).sum())
    named = unbackdoor.evaluate(model, path, triggered=images, target=IMAGES.class_names[2], precision="fp32")
    assert named.scores == done.scores and done.to_dict()["attack"]["options"]["target"] == 2
    # Without labels all count, and there is no RA; before and after a repair are compared as ever.
    bare = unbackdoor.evaluate(model, path, triggered=images.pixels, target=2, before=model, precision="fp32")
    assert bare.scores.asr == unbackdoor.Rate(int((said == 2).sum()), 80) and bare.scores.ra.total == 0
    assert bare.to_dict()["scores"]["ra"] is None and bare.der is not None
    for wrong, kind, message in (
        ({"triggered": images}, ConfigError, "belong together"),
        ({"target": 1}, ConfigError, "belong together"),
        ({"triggered": images, "target": 9}, InputError, "no class '9'"),
        ({"triggered": images, "target": -1}, InputError, "no class '-1'"),
        ({"triggered": images, "target": 1, "trigger": "x.png,class=1"}, ConfigError, "two answers"),
        ({"triggered": tmp_path / "no", "target": 1}, InputError, "no such file"),
        ({"triggered": 7, "target": 1}, InputError, "another type"),
    ):
        with pytest.raises(kind, match=message):
            unbackdoor.evaluate(model, path, **wrong)  # type: ignore[arg-type]


def test_the_command_measures_a_folder_of_triggered_images(tmp_path: Path) -> None:
    model, path = tiny_classifier("conv-bn"), save(tmp_path / "mine.npz")
    unbackdoor.save_model(model, tmp_path / "m.safetensors")
    (tmp_path / "triggered").mkdir()
    for row in range(6):
        picture = Image.fromarray(triggered(model, 1).pixels[row, 0].numpy())
        picture.save(tmp_path / "triggered" / f"{row}.png")
    words = ["evaluate", str(tmp_path / "m.safetensors"), "--dataset", str(path), "--quiet", "--json"]
    done = CliRunner().invoke(app, [*words, "--triggered", str(tmp_path / "triggered"), "--target", "1"])
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["scores"]["asr"]["total"] == 6 and told["scores"]["ra"] is None


def test_auto_is_the_fastest_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, device in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=cuda: here)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda here=mps: here)
        assert resolved_device("auto") == device
    assert resolved_device("cpu") == "cpu" and resolved_device(torch.device("cpu")) == torch.device("cpu")


ROW: dict[str, Any] = {
    "suite": "s", "dataset": "digits", "architecture": "a_b", "width": 8, "recipe": "plain",
    "attack": "bad|nets", "poison_rate": 0.1, "victim_seed": 0, "defense": "=SUM(A1)", "clean_images": 50,
    "defender_seed": 1,
    "acc": 0.912, "asr": 0.01, "flags": ("x", "y"),
}  # fmt: skip


def test_rows_are_tables_for_people_and_programs(tmp_path: Path) -> None:
    row = Row.model_validate(ROW)
    write_csv(tmp_path / "rows.csv", [row])
    (read,) = csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())
    assert set(read) == set(Row.model_fields) and read["acc"] == "0.912" and read["ra"] == ""
    assert json.loads(read["flags"]) == ["x", "y"]
    assert read["defense"] == "'=SUM(A1)"  # no formula
    write_table(tmp_path / "rows.md", [row, row])
    lines = (tmp_path / "rows.md").read_text().splitlines()
    assert len(lines) == 4 and len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert "91.2" in lines[2] and "ra (%)" not in lines[0] and r"bad\|nets" in lines[2]
    write_table(tmp_path / "rows.tex", [row], latex=True)
    text = (tmp_path / "rows.tex").read_text()
    assert r"a\_b" in text and r"acc (\%)" in text and text.count(r"\\") == 2 and r"\toprule" in text
    write_table(tmp_path / "none.md", [])
    scan = {name: value for name, value in ROW.items() if name in ScanRow.model_fields}
    scans = [ScanRow.model_validate({**scan, "scanner": "tac", "verdict": "undecided", "right": None})]
    write_csv(tmp_path / "scans.csv", scans, ScanRow)
    write_table(tmp_path / "scans.md", scans, ScanRow)
    assert "undecided" in (tmp_path / "scans.md").read_text()
