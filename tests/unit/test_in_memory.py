"""Arrays, data sets of torch, networks and functions of the user are as good as files and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.cli.app import app
from unbackdoor.data.datasets import DataSet
from unbackdoor.data.in_memory import images_in_memory, is_in_memory
from unbackdoor.errors import ConfigError, InputError, MethodFailed, UnsupportedModel

IMAGES = tiny_data(60, seed=11)
PIXELS, LABELS = IMAGES.pixels, IMAGES.truth
ARRAYS = (PIXELS.numpy(), LABELS.numpy())
FEW: dict[str, Any] = {"checks": ["weight_statistics"]}


class Pairs(Dataset[Any]):
    """A data set as torchvision has them."""

    classes = IMAGES.class_names

    def __init__(self, form: Any = lambda pixels: pixels) -> None:
        self.form = form

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, row: int) -> Any:
        return self.form(PIXELS[row]), int(LABELS[row])


class Rows:
    """A data set as the library datasets has them: no class of torch, and dictionaries."""

    features: ClassVar[Any] = {"label": type("ClassLabel", (), {"names": list(IMAGES.class_names)})()}

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, row: int) -> Any:
        return {"img": Image.fromarray(PIXELS[row, 0].numpy()), "label": int(LABELS[row])}


FORMS: dict[str, Any] = {
    "a pair of arrays": ARRAYS,
    "a pair of tensors": (PIXELS, LABELS),
    "channels last": (PIXELS.permute(0, 2, 3, 1).numpy(), LABELS.tolist()),
    "no channels": (PIXELS[:, 0].numpy(), LABELS.numpy().astype(np.uint8)),
    "fractions": (PIXELS.numpy() / 255, LABELS.numpy()),
    "half fractions": (PIXELS.float() / 255, LABELS),
    "wider integers": (PIXELS.numpy().astype(np.int64), LABELS.numpy()),
    "names": (PIXELS.numpy(), np.array(IMAGES.class_names)[LABELS.numpy()]),
    "a data set": Pairs(),
    "fractions of a data set": Pairs(lambda pixels: pixels.float() / 255),
    "pictures of a data set": Pairs(lambda pixels: Image.fromarray(pixels[0].numpy())),
    "a loader": DataLoader(Pairs(), batch_size=7, shuffle=True),
    "tensors of a data set": TensorDataset(PIXELS, LABELS),
    "rows": Rows(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_images(form: str) -> None:
    assert is_in_memory(FORMS[form])
    images = images_in_memory(FORMS[form])
    assert torch.equal(images.pixels, PIXELS)
    names = [images.class_names[k] for k in images.truth.tolist()]
    wanted = [IMAGES.class_names[k] for k in LABELS.tolist()]
    assert names == wanted or names == [str(k) for k in LABELS.tolist()]


def test_colours_are_told_from_sizes() -> None:
    grey = np.zeros((5, 8, 9), dtype=np.uint8)
    for pixels, shape in (
        (np.zeros((5, 3, 8, 9), dtype=np.uint8), (3, 8, 9)),
        (np.zeros((5, 8, 9, 3), dtype=np.uint8), (3, 8, 9)),
        (np.zeros((5, 3, 9, 3), dtype=np.uint8), (3, 3, 9)),  # arrays of pictures have the channels last
        (torch.zeros(5, 3, 9, 3, dtype=torch.uint8), (3, 9, 3)),
        (grey, (1, 8, 9)),
    ):
        images = images_in_memory(pixels)
        assert images.shape == shape and images.labels is None
    assert images_in_memory(np.ones((2, 1, 4, 4))).pixels.unique().tolist() == [255]


WRONG: list[tuple[Any, str]] = [
    ((PIXELS.float() * 2 - 1, LABELS), "Undo the normalisation"),
    ((PIXELS.float() / 255 * float("nan"), LABELS), "no pixels"),
    ((PIXELS.int() * 3, LABELS), "no pixels"),
    ((PIXELS > 3, LABELS), "another type"),
    ((PIXELS, LABELS[:-1]), "differ in number"),
    ((PIXELS, LABELS.float()), "labels are of another type"),
    ((PIXELS, torch.eye(60)), "labels have another shape"),
    ((PIXELS, LABELS - 1), "out of range"),
    ((PIXELS[:, :, 0], None), "no image|another shape|None|labels"),
    ((np.zeros((4, 5, 6, 7), dtype=np.uint8), np.zeros(4, dtype=int)), "another shape"),
    ((np.array(["a", "b"]), np.array([0, 1])), "no numbers"),
    (np.zeros(7, dtype=np.uint8), "another shape"),
    (Pairs(lambda pixels: pixels[:, : 4 + int(pixels.sum()) % 2]), "differ in size"),
    (Pairs(lambda pixels: "picture"), "no image"),
    (TensorDataset(PIXELS, LABELS, LABELS), "another form"),
    (TensorDataset(PIXELS[:0], LABELS[:0]), "are none"),
]


@pytest.mark.parametrize(("data", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_no_image_is_refused_in_words(data: Any, message: str) -> None:
    if message.startswith("no image|"):
        assert images_in_memory(data).labels is None  # labels of None are none
        return
    with pytest.raises(InputError, match=message):
        images_in_memory(data)


def test_every_verb_takes_them() -> None:
    model = tiny_classifier("conv-bn")
    by_images = unbackdoor.scan(model, IMAGES, **FEW).to_dict()["setting"]
    for data in (ARRAYS, Pairs()):
        assert unbackdoor.scan(model, data, **FEW).to_dict()["setting"] == by_images
        assert unbackdoor.purify(model, data, "none", proof=data).accuracy is not None
        assert unbackdoor.run("none", model, data).model.sha256() == model.sha256()
        assert unbackdoor.verify(model, model, data, **FEW).identical
        done = unbackdoor.screen(model, data, "strip", data, options={"overlays": 2})
        assert len(done.scores) == 60
    unlabelled = unbackdoor.screen(model, PIXELS, "strip", ARRAYS, options={"overlays": 2})
    assert len(unlabelled.names) == 60


def test_a_network_in_memory_is_taken_as_it_is() -> None:
    classifier = tiny_classifier("conv-bn")
    mean, std = classifier.mean.flatten().tolist(), classifier.std.flatten().tolist()
    network = classifier.network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    audit = unbackdoor.scan(network, IMAGES, mean=mean, std=std, **FEW)
    assert audit.case is not None
    assert audit.case.model.class_names == IMAGES.class_names
    with torch.no_grad():
        assert torch.equal(audit.case.model(PIXELS.float() / 255), classifier.eval()(PIXELS.float() / 255))
    network.train()
    repaired = unbackdoor.run("random_prune", network, ARRAYS)
    assert network.training and all(torch.equal(network.state_dict()[n], t) for n, t in before.items())
    assert repaired.model.class_names == ("0", "1", "2", "3")
    done = unbackdoor.verify(network, network, IMAGES, mean=mean, std=std, **FEW)
    assert done.identical and done.cases is not None and done.cases[1].model.sha256() == classifier.sha256()
    data = DataSet("own", IMAGES, IMAGES, "none", tuple(mean), tuple(std))
    judged = unbackdoor.evaluate(network, data, before=network, triggered=IMAGES, target=1, precision="fp32")
    assert judged.case.model.sha256() == classifier.sha256() and judged.before == judged.scores
    with pytest.raises(InputError, match="shape of the network's input"):
        unbackdoor.scan(network, **FEW)
    with pytest.raises(UnsupportedModel, match="does not take the images"):
        unbackdoor.scan(nn.LayerNorm(3), IMAGES, **FEW)
    with pytest.raises(UnsupportedModel, match="no logits"):
        unbackdoor.scan(nn.Identity(), IMAGES, **FEW)
    with pytest.raises(ConfigError, match="network in memory"):
        unbackdoor.scan(network, IMAGES, arch="vgg11", **FEW)


def halve(model: Any, data: Any, factor: float = 0.5, *, run: Any) -> None:
    """Halve every weight of the head."""
    assert run.seed == 4 and len(data)
    list(model.network.parameters())[-1].data.mul_(factor)


def test_a_function_is_a_method() -> None:
    model = tiny_classifier("conv-bn")
    last = list(model.network.parameters())[-1]
    done = unbackdoor.run(halve, model, ARRAYS, seed=4)
    assert torch.equal(list(done.model.network.parameters())[-1], last * 0.5)
    assert done.method["name"] == "halve" and done.method["options"] == {"factor": 0.5}
    done = unbackdoor.run(halve, model, ARRAYS, seed=4, options={"factor": 1})
    assert done.model.sha256() == model.sha256()
    purified = unbackdoor.purify(model, ARRAYS, halve, seed=4, options={"factor": 0.25})
    assert purified.to_dict()["method"]["options"] == {"factor": 0.25}
    # A network, a classifier and a Purified may be returned as well.
    for returns in (lambda m, d: m, lambda m, d: m.network, lambda m, d: unbackdoor.Purified(m, {"a": 1})):
        assert unbackdoor.run(returns, model, IMAGES).model.sha256() == model.sha256()
    # A run by position, names of the options class itself, and what has no plain value, are no options.
    odd = lambda m, d, run, json=1, _x=2, model_lr=0.5, things=(1,): m if run.seed == 0 else None  # noqa: E731
    assert unbackdoor.run(odd, model, IMAGES).method["options"] == {"model_lr": 0.5}
    for wrong, kind, message in (
        (lambda m: m, ConfigError, r"\(model, data\)"),
        (lambda m, d, cfg: m, ConfigError, "no Config"),
        (lambda m, d, *, strength: m, ConfigError, "no default: 'strength'"),
        (lambda m, d: 7, MethodFailed, "return"),
        (lambda m, d: 1 / 0, MethodFailed, "ZeroDivisionError"),
        (7, InputError, "another type"),
        (None, InputError, "no method"),
    ):
        with pytest.raises(kind, match=message):
            unbackdoor.run(wrong, model, IMAGES)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'factor'"):
        unbackdoor.run(halve, model, IMAGES, options={"facter": 1})


def test_the_command_runs_a_function_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"net": dict(tiny_classifier("conv-bn").network.state_dict())}, "model.pth")
    np.savez("clean.npz", images=ARRAYS[0][:, 0], labels=ARRAYS[1])
    Path("mine.py").write_text(
        "def shrink(model, data, factor=0.9, often=1):\n"
        "    for _ in range(often):\n"
        "        list(model.parameters())[-1].data.mul_(factor)\n"
    )
    arch = ("--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--quiet", "--json")
    words = ["purify", "model.pth", "--data", "clean.npz", "--out", "out.pth", *arch]
    done = CliRunner().invoke(app, [*words, "--method", "mine.py:shrink", "--set", "often=2"])
    told = json.loads(done.stdout)
    assert done.exit_code != 2 and told["method"]["options"] == {"factor": 0.9, "often": 2}
    assert told["changed_entries"] > 0
    for method, message in (
        ("mine.py:grow", "code of the method failed"),
        ("nobody.py:f", "no such Python file"),
    ):
        done = CliRunner().invoke(app, [*words, "--force", "--method", method])
        assert done.exit_code == 2 and message in json.loads(done.stdout)["error"]["message"]


def test_a_loss_of_accuracy_has_one_unit() -> None:
    model = tiny_classifier("conv-bn")
    done = unbackdoor.purify(model, IMAGES, "none", max_accuracy_drop=50)
    assert done.promise is not None and done.promise.asked == 0.5
    with pytest.raises(ConfigError, match="points"):
        unbackdoor.purify(model, IMAGES, "none", max_accuracy_drop=101)
    with pytest.warns(UserWarning, match="counts points of 100"):
        unbackdoor.purify(model, IMAGES, "none", max_accuracy_drop=0.05)
