"""Pickles that are meant to run, to hide, or to exhaust; none runs, none hides, and all of them end."""

from __future__ import annotations

import functools
import json
import pickle
import struct
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hostile import Payload
from unbackdoor.errors import InputError, UnbackdoorError, UnsafeFile
from unbackdoor.opening.inspection import inspect
from unbackdoor.weights.formats.torch_save import checkpoints
from unbackdoor.weights.formats.torch_save import pickle_reader as pickles
from unbackdoor.weights.formats.torch_save.pickle_globals import Name, judge
from unbackdoor.weights.formats.torch_save.pickle_reader import Trail
from unbackdoor.weights.read import read_contents, read_state

# Initialisers draw from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

SYSTEM = b"cposix\nsystem\n(U\x04truetR0"  # a call whose result is thrown away
TENSOR = {"a": torch.arange(6.0).reshape(2, 3)}


def told(path: Path, name: str = "posix.system") -> None:
    """Assert that a file is refused, that the reason is told, and that inspect says so without raising."""
    with pytest.raises(UnsafeFile, match="would run code"):
        read_state(path)
    found = inspect(path)
    assert found.executes
    assert name in found.dangerous


def write(path: Path, code: bytes) -> Path:
    path.write_bytes(b"\x80\x02" + code)
    return path


# ---------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.exec",
        "builtins.getattr", "builtins.__import__", "__builtin__.eval", "sys.modules", "socket.socket",
        "shutil.rmtree", "runpy.run_path", "importlib.import_module", "ctypes.CDLL", "pickle.loads",
        "_pickle.loads", "torch.load", "torch.hub.load", "torch.jit.load",
        "torch.fx.graph_module.reduce_graph_module",
        "torch.utils.collect_env.run", "torch._inductor.codecache.compile_file", "numpy.load",
        "numpy.testing._private.utils.runstring", "numpy.f2py.crackfortran.getlincoef", "webbrowser.open",
        "pip._internal.main", "timeit.timeit", "cProfile.run", "pdb.run", "code.interact",
        "operator.methodcaller",
        "operator.attrgetter", "marshal.loads", "types.FunctionType", "types.CodeType", "asyncio.run",
        "distutils.spawn.spawn", "pipes.Template", "commands.getoutput", "idlelib.pyshell.main", "pty.spawn",
        "multiprocessing.util.spawnv_passfds", "logging.config.fileConfig", "pkgutil.resolve_name",
        "ensurepip._run_pip",
        "joblib.load", "pandas.read_pickle", "setuptools.sandbox.run_setup", "tensorflow.io.read_file",
        "copyreg.extension_7", "io.open", "_io.open", "pathlib.os", "builtins.map", "functools.reduce",
        "transformers.pipelines.pipeline", "torchvision.models.densenet.__import__",
        "torch.serialization.load", "torch.storage.os", "models.os.system", "utils.sys.exit", ".os.system",
        "mypackage.__builtins__.eval", "net.Net.__init__",
    ],
)  # fmt: skip
def test_dangerous_names(name: str) -> None:
    module, _, last = name.rpartition(".")
    assert judge(Name(module, last)) == "dangerous"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.nn.modules.module", "os.system"),
        ("torch.nn.modules.module", "Module.__init__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.mro"),
        ("models", "resnet.os.system"),
        ("torch.FloatStorage", "system"),
        ("torch", "FloatStorage\n"),
    ],
)
def test_parts_of_names_are_no_way_around(module: str, name: str) -> None:
    assert judge(Name(module, name)) == "dangerous"


