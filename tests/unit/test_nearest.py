"""The architecture of a bare state dict: recognised from names and shapes, and its names translated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unbackdoor.errors import ConfigError, UnsupportedModel
from unbackdoor.networks.build import canonical, network
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.spec import read_spec
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.opening.load_tensors import fill
from unbackdoor.opening.recognise_architecture import ends, nearest
from unbackdoor.opening.recognise_chain import USUAL_SIDES, averaged, chains
from unbackdoor.opening.rename_tensors import adapt, fold_masks, take_normalisation

pytestmark = pytest.mark.leaves_traces
GEOMETRY = Geometry(3, 32, 32, 7)
State = dict[str, Tensor]


def shapes(spec: str, geometry: Geometry = GEOMETRY) -> State:
    return network(spec, geometry, device="meta").state_dict()


def values(spec: str, geometry: Geometry = GEOMETRY) -> State:
    return network(spec, geometry, seed=1).state_dict()


def renamed(state: Mapping[str, Tensor], *rules: tuple[str, str]) -> State:
    out = {}
    for name, tensor in state.items():
        for pattern, text in rules:
            name = re.sub(pattern, text, name)
        out[name] = tensor
    return out


KUANGLIU = (("downsample", "shortcut"), (r"^fc\.", "linear."))
NAD = (
    (r"\bshortcut\b", "convShortcut"),
    (r"^layer(\d)\.(\d)", r"block\1.layer.\2"),
    (r"^bn\.", "bn1."),
)

# Nearest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "resnet18[width=8]",
        "resnet34[width=4]",
        "resnet50[width=4,stem=7x7+pool]",
        "resnet101[width=4]",
        "cifar_resnet[depth=32,width=8]",
        "cifar_resnet[depth=20,width=8,shortcut=conv]",
        "preact_resnet18[width=8]",
        "preact_resnet18[width=8,final_norm=false]",
        "wrn16[width=2]",
        "wrn[depth=28,width=1]",
        "vgg19_bn[width=4]",
        "mobilenet_v2[width=0.5]",
        "vit_small[width=32,depth=2]",
        "small_cnn[width=8]",
        "small_cnn[width=8,norm=none]",
        "airbench[width=8]",
        "airbench[width=8,expansion=2]",
    ],
)
@pytest.mark.parametrize("order", [list, sorted])
def test_every_family_is_recognised_with_its_options(spec: str, order: Callable[[Any], Any]) -> None:
    state = dict(order(shapes(spec).items()))
    best = nearest(state)[0]
    assert best.fits
    assert best.spec == canonical(spec)
    assert (best.classes, best.input_channels) == (7, 3)
    assert ends(state) == (3, 7)


@pytest.mark.parametrize(
    ("spec", "rules"),
    [
        ("resnet18[width=8]", KUANGLIU),
        ("resnet18[width=8]", ((r"^fc\.", "classifier."),)),
        ("resnet50[width=4]", KUANGLIU),
        ("cifar_resnet[depth=20,width=16,shortcut=conv]", KUANGLIU),
        ("wrn16[width=1]", NAD),
        ("wrn[depth=28,width=2]", NAD),
        ("preact_resnet18[width=8]", ((r"^linear\.", "fc."),)),
        ("small_cnn[width=4]", ((r"^fc\.", "linear."),)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.", "1.net."])
def test_other_implementations_of_the_same_network(
    spec: str, rules: Any, prefix: str, tmp_path: Path
) -> None:
    own = values(spec)
    theirs = {prefix + name: tensor for name, tensor in renamed(own, *rules).items()}
    best = nearest(theirs)[0]
    assert best.fits
    assert best.spec == canonical(spec)
    adapted = adapt(theirs, shapes(spec))
    assert adapted.fits
    assert set(adapted.state) == set(own)
    assert all(torch.equal(adapted.state[name], own[name]) for name in own)
    assert all(torch.equal(theirs[old], own[new]) for new, old in adapted.renamed.items())
    assert any("translated" in line for line in adapted.changes_in_words())


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("features.", "classifier.fc."),  # TrojanZoo
        ("backbone.", "head.fc."),  # MMPretrain
        ("_model.features.", "_model.classifier.fc."),
        ("encoder.", "fc."),
    ],
)
def test_a_prefix_of_the_body_alone(body: str, head: str) -> None:
    own = values("resnet18[width=4]")
    theirs = {(head + n[3:] if n.startswith("fc.") else body + n): t for n, t in own.items()}
    assert nearest(theirs)[0].spec == "resnet18[width=4]"
    adapted = adapt(theirs, shapes("resnet18[width=4]"))
    assert adapted.fits
    assert all(torch.equal(adapted.state[n], own[n]) for n in own)
    assert all(torch.equal(theirs[old], own[new]) for new, old in adapted.renamed.items())


def test_what_belongs_to_the_training_is_left_out_and_told() -> None:
    own = values("small_cnn[width=4]")
    averaged = {"n_averaged": torch.tensor(7)} | {f"module.{name}": tensor for name, tensor in own.items()}
    with_loss = {"model." + name: tensor for name, tensor in own.items()} | {
        "criterion.weight": torch.ones(7)
    }
    for theirs, name in ((averaged, "n_averaged"), (with_loss, "criterion.weight")):
        assert nearest(theirs)[0].spec == "small_cnn[width=4]"
        adapted = adapt(theirs, shapes("small_cnn[width=4]"))
        assert adapted.fits
        assert list(adapted.dropped) == [name]
        assert any("belongs to the training" in line for line in adapted.changes_in_words())
    # Where the network itself has such a tensor, it is the network's.
    assert adapt(with_loss, with_loss).dropped == {}


def test_masks_of_channels_are_multiplied_in() -> None:
    own = values("small_cnn[width=4]")
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    theirs = own | {"bn1.neuron_mask": mask, "bn1.neuron_noise": torch.rand(4)}
    assert nearest(theirs)[0].spec == "small_cnn[width=4]"
    adapted = adapt(theirs, shapes("small_cnn[width=4]"))
    assert adapted.fits
    assert adapted.folded == ("bn1.weight",)
    assert torch.equal(adapted.state["bn1.weight"], own["bn1.weight"] * mask)
    assert torch.equal(adapted.state["bn1.bias"], own["bn1.bias"])
    assert adapt(theirs, theirs).folded == ()


def test_a_head_of_another_shape_is_not_renamed_away() -> None:
    theirs = renamed(values("resnet18[width=4]"), *KUANGLIU)
    theirs["linear.weight"] = torch.zeros(7, 31)
    adapted = adapt(theirs, shapes("resnet18[width=4]"))
    assert not adapted.fits
    assert "fc.weight" in adapted.difference.missing
    assert "linear.weight" in adapted.difference.unexpected


def test_what_nearly_fits_is_named_and_what_is_nothing_is_not() -> None:
    state = {
        name: t for name, t in shapes("resnet18[width=8]").items() if not name.startswith("layer4.1.bn2")
    }
    best = nearest(state)[0]
    assert not best.fits
    assert best.spec == "resnet18[width=8]"
    assert 0.9 < best.matched < 1
    assert nearest({"a": torch.zeros(3)}) == []
    assert nearest({}) == []


def test_unseen_options_are_left_open() -> None:
    stems = nearest(shapes("resnet18[width=4]"))[0]
    assert stems.choices == {"stem": ("3x3", "3x3+pool")}
    assert nearest(shapes("cifar_resnet[depth=8,width=4]"))[0].choices == {"shortcut": ("pad", "pad_end")}
    assert nearest(shapes("mobilenet_v2[width=0.25]"))[0].choices == {"strides": ("small", "large")}


# Chains --------------------------------------------------------------------------------------------

IBAU = "c32-b-a-c32-b-a-m-d-c64-b-a-c64-b-a-m-d-c128-b-a-c128-b-a-m"


def test_positions_in_the_names_show_pools_and_dropouts() -> None:
    class Published(nn.Module):
        def __init__(self) -> None:
            super().__init__()

            def unit(i: int, o: int) -> list[nn.Module]:
                return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ELU()]

            self.features = nn.Sequential(
                *unit(3, 32), *unit(32, 32), nn.MaxPool2d(2), nn.Dropout(0.3),
                *unit(32, 64), *unit(64, 64), nn.MaxPool2d(2), nn.Dropout(0.4),
                *unit(64, 128), *unit(128, 128), nn.MaxPool2d(2), nn.Dropout(0.4),
            )  # fmt: skip
            self.classifier = nn.Linear(2048, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.classifier(self.features(x).flatten(1))
            return logits

    theirs = Published().eval()
    best = nearest(theirs.state_dict(), side=32)[0]
    assert best.spec == f"sequential_cnn[features={IBAU}]"
    assert best.side == 32
    assert best.choices["activation"][:2] == ("relu", "elu")
    spec = best.spec[:-1] + ",activation=elu]"
    ours = fill(spec, theirs.state_dict(), input_shape=(3, 32, 32), classes=10, where="a test").network
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(pixels), theirs(pixels))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_names_that_are_no_positions() -> None:
    """conv1, conv2, fc1, fc2 of a small network for 28 pixels, 5x5 without padding, pooled twice."""
    state = {
        "conv1.0.weight": torch.rand(16, 1, 5, 5), "conv1.0.bias": torch.rand(16),
        "conv2.0.weight": torch.rand(32, 16, 5, 5), "conv2.0.bias": torch.rand(32),
        "fc1.0.weight": torch.rand(512, 512), "fc1.0.bias": torch.rand(512),
        "fc2.0.weight": torch.rand(10, 512), "fc2.0.bias": torch.rand(10),
    }  # fmt: skip
    first = nearest(state, side=28)[0]
    assert first.spec == "sequential_cnn[features=c16k5p0-a-m-c32k5p0-a-m,classifier=l512-a-l]"
    assert nearest(dict(sorted(state.items())), side=28)[0].spec == first.spec
    wanted = network(first.spec, Geometry(1, 28, 28, 10), device="meta").state_dict()
    adapted = adapt(state, wanted, in_order=True)
    assert adapted.fits
    assert adapted.renamed["features.0.weight"] == "conv1.0.weight"
    assert adapted.renamed["classifier.2.bias"] == "fc2.0.bias"


def test_one_sequence_of_everything_and_hidden_layers_behind_it() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 7),
    ).eval()  # fmt: skip
    best = nearest(net.state_dict(), side=32)[0]
    assert best.spec == "sequential_cnn[features=c8n-b-a-m-c8-a-m,classifier=l32-a-d-l]"
    ours = fill(best.spec, net.state_dict(), input_shape=(3, 32, 32), classes=7, where="a test")
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours.network.eval()(pixels), net(pixels))
    assert ours.adapted.renamed["features.0.weight"] == "0.weight"


def test_a_global_average_before_the_head() -> None:
    state = shapes("sequential_cnn[features=c8-b-a-m-c16-b-a-m,side=1]")
    found = chains(state, side=32)
    assert found[0].spec == "sequential_cnn[features=c8-b-a-m-c16-b-a-m,classifier=l,side=1]"
    assert found[0].side is None
    assert all(chain.side is None for chain in found)


def test_a_network_that_averages_before_its_layers_takes_images_of_any_size() -> None:
    # torchvision's VGG-11 with narrow layers: five poolings, then an average of 7 x 7.
    tokens = "c4-a-m-c4-a-m-c4-a-c4-a-m-c4-a-c4-a-m-c4-a-c4-a-m"
    spec = f"sequential_cnn[features={tokens},classifier=l16-a-d-l16-a-d-l,side=7]"
    state = shapes(spec)
    for side in (None, 32, 224):
        best = nearest(state, side=side)[0]
        assert (best.spec, best.fits, best.side) == (canonical(spec), True, None)


def test_networks_with_skips_are_no_chains() -> None:
    # Option A has no weights in its skips, so that its channels would flow as in a chain.
    assert chains(shapes("cifar_resnet[depth=8,width=4]")) == []
    assert chains(shapes("mobilenet_v2[width=0.1]")) == []
    assert chains(shapes("vit_small[width=16,depth=1]")) == []


def test_average_instead_of_max_pooling() -> None:
    spec = "sequential_cnn[features=c8-a-m-c8-a-m3s2,classifier=l8-a-l,activation=elu]"
    swapped = averaged(spec)
    assert swapped == "sequential_cnn[features=c8-a-v-c8-a-v3s2,classifier=l8-a-l,activation=elu]"
    net = network(swapped, GEOMETRY)
    assert sum(isinstance(m, nn.AvgPool2d) for m in net.modules()) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("features=c8-x", "unknown layer 'x'"),
        ("features=c8-l8", "unknown layer 'l8'"),
        ("classifier=c8-l", "unknown layer 'c8'"),
        ("classifier=l8", "exactly one layer"),
        ("classifier=l-l", "exactly one layer"),
        ("features=c65537", "beyond 65536"),
        ("features=" + "-".join("a" * 401), "expected the form"),
    ],
)
def test_faulty_layers_are_refused(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        canonical(f"sequential_cnn[{options}]")


@pytest.mark.parametrize("features", ["m-m-m-m-m-m", "c8k7p0-m-m-m-m-m", "c8g3"])
def test_layers_that_do_not_fit_the_image(features: str) -> None:
    with pytest.raises(UnsupportedModel):
        network(f"sequential_cnn[features={features}]", GEOMETRY, device="meta")


def test_usual_sizes_are_each_named_once() -> None:
    assert len(set(USUAL_SIDES)) == len(USUAL_SIDES)


# Adaptation ----------------------------------------------------------------------------------------


def test_pruning_masks_are_multiplied_in() -> None:
    own = values("small_cnn[width=4]")
    mask = (torch.rand(4, 4, 3, 3) > 0.5).float()
    theirs = {name: tensor for name, tensor in own.items() if name != "conv2.weight"}
    theirs |= {"conv2.weight_orig": own["conv2.weight"], "conv2.weight_mask": mask}
    adapted = adapt(theirs, shapes("small_cnn[width=4]"))
    assert adapted.fits
    assert torch.equal(adapted.state["conv2.weight"], own["conv2.weight"] * mask)
    assert adapted.folded == ("conv2.weight",)
    assert nearest(theirs)[0].spec == "small_cnn[width=4]"
    # A mask of another shape is something else, and stays.
    assert fold_masks({"a_orig": torch.ones(2), "a_mask": torch.ones(3)})[1] == ()


@pytest.mark.parametrize(
    ("names", "scale"),
    [
        (("normalize.mean", "normalize.std"), 1),
        (("0.mean", "0.std"), 1),
        (("norm_layer.mu", "norm_layer.sigma"), 1),
        (("mean", "std"), 255),
    ],
)
def test_a_normalising_layer_in_the_file_tells_the_normalisation(names: tuple[str, str], scale: int) -> None:
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    own = values("small_cnn[width=4]")
    theirs = {names[0]: (mean * scale).view(1, 3, 1, 1), names[1]: (std * scale).view(1, 3, 1, 1)} | own
    adapted = adapt(theirs, shapes("small_cnn[width=4]"))
    assert adapted.fits
    assert adapted.mean == pytest.approx(mean.tolist())
    assert adapted.std == pytest.approx(std.tolist())
    assert set(adapted.dropped) == set(names)
    assert any("normalisation of the pixels" in line for line in adapted.changes_in_words())
    assert nearest(theirs)[0].fits


def test_a_mean_that_is_none_of_pixels_is_dropped_but_not_used() -> None:
    state = {"prior.mean": torch.tensor([-3.0, 0.0, 3.0]), "prior.std": torch.ones(3)}
    _, dropped, mean, std = take_normalisation(state)
    assert set(dropped) == set(state)
    assert mean is std is None
    assert take_normalisation({"prior.mean": torch.ones(3)})[1] == {}


def test_counters_that_old_checkpoints_lack_are_filled_in() -> None:
    own = values("small_cnn[width=4]")
    theirs = {name: tensor for name, tensor in own.items() if not name.endswith("num_batches_tracked")}
    adapted = adapt(theirs, shapes("small_cnn[width=4]"))
    assert adapted.fits
    assert len(adapted.filled) == 4
    assert adapted.state["bn1.num_batches_tracked"].dtype == torch.int64


def test_a_foreign_file_is_loaded_without_a_card(tmp_path: Path) -> None:
    theirs = renamed(values("resnet18[width=4]"), *KUANGLIU)
    save_file(theirs, tmp_path / "m.safetensors")
    given: dict[str, Any] = {"input_shape": (3, 32, 32), "class_names": list("abcdefg")}
    model = load_model(tmp_path / "m.safetensors", architecture="resnet18[width=4]", **given)
    assert torch.equal(model.network.state_dict()["fc.weight"], theirs["linear.weight"])
    with pytest.raises(UnsupportedModel, match=r"These weights fit: resnet18\[width=4\] \(7 classes\)"):
        load_model(tmp_path / "m.safetensors", architecture="wrn16", **given)


def test_an_agreeing_name_is_never_renamed() -> None:
    own = values("resnet18[width=4]")
    assert adapt(own, own).renamed == {}
    assert read_spec("resnet18").name == "resnet18"
