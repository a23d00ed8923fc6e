"""Quantised state dicts: torch's own tensors, packed pairs, and whole numbers beside their scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.ao import quantization

from differential import floats_of, same_bits
from unbackdoor import inspect, open_model
from unbackdoor.errors import UnsupportedModel
from unbackdoor.opening.write_back import write_repaired
from unbackdoor.weights.read import read_contents, read_state

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old form"])


@pytest.fixture(autouse=True)
def own_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


SPANS = {torch.int8: (-128, 128), torch.uint8: (0, 256), torch.int32: (-(1 << 30), 1 << 30)}


def rows(*size: int, axis: int = 0, dtype: torch.dtype = torch.int8) -> Tensor:
    levels = torch.randint(*SPANS[dtype], size, dtype=dtype)
    scales = torch.rand(size[axis], dtype=torch.float64) + 0.01
    zeros = torch.randint(0, 100, (size[axis],))
    return torch._make_per_channel_quantized_tensor(levels, scales, zeros, axis)


def whole(*size: int, dtype: torch.dtype = torch.int8, scale: float = 1 / 3, zero: int = 5) -> Tensor:
    levels = torch.randint(*SPANS[dtype], size, dtype=dtype)
    return torch._make_per_tensor_quantized_tensor(levels, scale, zero)


TENSORS: dict[str, Callable[[], Tensor]] = {
    "int8": lambda: whole(3, 4),
    "uint8": lambda: whole(3, 4, dtype=torch.uint8, scale=0.007),
    "int32": lambda: whole(30, 40, dtype=torch.int32, scale=1e-9),
    "rows of int8": lambda: rows(3, 4),
    "rows of uint8": lambda: rows(3, 4, dtype=torch.uint8),
    "rows of int32": lambda: rows(30, 40, dtype=torch.int32),
    "columns": lambda: rows(3, 4, axis=1),
    "kernels": lambda: rows(3, 4, 2, 2),
    "channels last": lambda: whole(3, 4, 2, 2).contiguous(memory_format=torch.channels_last),
    "a part": lambda: whole(6, 4)[2:4, ::2],
    "one number": whole,
    "nothing": lambda: whole(0, 4),
    "a parameter": lambda: nn.Parameter(whole(3, 4), requires_grad=False),
}


@ZIPPED
@pytest.mark.parametrize("kind", TENSORS)
def test_torchs_quantised_tensors_are_what_torch_makes_of_them(
    tmp_path: Path, kind: str, zipped: bool
) -> None:
    path, made = tmp_path / "m.pt", TENSORS[kind]()
    torch.save({"a": torch.ones(40), "b": made}, path, _use_new_zipfile_serialization=zipped)
    loaded = torch.load(path, weights_only=True)["b"]
    contents = read_contents(path)
    assert same_bits(contents.state()["b"], loaded.dequantize().detach())
    assert list(contents.quantised) == ["b"]
    inspection = inspect(path)
    assert inspection.loading == "known classes"
    assert inspection.quantised == ("b",)
    assert "quantised" in inspection.headline()
    assert [tensor.dtype for tensor in inspection.tensors] == ["float32", str(made.dtype)[6:]]


def rebuilt(scheme: Callable[[], object], shape: tuple[int, ...] = (2, 3)) -> object:
    """An object that is pickled as a quantised tensor of this scheme, whatever torch would make of it."""
    levels = torch.quantize_per_tensor(torch.zeros(shape), 1.0, 0, torch.qint8)
    stride = levels.stride()

    class Described:
        def __reduce__(self) -> tuple[Any, ...]:
            storage = torch.storage.TypedStorage(
                wrap_storage=levels.untyped_storage(), dtype=torch.qint8, _internal=True
            )
            return (torch._utils._rebuild_qtensor, (storage, 0, shape, stride, scheme(), False, {}))

    return Described()


ONE, PER_ROW = torch.per_tensor_affine, torch.per_channel_affine


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def whole_tensor(scale: object, zero: object) -> Callable[[], object]:
    return lambda: (ONE, scale, zero)


SCHEMES: dict[str, Callable[[], object]] = {
    **{
        f"a scale of {scale}": whole_tensor(scale, 0)
        for scale in (0.0, -1.0, float("inf"), float("nan"), 1e-320, 1e39, 10**400, True, "1")
    },
    **{f"a zero point of {zero}": whole_tensor(0.1, zero) for zero in (128, -129, 1 << 70, 0.5, None, True)},
    "no numbers": lambda: (ONE,),
    "a number too many": lambda: (ONE, 0.1, 0, 0),
    "no scheme": lambda: (),
    "no tuple": lambda: [ONE, 0.1, 0],
    "an unknown scheme": lambda: (torch.per_channel_symmetric, floats(1, 1), ints(0, 0), 0),
    "points that are no levels": lambda: (
        torch.per_channel_affine_float_qparams,
        floats(1, 1),
        floats(0.5, 0),
        0,
    ),
    "an axis beyond": lambda: (PER_ROW, floats(1, 1), ints(0, 0), 2),
    "an axis before": lambda: (PER_ROW, floats(1, 1), ints(0, 0), -1),
    "an axis of another length": lambda: (PER_ROW, floats(1, 1), ints(0, 0), 1),
    "too few scales": lambda: (PER_ROW, floats(1), ints(0, 0), 0),
    "too many points": lambda: (PER_ROW, floats(1, 1), ints(0, 0, 0), 0),
    "scales in a table": lambda: (PER_ROW, floats(1, 1).reshape(2, 1), ints(0, 0), 0),
    "a row with a scale of 0": lambda: (PER_ROW, floats(1, 0), ints(0, 0), 0),
    "a row with a scale of nan": lambda: (PER_ROW, floats(1, float("nan")), ints(0, 0), 0),
    "a row with a point beyond": lambda: (PER_ROW, floats(1, 1), ints(0, 200), 0),
    "scales of whole numbers": lambda: (PER_ROW, ints(1, 1), ints(0, 0), 0),
    "points of fractions": lambda: (PER_ROW, floats(1, 1), floats(0, 0), 0),
    "complex scales": lambda: (PER_ROW, floats(1, 1).to(torch.complex64), ints(0, 0), 0),
    "quantised scales": lambda: (
        PER_ROW,
        torch.quantize_per_tensor(floats(1, 1).float(), 1, 0, torch.qint8),
        ints(0, 0),
        0,
    ),
    "lists of other lengths": lambda: (PER_ROW, [1.0], [0, 0], 0),
    "lists of texts": lambda: (PER_ROW, ["1", "1"], [0, 0], 0),
    "endless numbers": lambda: (PER_ROW, [1.0, 1.0], [0, 10**400], 0),
    "nan in a list": lambda: (PER_ROW, [1.0, float("nan")], [0, 0], 0),
}


@pytest.mark.parametrize("kind", SCHEMES)
def test_scales_that_are_none_are_refused(tmp_path: Path, kind: str) -> None:
    torch.save({"a": torch.ones(2), "b": rebuilt(SCHEMES[kind])}, tmp_path / "m.pt")
    contents = read_contents(tmp_path / "m.pt")
    assert contents.problem is not None
    assert not contents.dangerous
    assert inspect(tmp_path / "m.pt").loading in ("known classes", "undecided")


def test_lists_of_scales_are_read(tmp_path: Path) -> None:
    torch.save({"b": rebuilt(lambda: (PER_ROW, [0.5, 0.25], [1, 2], 0))}, tmp_path / "m.pt")
    assert read_state(tmp_path / "m.pt")["b"].tolist() == [[-0.5] * 3, [-0.5] * 3]


def test_a_quantised_storage_is_no_plain_one(tmp_path: Path) -> None:
    # Nor the other way round: one storage has one type.
    levels = torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.qint8)
    quantised = torch.storage.TypedStorage(
        wrap_storage=levels.untyped_storage(), dtype=torch.qint8, _internal=True
    )
    plain = torch.zeros(6, dtype=torch.int8)

    class As:
        def __init__(self, name: str, storage: object, *more: object) -> None:
            self.call = (getattr(torch._utils, name), (storage, 0, (2, 3), (3, 1), *more))

        def __reduce__(self) -> tuple[Any, ...]:
            return self.call

    for number, value in enumerate(
        (
            As("_rebuild_tensor_v2", quantised, False, {}),
            As("_rebuild_tensor_v3", quantised, False, {}, torch.int8),
            As("_rebuild_qtensor", plain.storage(), (ONE, 0.1, 0), False, {}),
        )
    ):
        torch.save({"a": torch.ones(2), "b": value}, tmp_path / f"{number}.pt")
        assert read_contents(tmp_path / f"{number}.pt").problem is not None


def test_two_sets_on_the_same_levels_are_told_apart(tmp_path: Path) -> None:
    # They share their storage and differ in the scale alone.
    levels = torch.quantize_per_tensor(torch.arange(6.0).reshape(2, 3), 1.0, 0, torch.qint8)
    stride = levels.stride()
    storage = torch.storage.TypedStorage(
        wrap_storage=levels.untyped_storage(), dtype=torch.qint8, _internal=True
    )

    class With:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __reduce__(self) -> tuple[Any, ...]:
            arguments: tuple[Any, ...] = (storage, 0, (2, 3), stride, (ONE, self.scale, 0), False, {})
            return (torch._utils._rebuild_qtensor, arguments)

    torch.save(
        {"state_dict": {"fc.weight": With(1.0)}, "state_dict_ema": {"fc.weight": With(2.0)}},
        tmp_path / "m.pt",
    )
    contents = read_contents(tmp_path / "m.pt")
    assert dict(contents.other_sets) == {"state_dict_ema": "different"}


class Small(nn.Module):
    """A chain that can be quantised with torch's own tools."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Linear(6 * 16, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits."""
        features = self.features(self.quant(pixels))
        return self.dequant(self.classifier(features.flatten(1)))  # type: ignore[no-any-return]


