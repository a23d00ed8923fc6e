"""What a pickle may name without harm: by where it is defined and what it is, and nothing else."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch._weights_only_unpickler import _get_allowed_globals

from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.torch_save.pickle_globals import CLASSES_FILE, Name, judge
from unbackdoor.weights.read import read_contents

# Initialisers draw from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

ROOT = Path(__file__).parents[2]
TABLE: dict[str, list[str]] = json.loads(CLASSES_FILE.read_text())


def split(full: str) -> Name:
    module, _, last = full.rpartition(".")
    return Name(module, last)


def test_what_torch_itself_allows_is_never_dangerous() -> None:
    judged = {full: judge(split(full)) for full in _get_allowed_globals()}
    assert len(judged) > 100
    assert {full for full, danger in judged.items() if danger not in ("plain", "library")} == set()


def test_the_storages_and_types_of_torch_are_no_doors() -> None:
    for name, value in vars(torch).items():
        if judge(Name("torch", name)) in ("plain", "library"):
            kinds = (type, torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
            assert isinstance(value, kinds) or name in ("relu", "tanh", "sigmoid", "selu", "celu"), name


@pytest.mark.parametrize("library", ["torch", "sklearn", "unbackdoor", "numpy"])
def test_nothing_that_a_module_only_imports_is_harmless(library: str) -> None:
    importlib.import_module({"sklearn": "sklearn.preprocessing"}.get(library, library))
    harmless = 0
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(f"{library}.") or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if judge(Name(module_name, name)) not in ("plain", "library"):
                continue
            harmless += 1
            if module_name in TABLE and name in TABLE[module_name]:
                assert isinstance(value, type), (module_name, name)
                assert name in TABLE[value.__module__], (module_name, name)
                assert value.__name__ == name
            else:
                assert not isinstance(value, ModuleType), (module_name, name)
    assert harmless > 5


@pytest.mark.parametrize(
    "full",
    [
        "torch.utils.data.datapipes.utils.common.StreamWrapper", "torch.utils.data.dataloader.DataLoader",
        "torch.utils.data._utils.worker.Thread", "torch.nn.parallel.distributed.RRef",
        "torch.nn.parallel.parallel_apply.Thread", "torch.nn.modules.module.OrderedDict",
        "torch.nn.modules.module.RemovableHandle", "torch.nn.Linear", "torch.nn.functional.importlib",
        "torch.nn.functional.handle_torch_function", "torch.nn.functional.boolean_dispatch",
        "torch.nn.functional.warnings", "torch.optim.optimizer.Any", "torch.utils.data.sampler.Path",
        "torchvision.datasets.utils.ZipFile", "torchvision.datasets.folder.ImageFolder",
        "torchvision.transforms.functional.Path", "torchvision.models._api.Path", "torchvision.models.os",
        "torchvision.transforms.transforms.Image", "torchvision.models.detection.NamedTemporaryFile",
        "timm.models._hub.Path", "timm.models._builder.Thread", "timm.data.readers.reader_image_tar.TarFile",
        "timm.models.vision_transformer.Final", "timm.data.dataset.Image", "numpy.random.mtrand.Thread",
        "numpy.dtypes.os", "transformers.models.vit.modeling_vit.Path",
        "transformers.models.vit.modeling_vit.Popen", "sklearn.externals.Thread", "sklearn.utils.Bunch",
        "sklearn.preprocessing._data.Path", "unbackdoor.networks.build.Path", "unbackdoor.networks.Popen",
        "unbackdoor.models.resnet.Path", "torch.jit._pickle.Any", "torch.distributed.rpc.RRef",
    ],
)  # fmt: skip
def test_what_looks_like_a_class_of_a_library_and_is_none(full: str) -> None:
    assert judge(split(full)) == "dangerous"


def test_the_table_is_that_of_the_installed_libraries() -> None:
    checked = 0
    for module_name, names in TABLE.items():
        if module_name.startswith(("torch.nn.modules", "torch.optim", "unbackdoor.", "sklearn.")):
            try:
                module = importlib.import_module(module_name)
            except ImportError:
                continue  # of another version
            for name in names:
                value: Any = getattr(module, name, None)
                if value is not None:
                    checked += 1
                    assert isinstance(value, type)
                    assert not hasattr(value, "__del__")
                    assert not issubclass(value, enum.Enum)
    assert checked > 150


@pytest.mark.parametrize(
    "full",
    [
        "torchvision.ops.misc.Conv2dNormActivation",
        "torchvision.ops.misc.ConvNormActivation",
        "torchvision.models.densenet._DenseBlock",
        "torchvision.models.regnet.SimpleStemIN",
        "timm.layers.norm.LayerNorm2d",
        "timm.layers.norm_act.BatchNormAct2d",
        "timm.models.layers.norm_act.BatchNormAct2d",
        "timm.layers.linear.Linear",
        "timm.layers.format.Format",
        "timm.models.levit.Stem16",
        "torch.nn.modules.module._WrappedHook",
    ],
)
def test_what_descends_from_a_layer_of_torch_is_harmless(full: str) -> None:
    assert judge(split(full)) == "library"


def test_the_table_lists_this_project_as_it_is() -> None:
    path = ROOT / "scripts" / "library_classes.py"
    spec = importlib.util.spec_from_file_location("library_classes", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    own = {module: names for module, names in TABLE.items() if module.startswith("unbackdoor.")}
    # Made anew by: python scripts/library_classes.py SITE-PACKAGES src WHEEL...
    torch_classes = [
        f"{module}.{name}" for module in TABLE if module.startswith("torch.") for name in TABLE[module]
    ]
    assert script.listed(ROOT / "src", frozenset(torch_classes)) == own


@pytest.mark.parametrize("protocol", range(6))
def test_whole_networks_are_made_and_not_called(tmp_path: Path, protocol: int) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(net, protocol=protocol))
    if protocol >= 2:  # the older ones have no mark of their own, and are of no supported format
        assert inspect(tmp_path / "m.pkl").loading == "known classes"
        assert set(read_contents(tmp_path / "m.pkl").names.values()) == {"library"}
    else:
        assert not inspect(tmp_path / "m.pkl").executes


@pytest.mark.parametrize(
    "call",
    [
        b"ctorch.nn.modules.linear\nLinear\nK\x02K\x02\x86R",
        b"ctransformers.models.vit.modeling_vit\nViTModel\n}\x85R",
        b"(K\x02itorch.nn.modules.linear\nLinear\n",
        b"(ctorch.nn.modules.linear\nLinear\nK\x02o",
        b"ccopyreg\n_reconstructor\nctorch.nn.modules.linear\nLinear\nctorch.nn.modules.linear\nLinear\nK\x02\x87R",
        # Called by what is harmless itself.
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch.nn.modules.linear\nLinear\nctorch\nTensor\nK\x02\x85NtR",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cfunctools\npartial\nctorch.nn.modules.linear\nLinear\n\x85R"
        b"ctorch\nTensor\nK\x02\x85NtR",
        b"ctorch._tensor\n_rebuild_from_type_v2\nq\0"
        b"(h\0ctorch\nTensor\n(cbuiltins\nbytes\nctorch\nTensor\n)NtNtR",
        b"cnumpy.random._pickle\n__bit_generator_ctor\nctorch.nn.modules.linear\nLinear\n\x85R",
        b"cnumpy.random._pickle\n__generator_ctor\nX\x01\0\0\0actorch.nn.modules.linear\nLinear\n\x86R",
    ],
)
def test_a_class_of_networks_that_is_called(tmp_path: Path, call: bytes) -> None:
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02" + call + b".")
    assert inspect(tmp_path / "m.pkl").loading == "dangerous"