@pytest.mark.parametrize(
    "name",
    ["collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "torch.bfloat16"],
)
def test_names_of_plain_tensors(name: str) -> None:
    module, _, last = name.rpartition(".")
    assert judge(Name(module, last)) == "plain"


@pytest.mark.parametrize(
    ("name", "danger"),
    [
        ("argparse.Namespace", "library"),
        ("numpy.core.multiarray.scalar", "library"),
        ("numpy._core.multiarray._reconstruct", "library"),
        ("torch.nn.modules.conv.Conv2d", "library"),
        ("torchvision.models.resnet.BasicBlock", "library"),
        ("torchvision.models.densenet._DenseLayer", "library"),
        ("torch._C._nn.gelu", "library"),
        ("transformers.models.vit.modeling_vit.ViTForImageClassification", "library"),
        ("transformers.models.vit.configuration_vit.ViTConfig", "library"),
        ("timm.models.vision_transformer.VisionTransformer", "library"),
        ("torch.nn.parallel.data_parallel.DataParallel", "library"),
        ("models.resnet.ResNet", "unknown"),
        ("__main__.Net", "unknown"),
        ("my_package.tools.run", "unknown"),
    ],
)
def test_names_that_are_reported_and_no_more(name: str, danger: str) -> None:
    module, _, last = name.rpartition(".")
    assert judge(Name(module, last)) == danger


# ---------------------------------------------------------------------------------------------------
# Hiding


def test_a_payload_before_the_pickle_breaks_off(tmp_path: Path) -> None:
    told(write(tmp_path / "m.pt", SYSTEM + b"\x8c"))


@pytest.mark.parametrize(
    "before",
    [
        # A tensor that no reader here would make, which torch might: 17 axes, a negative offset, no storage.
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(" + b"K\x01" * 17 + b"t(" + b"K\x01" * 17 + b"tR0",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NJ\xff\xff\xff\xff)))R0",
        b"U\x07storageQ0",
        b"Papersistent id\n0",
        # Setting and appending on what has no items.
        b"cmodels\nthing\nU\x01xa0",
        b"cmodels\nthing\nU\x01xU\x01ys0",
        b"}(]K\x01u0",
        b"cmodels\nthing\nK\x01\x85\x62\x30",
    ],
)
def test_a_payload_behind_what_this_reader_cannot_make(tmp_path: Path, before: bytes) -> None:
    told(write(tmp_path / "m.pt", before + SYSTEM + b"N."))


@pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
def test_a_payload_beside_good_weights(tmp_path: Path, kind: str) -> None:
    content = {"state_dict": TENSOR, "args": Payload(tmp_path / "executed")}
    if kind == "raw":
        (tmp_path / "m.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=kind == "zip")
    told(tmp_path / "m.pt")
    # The tensors are there for whoever looks at the contents.
    assert torch.equal(read_contents(tmp_path / "m.pt").tensors["a"], TENSOR["a"])
    assert not (tmp_path / "executed").exists()


def test_a_payload_in_the_parts_of_the_older_form(tmp_path: Path) -> None:
    torch.save(TENSOR, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "m.pt").read_bytes()
    parts = [pickle.dumps(Payload(tmp_path / "executed"), protocol=2)]
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    # In the place of the version, and of the facts about the machine.
    for head in (magic, magic + pickle.dumps(1001, protocol=2)):
        (tmp_path / "m.pt").write_bytes(head + parts[0] + content[len(head) :])
        told(tmp_path / "m.pt")
    assert not (tmp_path / "executed").exists()


def test_a_payload_behind_the_first_pickle(tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"a": 1}) + b"\x80\x02" + SYSTEM + b"N.")
    told(tmp_path / "m.pkl")


def test_a_payload_without_any_mark_of_a_pickle(tmp_path: Path) -> None:
    # Protocol 0 begins with any letter.
    (tmp_path / "m.bin").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    told(tmp_path / "m.bin")


def test_a_safetensors_file_that_is_a_pickle_as_well(tmp_path: Path) -> None:
    # The length of the header begins with X: to a pickle the text that the next four bytes measure.
    good = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"x":"'
    text_end = 9 + 64  # X, 4 bytes of length, and a text of so many bytes
    code = b"0cposix\nsystem\n(S'true'\ntR."
    for length in range(0x58, 1 << 16, 0x100):
        # Bytes 1 to 4 are what the pickle takes for the length of its text.
        text = int.from_bytes(length.to_bytes(8, "little")[1:5], "little")
        start = 5 + text - 8
        if start < len(good) or length < start + len(code) + 4:
            continue
        header = good + b"y" * (start - len(good)) + json.dumps(code.decode())[1:-1].encode()
        header = header.replace(b"\\n", b"\n") + b'"}}'
        break
    assert text_end
    (tmp_path / "m.safetensors").write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    assert inspect(tmp_path / "m.safetensors").executes


def test_a_pickle_inside_a_call_that_is_put_together(tmp_path: Path) -> None:
    opens = torch.storage._load_from_bytes  # type: ignore[attr-defined]
    held = pickle.dumps({"a": functools.partial(opens, b"...")})
    (tmp_path / "m.pt").write_bytes(held)
    told(tmp_path / "m.pt", "torch.storage._load_from_bytes")
    # While that of an honest pickle of a tensor is opened, and what is in it is told.
    (tmp_path / "n.pt").write_bytes(pickle.dumps(TENSOR))
    assert torch.equal(read_state(tmp_path / "n.pt")["a"], TENSOR["a"])
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(Payload(tmp_path / "executed"))
    outer = b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R."
    (tmp_path / "o.pt").write_bytes(outer)
    told(tmp_path / "o.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "code",
    [
        # Python's machine in C drops what the frame cut off and imports os; that in Python joins the two.
        b"\x95\x09\0\0\0\0\0\0\0cmodelsXYos\nsystem\n)R.",
        b"\x95\x20\0\0\0\0\0\0\0\x95\x05\0\0\0\0\0\0\0cposix\nsystem\n)R.",
    ],
)
def test_instructions_divided_between_frames(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(b"\x80\x04" + code)
    with pytest.raises(UnsafeFile, match="different things"):
        read_state(tmp_path / "m.pt")
    assert inspect(tmp_path / "m.pt").executes


def test_what_a_call_returns_is_called(tmp_path: Path) -> None:
    told(write(tmp_path / "m.pt", b"cmodels\nmake\n)R(U\x04truetR."), "a name.that is computed while loading")


# ---------------------------------------------------------------------------------------------------
# Exhausting


def quickly(read: Callable[[], Any], *, memory: int = 60_000_000) -> None:
    begun = time.process_time()
    tracemalloc.start()
    try:
        read()
    except UnbackdoorError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - begun < 8
    assert peak < memory


@pytest.mark.parametrize(
    "code",
    [
        b"K\x01" + b"2\x86" * 300 + b".",  # a pair of the pair of the pair, 2 to the 300 numbers
        b"}K\x01" + b"2\x86" * 300 + b"K\x01s.",  # as the key of a dictionary, which would be hashed
        b"]" * 20_000 + b"a" * 19_999 + b".",  # lists within lists
        b"}" * 20_000 + b".",
        b"]q\x00h\x00a.",  # a list that contains itself
        b"}q\x00U\x05modelh\x00s.",  # a checkpoint whose model is the checkpoint
        b"(" * 30_000 + b".",
        b"K\x01" * 30_000 + b".",
        b"]" + b"2" * 30_000 + b".",
    ],
    ids=lambda code: repr(code[:12]),
)
def test_structures_that_grow_without_end(tmp_path: Path, code: bytes) -> None:
    quickly(lambda: read_state(write(tmp_path / "m.pt", code)))


def test_a_module_that_contains_itself(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net._modules["again"] = net
    torch.save(net, tmp_path / "m.pt")
    assert set(read_state(tmp_path / "m.pt")) == {"0.weight", "0.bias"}


def test_modules_that_contain_each_other_many_times(tmp_path: Path) -> None:
    # 2 to the 40 names out of 40 modules.
    net: nn.Module = nn.Linear(1, 1)
    for _ in range(40):
        outer = nn.Module()
        outer._modules = {"a": net, "b": net}
        net = outer
    torch.save(net, tmp_path / "m.pt")
    with pytest.raises(InputError, match="too many parts"):
        read_state(tmp_path / "m.pt")


def test_a_pickle_of_too_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_STEPS", 10_000)
    with pytest.raises(UnsafeFile, match="too long"):
        read_state(write(tmp_path / "m.pt", b"N0" * 10_000 + b"N."))


def test_pickles_within_pickles(tmp_path: Path) -> None:
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    for _ in range(6):
        call = (
            b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R."
        )
        inner = call
    (tmp_path / "m.pt").write_bytes(inner)
    with pytest.raises(UnsafeFile, match="within pickles"):
        read_state(tmp_path / "m.pt")


class Says:
    """Is pickled as any call of torch's."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "words"),
    [
        (0, (7,), (1,), "beyond its bytes"),
        (5, (2,), (1,), "beyond its bytes"),
        (0, (2, 3), (1, 100), "beyond its bytes"),
        (0, (1 << 62,), (1,), "absurd shape"),
        (0, (1 << 39, 1 << 39), (0, 0), "absurd shape"),
        (0, (1 << 30,), (0,), "more than it holds"),
        (0, (0, 1 << 39, 1 << 39), (1, 1, 1), "absurd shape"),
        (0, (-1,), (1,), "cannot be rebuilt"),
        (-1, (2,), (1,), "cannot be rebuilt"),
        (0, (2,), (-1,), "cannot be rebuilt"),
        (0, (1,) * 20, (1,) * 20, "cannot be rebuilt"),
        (0, (2, 3), (1,), "absurd shape"),
        (0, ("2",), (1,), "cannot be rebuilt"),
        (0, (True,), (1,), "cannot be rebuilt"),
    ],
)
def test_tensors_of_absurd_shapes(tmp_path: Path, offset: int, shape: Any, stride: Any, words: str) -> None:
    untyped = torch.arange(6.0).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)
    rebuilt = Says(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict())
    torch.save({"a": rebuilt}, tmp_path / "m.pt")

    def read() -> None:
        with pytest.raises(UnbackdoorError, match=words):
            read_state(tmp_path / "m.pt")

    quickly(read, memory=5_000_000)


def test_a_storage_that_claims_more_than_its_entry(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "m.pt").read_bytes()
    claimed = content.replace(struct.pack("<q", 1000), struct.pack("<q", 1 << 50))
    assert claimed != content
    (tmp_path / "m.pt").write_bytes(claimed)
    with pytest.raises(InputError, match="cut short"):
        read_state(tmp_path / "m.pt")


def test_many_views_of_a_whole_file_are_counted(tmp_path: Path) -> None:
    whole = torch.zeros(10_000)
    torch.save({f"a{i}": whole.view(100, 100) for i in range(100)}, tmp_path / "m.pt")
    with pytest.raises(UnsafeFile, match="more than it holds"):
        read_state(tmp_path / "m.pt")


# ---------------------------------------------------------------------------------------------------
# The oldest form


def tar_checkpoint(payload: bytes = b"") -> bytes:
    """Return a checkpoint as the first releases wrote it: storages, tensors and a pickle in a tar file."""
    import io
    import tarfile

    def dump(*values: Any) -> bytes:
        return b"".join(pickle.dumps(value, protocol=2) for value in values)

    numbers = struct.pack("<q6f", 6, *range(6))
    kind = b"\x80\x02(K\x07U\x03cpuctorch\nFloatStorage\nt."
    storages = dump(1) + kind + numbers + dump([])
    sizes = struct.pack("<2i2q2qq", 2, 0, 2, 3, 3, 1, 0)
    tensors = dump(1) + b"\x80\x02(K\x09K\x07ctorch\nFloatTensor\nt." + sizes
    described = b"\x80\x02" + payload + b"ccollections\nOrderedDict\n)RU\x01aU\x019Qs."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in (("storages", storages), ("tensors", tensors), ("pickle", described)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_the_oldest_form_is_read_and_a_payload_in_it_told(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(tar_checkpoint())
    assert read_contents(tmp_path / "m.pt").format == "tar checkpoint"
    assert torch.equal(read_state(tmp_path / "m.pt")["a"], TENSOR["a"])
    (tmp_path / "m.pt").write_bytes(tar_checkpoint(SYSTEM))
    told(tmp_path / "m.pt")


@pytest.mark.parametrize("keep", [512, 700, 2000, 2570])
def test_the_oldest_form_cut_short(tmp_path: Path, keep: int) -> None:
    (tmp_path / "m.pt").write_bytes(tar_checkpoint()[:keep])
    with pytest.raises(InputError):
        read_state(tmp_path / "m.pt")


def test_any_other_tar_file_is_refused_with_a_reason(tmp_path: Path) -> None:
    import tarfile

    save_file(TENSOR, tmp_path / "weights")
    with tarfile.open(tmp_path / "m.pth.tar", "w") as tar:
        tar.add(tmp_path / "weights", "weights")
    with pytest.raises(InputError, match="tar archive but not a checkpoint"):
        read_state(tmp_path / "m.pth.tar")


@pytest.mark.parametrize(
    ("head", "word"),
    [(b"\x1f\x8b\x08", "gzip"), (b"\x89HDF\r\n", "HDF5"), (b"\x93NUMPY", "NumPy"), (b"BZh9", "bzip2")],
)
def test_other_formats_are_named(tmp_path: Path, head: bytes, word: str) -> None:
    (tmp_path / "m.pt").write_bytes(head + bytes(600))
    with pytest.raises(InputError, match=word):
        read_state(tmp_path / "m.pt")


# ---------------------------------------------------------------------------------------------------
# Anything at all


def test_the_machine_ends_on_any_bytes() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = [ord(opcode) for opcode in pickles._OPCODES]
    for _ in range(1500):
        picks = torch.randint(0, len(codes), (40,), generator=generator).tolist()
        content = b"\x80\x02" + bytes(codes[i] for i in picks) + b"."
        checkpoints.scan(content, Trail())  # raises nothing
