"""Networks of other libraries and of the user's own code: built, refused, and never run on a file's word."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fake_zoo
from unbackdoor.errors import ConfigError, InputError, MissingExtra, UnsafeFile, UnsupportedModel
from unbackdoor.networks.build import canonical, network, preprocessing_of
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.sources import SOURCES, optional_libraries
from unbackdoor.networks.spec import Spec, read_spec, value_of
from unbackdoor.opening.classifier_files import load_model, save_model
from unbackdoor.types import Classifier

pytestmark = pytest.mark.leaves_traces
GEOMETRY = Geometry(3, 16, 16, 5)
NAMES = [f"class {k}" for k in range(5)]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins of the three libraries, which work."""
    folder = fake_zoo.write(
        tmp_path / "site",
        timm=fake_zoo.TIMM,
        torchvision="",
        torchvision__models=fake_zoo.TORCHVISION_MODELS,
        transformers=fake_zoo.TRANSFORMERS,
    )
    with fake_zoo.importable(folder, monkeypatch):
        yield folder


@pytest.fixture
def no_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without any of the three, whatever this one holds."""
    for name in ("timm", "torchvision", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)


# Specs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("resnet18[width=8]", Spec("unbackdoor", "resnet18", {"width": "8"})),
        ("unbackdoor:resnet18", Spec("unbackdoor", "resnet18")),
        ("timm:vit_tiny[img_size=32, depth=2]", Spec("timm", "vit_tiny", {"img_size": "32", "depth": "2"})),
        ("torchvision:resnet18", Spec("torchvision", "resnet18")),
        ("hf:./a folder/vit", Spec("hf", "./a folder/vit")),
        ("my nets/net.py:make[width=3]", Spec("python", "my nets/net.py:make", {"width": "3"})),
        ("net.py:Net.build", Spec("python", "net.py:Net.build")),
    ],
)
def test_specs_are_taken_apart_and_put_together(text: str, spec: Spec) -> None:
    assert read_spec(text) == spec
    assert read_spec(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "timm:../evil",
        "timm:hf-hub:org/net",
        "torchvision:a/b",
        "net.py:",
        "net.py:a b",
        "other:resnet18",
        "hf:",
    ],
)
def test_names_that_lead_elsewhere_are_no_specs(text: str) -> None:
    with pytest.raises(ConfigError, match="expected the form"):
        read_spec(text)


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("0.5", 0.5), ("True", True), ("false", False), ("gap", "gap")]
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


# Absent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "extra"), [("timm:resnet18", "zoo"), ("torchvision:densenet121", "zoo"), ("hf:FOLDER", "hf")]
)
def test_an_absent_library_is_named_with_its_extra(
    tmp_path: Path, no_zoo: None, spec: str, extra: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingExtra) as caught:
        network(spec.replace("FOLDER", str(tmp_path)), GEOMETRY)
    assert caught.value.extra == extra


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_without_torchvision_our_own_family_takes_its_place(no_zoo: None, name: str) -> None:
    net = network(f"torchvision:{name}", GEOMETRY, device="meta")
    keys = net.state_dict()
    stem = "conv1.weight" if name == "resnet18" else "features.0.0.weight"
    assert tuple(keys[stem].shape)[1:] == (3, 7, 7) if name == "resnet18" else (3, 3, 3)
    facts = preprocessing_of(f"torchvision:{name}")
    assert "of this package is the same network" in facts.note
    assert facts.size == (224, 224)
    assert facts.mean == (0.485, 0.456, 0.406)


# Installed, and not to be imported -----------------------------------------------------------------


# What torchvision itself does while it is imported beside a torch of another build.
OTHER_BUILD = """
import torch
torch.library.register_fake("torchvision::nms")(lambda *args: None)
"""


@pytest.mark.parametrize("spec", ["torchvision:tiny_net", "timm:tiny_net", "hf:FOLDER"])
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (OTHER_BUILD, "RuntimeError: operator torchvision::nms does not exist"),
        ("raise ImportError('libcudart.so: cannot open shared object file')", "libcudart.so"),
        ("raise OSError('undefined symbol')", "OSError: undefined symbol"),
        ("import torch; torch.a_name_of_another_release", "AttributeError"),
        ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        ("raise RuntimeError", "RuntimeError: no message"),
    ],
)
def test_a_library_that_cannot_be_imported_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, source: str, reason: str
) -> None:
    """Also for timm and transformers, which import torchvision; and the second time as the first."""
    folder = fake_zoo.write(
        tmp_path / "site",
        torchvision=source,
        torchvision__models=fake_zoo.TORCHVISION_MODELS,
        timm="import torchvision\n" + fake_zoo.TIMM,
        transformers="import torchvision\n" + fake_zoo.TRANSFORMERS,
    )
    monkeypatch.setattr(optional_libraries.metadata, "version", lambda name: "1.2+cpu")
    (tmp_path / "config.json").write_text("{}")
    with fake_zoo.importable(folder, monkeypatch):
        for _ in range(2):
            with pytest.raises(InputError, match="is installed but cannot be imported") as caught:
                network(spec.replace("FOLDER", str(tmp_path)), GEOMETRY)
            text = str(caught.value)
            assert not isinstance(caught.value, MissingExtra)
            assert reason in text
            assert "torch 1.2+cpu, torchvision 1.2+cpu, timm 1.2+cpu" in text
            assert "belong together" in text
            assert "pip install --force-reinstall torch torchvision --index-url" in text


def test_no_operator_is_declared_in_the_place_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_zoo.write(tmp_path, torchvision=OTHER_BUILD)
    with fake_zoo.importable(folder, monkeypatch), pytest.raises(InputError):
        network("torchvision:tiny_net", GEOMETRY)
    assert not hasattr(torch.ops.torchvision, "nms")


@pytest.mark.parametrize("spec", ["timm:tiny_net", "hf:FOLDER"])
def test_a_library_whose_torchvision_is_absent_names_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    folder = fake_zoo.write(tmp_path / "site", timm="import torchvision", transformers="import torchvision")
    (tmp_path / "config.json").write_text("{}")
    with fake_zoo.importable(folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(MissingExtra) as caught:
            network(spec.replace("FOLDER", str(tmp_path)), GEOMETRY)
    assert "torchvision" in str(caught.value)


# timm ----------------------------------------------------------------------------------------------


def test_timm(zoo: Path) -> None:
    net = network("timm:tiny_net[depth=3]", GEOMETRY)
    assert net(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert len(net.blocks) == 3  # type: ignore[arg-type]
    facts = preprocessing_of("timm:tiny_net")
    assert (facts.mean, facts.std, facts.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (16, 16))
    assert not facts.for_these_weights
    assert preprocessing_of("timm:tiny_net[img_size=32]").size == (32, 32)
    assert canonical("timm:tiny_net[depth=3]") == "timm:tiny_net[depth=3]"


def test_the_global_generator_is_left_alone(zoo: Path) -> None:
    before = torch.get_rng_state()
    a, b = (network("timm:tiny_net", GEOMETRY, seed=4).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:tiny_nets", "did you mean 'tiny_net'"),
        ("timm:tiny_net[checkpoint_path=evil]", "unknown option 'checkpoint_path'"),
        ("timm:tiny_net[pretrained=true]", "unknown option 'pretrained'"),
        ("timm:tiny_net[depth=100001]", "within 100000"),
        ("timm:tiny_net[depth=nan]", "within 100000"),
        ("timm:tiny_net[depth=a/b]", "a word"),
        ("timm:tiny_net[num_heads=2]", "timm says"),
        ("torchvision:tiny_nets", "did you mean 'tiny_net'"),
        ("torchvision:tiny_net[weights=DEFAULT]", "unknown option 'weights'"),
        ("torchvision:tiny_net[image_size=3]", "torchvision says"),
    ],
)
def test_options_that_fetch_or_do_not_fit_are_refused(zoo: Path, spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        network(spec, GEOMETRY)


def test_a_network_of_timm_is_saved_and_loaded_again(zoo: Path, tmp_path: Path) -> None:
    net = network("timm:tiny_net[depth=1]", GEOMETRY)
    model = Classifier(
        net, input_shape=(3, 16, 16), class_names=NAMES, architecture="timm:tiny_net[depth=1]"
    ).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    pixels = torch.rand(2, 3, 16, 16)
    # Its table of positions is in no state dict, and must not be lost with the memory-less skeleton.
    assert torch.equal(loaded(pixels), model(pixels))
    assert loaded.architecture == "timm:tiny_net[depth=1]"
    model.architecture = "timm:tiny_net[depth=2]"
    with pytest.raises(UnsupportedModel, match="do not fit"):
        save_model(model, tmp_path / "n")


def test_a_network_that_cannot_be_built_without_memory_is_built_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = fake_zoo.TIMM.replace(
        "super().__init__()", "super().__init__(); torch.linspace(0, 1, 3)[1].item()"
    )
    folder = fake_zoo.write(tmp_path / "site", timm=stubborn)
    with fake_zoo.importable(folder, monkeypatch):
        net = network("timm:tiny_net", GEOMETRY)
        save_file(net.state_dict(), tmp_path / "m.safetensors")
        loaded = load_model(
            tmp_path / "m.safetensors",
            architecture="timm:tiny_net",
            input_shape=(3, 16, 16),
            class_names=NAMES,
        )
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(pixels), net(pixels))


# torchvision ---------------------------------------------------------------------------------------


def test_torchvision(zoo: Path) -> None:
    assert network("torchvision:tiny_net", GEOMETRY)(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    grey = network("torchvision:tiny_net", Geometry(1, 16, 16, 5))
    assert grey(torch.rand(2, 1, 16, 16)).shape == (2, 5)
    facts = preprocessing_of("torchvision:tiny_net")
    assert facts.size == (32, 32)
    assert facts.mean == (0.485, 0.456, 0.406)


# transformers --------------------------------------------------------------------------------------


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., Path]:
    def write(preprocessor: dict[str, Any] | None = None, **changes: Any) -> Path:
        folder = tmp_path / "hf"
        folder.mkdir(exist_ok=True)
        labels = {"0": "cat", "1": "dog"}
        config = {"model_type": "tiny", "num_channels": 3, "image_size": 16, "id2label": labels, **changes}
        (folder / "config.json").write_text(json.dumps(config))
        if preprocessor is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return folder

    return write


def test_transformers_returns_logits_under_its_own_keys(zoo: Path, hf_folder: Any) -> None:
    net = network(f"hf:{hf_folder()}", GEOMETRY)
    assert net(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert set(net.state_dict()) == {"vit.weight", "vit.bias", "classifier.weight", "classifier.bias"}
    assert type(net).__name__ == "TinyForImageClassification"
    import copy

    assert copy.deepcopy(net)(torch.rand(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ({"do_normalize": False}, (), ()),
        # Pixels are left in 0..255 there: p 255 - 127.5 over 51 is p - 0.5 over 0.2.
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, (0.5,) * 3, (0.2,) * 3),
        (None, None, None),
    ],
)
def test_the_preprocessor_tells_the_normalisation(
    hf_folder: Any, preprocessor: Any, mean: Any, std: Any
) -> None:
    facts = preprocessing_of(f"hf:{hf_folder(preprocessor)}")
    assert facts.mean == mean
    assert facts.std == std
    assert facts.for_these_weights == (mean is not None)
    assert facts.class_names == ("cat", "dog")
    assert facts.size == (16, 16)


def test_labels_that_nobody_named_are_no_names(hf_folder: Any) -> None:
    folder = hf_folder(
        {"size": {"shortest_edge": 20}}, id2label={"0": "LABEL_0", "1": "LABEL_1"}, image_size=None
    )
    facts = preprocessing_of(f"hf:{folder / 'config.json'}")
    assert facts.class_names is None
    assert facts.size == (20, 20)


def test_configs_that_cannot_be_used(zoo: Path, hf_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no config of transformers"):
        network(f"hf:{tmp_path / 'none'}", GEOMETRY)
    with pytest.raises(InputError, match="cannot build an image classifier"):
        network(f"hf:{hf_folder(model_type='bert')}", GEOMETRY)
    with pytest.raises(ConfigError, match="takes no options"):
        network(f"hf:{hf_folder()}[a=1]", GEOMETRY)
    (hf_folder() / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="no JSON object"):
        preprocessing_of(f"hf:{tmp_path / 'hf'}")


# The user's own code -------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from dataclasses import dataclass
import helper_beside_it
from torch import nn
Path(__file__).with_name("ran").touch()

@dataclass
class Facts:
    width: int = 2

class Net(nn.Module):
    def __init__(self, width=2, norm=False, name="x"):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, padding=1)
        self.fc = nn.Linear(width, 5)
        assert isinstance(width, int) and isinstance(norm, bool)
    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def make(**options):
    return Net(**options)

def number():
    return 3

def broken():
    raise KeyError("oh")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "helper_beside_it.py").write_text("VALUE = 1\n")
    path = tmp_path / "net.py"
    path.write_text(CODE)
    return path


def test_the_users_code_is_called_with_the_arguments(code: Path) -> None:
    before = list(sys.path)
    net = network(f"{code}:make[width=3,norm=true]", GEOMETRY)
    assert net.state_dict()["body.weight"].shape == (3, 3, 3, 3)
    assert network(f"{code}:Net", GEOMETRY)(torch.rand(1, 3, 8, 8)).shape == (1, 5)
    assert sys.path == before
    code.write_text(CODE.replace("nn.Linear(width, 5)", "nn.Linear(width, 7)"))
    assert network(f"{code}:Net", GEOMETRY)(torch.rand(1, 3, 8, 8)).shape == (1, 7)


def test_the_text_is_run_and_no_compiled_copy_beside_it(code: Path) -> None:
    import importlib.util
    import py_compile

    other = code.with_name("other.py")
    other.write_text(CODE.replace("nn.Linear(width, 5)", "nn.Linear(width, 9)"))
    # A copy that claims to need no check against the text, as a hostile folder may hold.
    planted = importlib.util.cache_from_source(str(code))
    py_compile.compile(
        str(other), cfile=planted, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    assert network(f"{code}:Net", GEOMETRY)(torch.rand(1, 3, 8, 8)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("number", UnsupportedModel, "returned no network"),
        ("broken", InputError, "KeyError: 'oh'"),
        ("missing", InputError, "AttributeError"),
        ("make[depth=3]", InputError, "TypeError"),
    ],
)
def test_code_that_fails_is_told(code: Path, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        network(f"{code}:{name}", GEOMETRY)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such Python file"):
        network(f"{tmp_path / 'none.py'}:make", GEOMETRY)


@pytest.mark.parametrize("kind", ["python", "hf"])
def test_a_card_cannot_make_code_run(
    code: Path, tmp_path: Path, hf_folder: Any, zoo: Path, kind: str
) -> None:
    spec = f"{code}:Net" if kind == "python" else f"hf:{hf_folder()}"
    net = network(spec, GEOMETRY)
    model = Classifier(net, input_shape=(3, 16, 16), class_names=NAMES, architecture=spec).eval()
    save_model(model, tmp_path / "m")
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(UnsafeFile, match=r"card names .*nothing was executed.*name it yourself"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "ran").exists()
    loaded = load_model(tmp_path / "m", architecture=spec)
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(pixels), model(pixels))
    assert loaded.class_names == tuple(NAMES)


def test_only_members_of_libraries_may_be_named_by_a_card() -> None:
    assert {name for name, source in SOURCES.items() if source.from_card} == {"timm", "torchvision"}
