"""Every architecture: shapes, gradients, seeds, names; and the grammar of specs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unbackdoor.errors import ConfigError, InputError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.networks.build import canonical, network, parse_spec
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import ARCHITECTURES

# Initialisers and inputs are drawn from the global generator here; it is put back.
pytestmark = pytest.mark.leaves_traces

NARROW = {
    "preact_resnet18": "preact_resnet18[width=4]",
    "resnet18": "resnet18[width=4]",
    "resnet34": "resnet34[width=2]",
    "resnet50": "resnet50[width=2]",
    "resnet101": "resnet101[width=1]",
    "resnet152": "resnet152[width=1]",
    "cifar_resnet": "cifar_resnet[depth=8,width=4]",
    "wrn": "wrn[depth=10,width=1]",
    "sequential_cnn": "sequential_cnn[features=c4-b-a-m-c8n-b-a-d,side=2,classifier=d-l6-a-l]",
    "vgg19_bn": "vgg19_bn[width=4]",
    "wrn16": "wrn16[width=1]",
    "mobilenet_v2": "mobilenet_v2[width=0.1]",
    "vit_small": "vit_small[width=16,depth=2]",
    "small_cnn": "small_cnn[width=4]",
    "airbench": "airbench[width=4]",
}
# The deepest two differ from resnet50 in nothing but their length.
VARIANTS = [
    *(spec for name, spec in NARROW.items() if name not in ("resnet101", "resnet152")),
    "preact_resnet18[width=4,final_norm=false]",
    "small_cnn[width=4,norm=none]",
    "resnet18[width=4,stem=7x7]",
    "cifar_resnet[depth=8,width=4,shortcut=pad_end]",
    "cifar_resnet[depth=8,width=4,shortcut=conv]",
    "mobilenet_v2[width=0.1,strides=large]",
]
TEN = [f"class {k}" for k in range(10)]
GEOMETRY = Geometry(3, 32, 32, 10)


def parameters(spec: str, geometry: Geometry = GEOMETRY) -> int:
    return sum(p.numel() for p in network(spec, geometry, device="meta").parameters())


def test_every_registered_architecture_is_tested() -> None:
    assert set(NARROW) == set(ARCHITECTURES)


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8)])
def test_logits_and_gradients(spec: str, shape: tuple[int, int, int]) -> None:
    model = build(spec, input_shape=shape, class_names=TEN, mean=[0.5] * shape[0], std=[0.25] * shape[0])
    assert not model.training
    # In training mode, because an untrained batch norm in evaluation mode lets hardly any signal through.
    logits = model.train()(torch.rand(4, *shape, generator=torch.Generator().manual_seed(1)))
    assert logits.shape == (4, 10)
    (logits * torch.arange(10.0)).square().sum().backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    silent = [name for name, p in learning.items() if p.grad is None or not p.grad.any()]
    # A bias before a batch norm is subtracted again, so that its gradient is zero but for rounding.
    assert not [name for name in silent if not name.endswith("bias")]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learning.values())


@pytest.mark.parametrize("spec", [s for s in VARIANTS if not s.startswith("vit")])
def test_convolutional_networks_take_any_size(spec: str) -> None:
    model = build(spec, input_shape=(2, 9, 21), class_names=["a", "b"])
    assert model(torch.rand(3, 2, 9, 21)).shape == (3, 2)


@pytest.mark.parametrize("spec", VARIANTS)
def test_second_derivatives_exist(spec: str) -> None:
    model = build(spec, input_shape=(3, 8, 8), class_names=["a", "b"])
    pixels = torch.rand(2, 3, 8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(model(pixels).square().sum(), pixels, create_graph=True)
    slope.square().sum().backward()
    assert pixels.grad is not None
    assert torch.isfinite(pixels.grad).all()


@pytest.mark.parametrize("spec", VARIANTS)
def test_each_layer_runs_once_per_forward(spec: str) -> None:
    model = build(spec, input_shape=(3, 16, 16), class_names=TEN)
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.LayerNorm)
    calls: Counter[str] = Counter()

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] += 1

        return hook

    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    for name in layers:
        model.get_submodule(name).register_forward_hook(count(name))
    model(torch.rand(2, 3, 16, 16))
    assert calls == Counter(layers)


@pytest.mark.parametrize("spec", VARIANTS)
def test_the_seed_decides_the_weights_and_the_global_state_is_left_alone(spec: str) -> None:
    def draw(seed: int) -> str:
        return build(spec, input_shape=(3, 16, 16), class_names=TEN, seed=seed).sha256()

    before = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert draw(3) == first
    assert draw(4) != first


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        # The common CIFAR implementation has this many; the last norm adds weight and bias of 512 channels.
        ("preact_resnet18[final_norm=false]", 11_171_146),
        ("preact_resnet18", 11_171_146 + 2 * 512),
        # torchvision's, with a 3x3 stem for the 7x7 one and 10 classes for 1000.
        ("resnet18", 11_689_512 - (49 - 9) * 3 * 64 - 990 * 513),
        # torchvision's, but for the number of classes.
        ("resnet34[stem=7x7+pool]", 21_797_672 - 990 * 513),
        ("resnet50[stem=7x7+pool]", 25_557_032 - 990 * 2049),
        ("resnet101[stem=7x7+pool]", 44_549_160 - 990 * 2049),
        ("resnet152[stem=7x7+pool]", 60_192_808 - 990 * 2049),
        # Table 6 of the paper says 0.27 M and 1.7 M.
        ("cifar_resnet", 269_722),
        ("cifar_resnet[depth=110]", 1_727_962),
        # The paper's 36.5 M.
        ("wrn[depth=28,width=10]", 36_479_194),
        # torchvision's without its three linear layers, and our head instead.
        ("vgg19_bn", 143_678_248 - 25_089 * 4096 - 4_097 * 4096 - 4_097 * 1000 + 513 * 10),
        ("wrn16", 175_066),
        # torchvision's, with 10 classes for 1000.
        ("mobilenet_v2", 3_504_872 - 1_281 * 990),
    ],
)
def test_parameter_counts(spec: str, count: int) -> None:
    assert parameters(spec) == count


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ("preact_resnet18[width=16]", "preact_resnet18[width=32]"),
        ("resnet18[width=16]", "resnet18[width=32]"),
        ("vgg19_bn[width=16]", "vgg19_bn[width=32]"),
        ("wrn16[width=2]", "wrn16[width=4]"),
        ("mobilenet_v2[width=1.0]", "mobilenet_v2[width=2.0]"),
        ("vit_small[width=64]", "vit_small[width=128]"),
        ("small_cnn[width=16]", "small_cnn[width=32]"),
    ],
)
def test_twice_the_width_is_about_four_times_the_parameters(narrow: str, wide: str) -> None:
    assert 3.5 < parameters(wide) / parameters(narrow) < 4.05


def test_names_of_weights_are_those_of_the_usual_implementations() -> None:
    def keys(spec: str) -> set[str]:
        return set(network(spec, GEOMETRY, device="meta").state_dict())

    assert {
        "conv1.weight",
        "bn1.weight",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "fc.bias",
    } <= keys("resnet18")
    assert {"layer2.0.shortcut.0.weight", "linear.weight", "bn.weight"} <= keys("preact_resnet18")
    assert not any(k.startswith("bn.") for k in keys("preact_resnet18[final_norm=false]"))
    assert {"features.0.weight", "features.49.weight", "classifier.weight"} <= keys("vgg19_bn")
    assert {
        "features.0.0.weight",
        "features.2.conv.0.0.weight",
        "features.18.1.bias",
        "classifier.1.weight",
    } <= keys("mobilenet_v2")
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.5.attn.qkv.weight",
        "head.bias",
    } <= keys("vit_small")


def test_left_out_poolings_keep_the_names_of_vgg() -> None:
    small, large = (network("vgg19_bn[width=4]", Geometry(3, s, s, 10), device="meta") for s in (8, 32))
    assert list(small.state_dict()) == list(large.state_dict())


def test_the_normaliser_is_inside() -> None:
    shape = (3, 16, 16)
    plain = build("small_cnn[width=4]", input_shape=shape, class_names=TEN)
    inside = build(
        "small_cnn[width=4]", input_shape=shape, class_names=TEN, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4]
    )
    pixels = torch.rand(2, *shape)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(inside(pixels), plain((pixels - mean) / std))


def test_a_block_without_norm_has_biases_and_no_batch_norm() -> None:
    net = network("small_cnn[width=4,norm=none]", GEOMETRY)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert all(m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d))


# ---------------------------------------------------------------------------------------------------
# Specs


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("preact_resnet18", "preact_resnet18[width=64]"),
        ("unbackdoor:preact_resnet18[width=16]", "preact_resnet18[width=16]"),
        (" preact_resnet18[ final_norm = False , width=8 ] ", "preact_resnet18[width=8,final_norm=false]"),
        ("mobilenet_v2[width=1]", "mobilenet_v2[width=1.0]"),
        ("small_cnn[norm=none]", "small_cnn[width=64,norm=none]"),
        ("vit_small[]", "vit_small[width=192]"),
    ],
)
def test_canonical_spelling(spec: str, name: str) -> None:
    assert canonical(spec) == name
    assert canonical(name) == name
    assert build(
        name.replace("=64", "=4"), input_shape=(3, 8, 8), class_names=["a"]
    ).architecture == name.replace("=64", "=4")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("preact_resnet81", ["unknown name", "did you mean 'preact_resnet18'", "small_cnn"]),
        ("resnet18[widht=4]", ["unknown option 'widht' (did you mean 'width'?)"]),
        ("resnet18[width=0]", ["width", "greater than or equal to 1"]),
        ("resnet18[width=9999999999]", ["less than or equal to 4096"]),
        ("mobilenet_v2[width=nan]", ["width"]),
        ("resnet18[width=4,width=8]", ["'width' stands twice"]),
        ("resnet18[width]", ["expected option=value, got 'width'"]),
        ("resnet18[width=4", ["expected the form"]),
        ("resnet18[width=4]]", ["expected the form"]),
        ("", ["expected the form"]),
        ("resnet18[" + "x" * 10_000 + "]", ["expected the form"]),
        ("nope[width]", ["2 faults"]),
        ("vit_small[width=200]", ["multiple of 64"]),
    ],
)
def test_faulty_specs_are_refused(spec: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        canonical(spec)
    assert len(str(caught.value)) < 600
    for word in words:
        assert word in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="resnt18[]=,widh_: \n4ü", max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        name, options = parse_spec(text)
    except ConfigError:
        return
    assert name in ARCHITECTURES
    assert all(isinstance(value, str) for value in options.values())


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 7, 8), (3, 8, 5000), (3, -8, 8), (5000, 8, 8)])
def test_input_sizes_out_of_range_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="input size"):
        build("small_cnn", input_shape=shape, class_names=["a"])


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(InputError, match="classes"):
        build("small_cnn", input_shape=(3, 8, 8), class_names=[])


def test_patches_must_divide_the_image() -> None:
    with pytest.raises(UnsupportedModel, match="multiples of 8"):
        build("vit_small[width=16]", input_shape=(3, 28, 28), class_names=["a"])


@pytest.mark.parametrize("name", sorted(NARROW))
def test_every_option_is_documented_and_bounded(name: str) -> None:
    part = ARCHITECTURES[name]
    assert part.summary
    assert part.traits
    assert "width" in part.config.model_fields or name == "sequential_cnn"  # whose layers say their own
    for option in part.config.model_fields.values():
        extra = option.json_schema_extra
        assert option.description
        assert isinstance(extra, dict)
        assert extra["source"]