def quantised(way: str) -> nn.Module:
    """Return a network that torch has quantised."""
    before = torch.backends.quantized.engine
    network = Small().eval()
    pixels = torch.rand(8, 3, 8, 8)
    try:
        torch.backends.quantized.engine = "fbgemm"
        if way == "dynamic":
            made = quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
            assert isinstance(made, nn.Module)
            return made
        fused = quantization.fuse_modules(network, [["features.0", "features.1", "features.2"]])
        fused.qconfig = quantization.get_default_qconfig("qnnpack" if way == "per tensor" else "fbgemm")
        quantization.prepare(fused, inplace=True)
        fused(pixels)
        made = quantization.convert(fused)
        assert isinstance(made, nn.Module)
        return made
    finally:
        torch.backends.quantized.engine = before


@ZIPPED
@pytest.mark.parametrize("way", ["dynamic", "per tensor", "per channel"])
def test_state_dicts_of_quantised_networks_are_read(tmp_path: Path, way: str, zipped: bool) -> None:
    network = quantised(way)
    expected = {
        name: tensor
        for name, tensor in floats_of(network.state_dict()).items()
        if isinstance(tensor, Tensor) and not name.endswith((".scale", ".zero_point"))
    }
    path = tmp_path / "m.pt"
    for saved in (network.state_dict(), {"state_dict": network.state_dict(), "epoch": 3}):
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        state = read_state(path)
        assert state.keys() == expected.keys()
        assert all(same_bits(state[name], tensor.detach()) for name, tensor in expected.items())
    torch.save(network, path, _use_new_zipfile_serialization=zipped)  # the module as a whole
    contents = read_contents(path)
    assert contents.problem is None
    assert not contents.dangerous
    assert {n for n in contents.tensors if not n.startswith("quant.")} == expected.keys()
    assert all(same_bits(contents.tensors[name], tensor.detach()) for name, tensor in expected.items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_quantised_network_opens_and_a_repair_is_written_in_floats(tmp_path: Path, suffix: str) -> None:
    network = quantised("per channel")
    path = tmp_path / "m.pt"
    torch.save(network.state_dict(), path)
    spec = "sequential_cnn[features=c6-a-m,classifier=l,activation=relu]"
    opened = open_model(path, arch=spec, size=(8, 8), mean=(), std=())
    pixels = torch.rand(16, 3, 8, 8)
    with torch.no_grad():
        apart = (opened.model(pixels) - network(pixels)).abs().max()
        assert apart < 0.1 * network(pixels).std()  # the rounding of the activations
    in_file = opened.provenance.in_file
    assert in_file.dequantised == ("features.0.weight", "classifier.weight")
    assert any("dequantised to float32" in warning for warning in opened.warnings)
    assert ("quantised", "2 tensors, dequantised to float32: features.0.weight, classifier.weight") in (
        in_file.in_words()
    )
    assert opened.provenance.to_dict()["in_file"]["dequantised"] == list(in_file.dequantised)
    repaired = opened.model.copy()
    with torch.no_grad():
        for parameter in repaired.parameters():
            parameter.mul_(0.9)
    out = tmp_path / f"out{suffix}"
    write_repaired(out, repaired, opened, step={}, record={})
    state = read_state(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    again = open_model(out, arch=spec if suffix == ".pt" else None, size=(8, 8), mean=(), std=())
    with torch.no_grad():
        assert torch.equal(again.model(pixels), repaired(pixels))


# ---------------------------------------------------------------------------------------------------
# Whole numbers beside their scale


LEVELS = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=torch.int8)
UNSIGNED = (LEVELS + 10).to(torch.uint8)
BY_ROW = torch.tensor([0.5, 0.25])
ROWS = LEVELS * torch.tensor([[0.5], [0.25]])

PLAIN: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "one scale": ({"fc.weight": LEVELS, "fc.weight_scale": torch.tensor(0.5)}, LEVELS * 0.5),
    "one scale in a row": ({"fc.weight": LEVELS, "fc.weight_scale": torch.tensor([0.5])}, LEVELS * 0.5),
    "half precision": ({"fc.weight": LEVELS, "fc.weight_scale": torch.tensor(0.5).half()}, LEVELS * 0.5),
    "rows": ({"fc.weight": LEVELS, "fc.weight_scale": BY_ROW}, ROWS),
    "rows in a column": ({"fc.weight": LEVELS, "fc.weight_scale": BY_ROW[:, None]}, ROWS),
    "a zero point": (
        {"fc.weight": UNSIGNED, "fc.weight_scale": BY_ROW, "fc.weight_zero_point": torch.tensor(10)},
        ROWS,
    ),
    "zero points": (
        {
            "fc.weight": LEVELS,
            "fc.weight_scale": BY_ROW,
            "fc.weight_zero_point": torch.tensor([1, -1], dtype=torch.int8),
        },
        ROWS - torch.tensor([[0.5], [-0.25]]),
    ),
    "a zero point in floats": (
        {"fc.weight": UNSIGNED, "fc.weight.scale": BY_ROW, "fc.weight.zero_point": torch.tensor(10.0)},
        ROWS,
    ),
    "of the layer": ({"fc.weight": LEVELS, "fc.scale": torch.tensor(0.5)}, LEVELS * 0.5),
    "rows of the layer": (
        {"fc.weight": LEVELS, "fc.scale": BY_ROW, "fc.zero_point": torch.zeros(2, dtype=torch.int64)},
        ROWS,
    ),
    "unsigned of the layer": (
        {"fc.weight": UNSIGNED, "fc.scale": torch.tensor(0.5), "fc.zero_point": torch.tensor(10)},
        LEVELS * 0.5,
    ),
    "without a layer": ({"weight": LEVELS, "weight_scale": torch.tensor(0.5)}, LEVELS * 0.5),
    "of bitsandbytes": (
        {"fc.weight": LEVELS, "fc.SCB": BY_ROW * 127, "fc.weight_format": torch.tensor(0, dtype=torch.uint8)},
        ROWS,
    ),
    "with scales of inputs": (
        {
            "fc.weight": LEVELS,
            "fc.weight_scale": torch.tensor(0.5),
            "fc.input_scale": torch.tensor(3.0),
            "fc.input_zero_point": torch.tensor(3),
            "fc.output_scale": torch.tensor(3.0),
        },
        LEVELS * 0.5,
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", PLAIN)
def test_whole_numbers_beside_their_scale_are_read(tmp_path: Path, kind: str, suffix: str) -> None:
    state, expected = PLAIN[kind]
    state = {**state, "fc.bias": torch.ones(2)}
    path = tmp_path / f"m{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    contents = read_contents(path)
    read = contents.state()
    name = next(iter(contents.quantised))
    assert read.keys() == {name, "fc.bias"}
    assert read[name].dtype == torch.float32
    assert torch.equal(read[name], expected.float())
    assert inspect(path).quantised == (name,)


UNCLEAR: dict[str, tuple[dict[str, Tensor], str]] = {
    "of weights or outputs": (
        {"fc.weight": LEVELS, "fc.scale": torch.tensor(0.5), "fc.zero_point": torch.tensor(0)},
        "of the weights or of the outputs",
    ),
    "two scales": (
        {"fc.weight": LEVELS, "fc.weight_scale": BY_ROW, "fc.weight.scale": 2 * BY_ROW},
        "either may belong",
    ),
    "a scale of the columns": ({"fc.weight": LEVELS, "fc.weight_scale": torch.ones(3)}, r"shape \[3\]"),
    "groups": ({"fc.weight": LEVELS.repeat(1, 2), "fc.weight_scale": torch.ones(2, 3)}, r"shape \[2, 3\]"),
    "no scale at all": ({"fc.weight": LEVELS, "fc.weight_scale": torch.ones(0)}, r"shape \[0\]"),
    "a zero point alone": ({"fc.weight": LEVELS, "fc.weight_zero_point": torch.tensor(0)}, "no scale"),
    "zero": ({"fc.weight": LEVELS, "fc.weight_scale": torch.tensor(0.0)}, "zero, negative"),
    "negative": ({"fc.weight": LEVELS, "fc.weight_scale": -BY_ROW}, "zero, negative"),
    "not finite": ({"fc.weight": LEVELS, "fc.weight_scale": torch.tensor(float("inf"))}, "not finite"),
    "beyond float32": (
        {"fc.weight": LEVELS, "fc.weight_scale": torch.tensor(1e300, dtype=torch.float64)},
        "not finite",
    ),
    "whole": ({"fc.weight": LEVELS, "fc.weight_scale": torch.tensor(1)}, "zero, negative"),
    "a point beyond": (
        {"fc.weight": LEVELS, "fc.weight_scale": BY_ROW, "fc.weight_zero_point": torch.tensor(128)},
        "no level",
    ),
    "half a point": (
        {"fc.weight": LEVELS, "fc.weight_scale": BY_ROW, "fc.weight_zero_point": torch.tensor(0.5)},
        "no level",
    ),
    "a point of nan": (
        {"fc.weight": LEVELS, "fc.weight_scale": BY_ROW, "fc.weight_zero_point": torch.tensor(float("nan"))},
        "no level",
    ),
    "rows in another order": (
        {"fc.weight": LEVELS, "fc.SCB": BY_ROW, "fc.weight_format": torch.tensor(2, dtype=torch.uint8)},
        "order of their own",
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", UNCLEAR)
def test_what_is_unclear_is_refused_with_the_reason(tmp_path: Path, kind: str, suffix: str) -> None:
    state, words = UNCLEAR[kind]
    path = tmp_path / f"m{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(UnsupportedModel, match=words):
        read_state(path)
    assert "quantised" in str(inspect(path).problem)


def test_scales_of_networks_that_are_not_quantised_stay(tmp_path: Path) -> None:
    state = {
        "attn.scale": torch.ones(1),
        "attn.zero_point": torch.tensor(0),
        "attn.mask": torch.ones(2, 2, dtype=torch.uint8),
        "fc.weight": torch.rand(2, 3),
        "fc.weight_scale": torch.ones(2),
        "fc.input_scale": torch.ones(2),
    }
    save_file(state, tmp_path / "m.safetensors")
    assert read_state(tmp_path / "m.safetensors").keys() == state.keys()
