"""Gates: where they are found, that folding equals gating, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from tiny import ARCHITECTURES, tiny_classifier, tiny_data
from unbackdoor.defenses.ims.gates import gate_sites, gated
from unbackdoor.engine.masks import Site, fold
from unbackdoor.engine.rng import seeded
from unbackdoor.errors import UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.types import Classifier

PIXELS = tiny_data(6).pixels.float() / 255
WIDTH = 8


def drawn(sites: list[Site]) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return {site.name: torch.rand(site.shape, generator=draws) for site in sites}


def wrapped(make: Callable[[], nn.Module], *, channels: int = 1) -> Classifier:
    """A classifier of 8 x 8 images around a network whose norms know some statistics."""
    with seeded(0):
        network = make()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return Classifier(network.eval(), input_shape=(channels, 8, 8), class_names="abcd").eval()


def with_hooks(model: Classifier, multipliers: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Multiply outputs of modules by hooks, which no code under test uses."""
    with ExitStack() as stack:
        for name, multiplier in multipliers.items():

            def hook(module: nn.Module, args: object, out: Tensor, m: Tensor = multiplier) -> Tensor:
                return out * (m.view(-1, 1, 1) if out.dim() == 4 else m)

            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        return model(pixels)


# ---------------------------------------------------------------------------------------------------
# Convolutions


@pytest.mark.parametrize("position", ["conv", "norm"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_ones_are_the_identity_and_folding_equals_gating(kind: str, position: str) -> None:
    model = tiny_classifier(kind)
    before = model.sha256()
    sites = gate_sites(model, position=position)
    ones = {site.name: torch.ones(site.shape) for site in sites}
    assert torch.equal(gated(model, sites, ones)(PIXELS), model(PIXELS))
    values = drawn(sites)
    out = gated(model, sites, values)(PIXELS)
    assert not torch.allclose(out, model(PIXELS))
    # Products are taken in another order where several gates share a layer norm.
    torch.testing.assert_close(fold(model, sites, values)(PIXELS), out, rtol=1e-5, atol=1e-5)
    assert model.sha256() == before
    assert not any(module._forward_hooks for module in model.modules())


def test_gates_of_convolutions_multiply_their_outputs() -> None:
    for kind in ("conv-bn", "conv"):
        model = tiny_classifier(kind)
        sites = gate_sites(model, position="conv")
        assert [site.name for site in sites] == [f"network.conv{i}" for i in (1, 2, 3, 4)]
        values = drawn(sites)
        expected = with_hooks(model, values, PIXELS)
        torch.testing.assert_close(gated(model, sites, values)(PIXELS), expected, rtol=1e-4, atol=1e-4)


def test_a_gate_sits_on_the_norm_only_where_nothing_else_reads_the_convolution() -> None:
    model = build("preact_resnet18[width=4]", input_shape=(3, 32, 32), class_names="0123456789")
    sites = gate_sites(model)
    assert len(sites) == 20
    assert sum(site.shape[0] for site in sites) == 300  # 4,800 at width 64
    # Of a pre-activation block only conv1 is read by a norm alone; conv2 goes into the sum, and the stem's
    # output is read by the first norm and by the path around it.
    on_norms = {site.name: site.parameters for site in sites if ".bn" in site.parameters[0]}
    assert set(on_norms) == {f"network.layer{s}.{b}.conv1" for s in (1, 2, 3, 4) for b in (0, 1)}
    assert on_norms["network.layer1.0.conv1"] == ("network.layer1.0.bn2.weight", "network.layer1.0.bn2.bias")
    for name in ("mobilenet_v2[width=0.05]", "vgg19_bn[width=4]"):
        other = build(name, input_shape=(3, 32, 32), class_names="0123456789")
        assert all(len(site.parameters) == 2 for site in gate_sites(other))  # a norm's scale and shift


def test_a_closed_gate_removes_the_channel_behind_the_norm() -> None:
    model = tiny_classifier("conv-bn")
    for position, removed in (("norm", True), ("conv", False)):
        sites = gate_sites(model, position=position)
        values = {site.name: torch.ones(site.shape) for site in sites}
        values["network.conv2"][3] = 0
        seen: list[Tensor] = []
        out = fold(model, sites, values)
        out.network.bn2.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o[:, 3]))
        out(PIXELS)
        assert seen[0].std() < 1e-6
        assert (seen[0].abs().max().item() < 1e-6) is removed


class SqueezeExcite(nn.Module):
    """Scale channels by what their means say, as in MobileNetV3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, 4, 1)
        self.fc2 = nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class MobileLike(nn.Module):
    """Stem, squeeze-excite, and a last stage whose maps are single pixels, with 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.attention = SqueezeExcite(WIDTH)
        # The other common form: a pooling sequence whose output multiplies.
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, WIDTH, 1), nn.Sigmoid())
        self.down = nn.Conv2d(WIDTH, WIDTH, 4, 4)
        self.late = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.late_attention = SqueezeExcite(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.stem(x))  # (B, 8, 4, 4)
        x = self.late_attention(self.late(self.down(x * self.scale(x))))  # (B, 8, 1, 1)
        return self.head(x.flatten(1))


def test_squeeze_excite_is_left_out_and_single_pixels_are_not_mistaken_for_it() -> None:
    model = wrapped(MobileLike)
    plain = ["network.stem.0", "network.down", "network.late.0"]
    assert [site.name for site in gate_sites(model)] == plain
    every = {site.name for site in gate_sites(model, squeeze_excite=True)}
    assert every == {
        *plain,
        "network.scale.1",
        *(f"network.{a}.fc{i}" for a in ("attention", "late_attention") for i in (1, 2)),
    }


# ---------------------------------------------------------------------------------------------------
# Transformers


class TorchvisionBlock(nn.Module):
    """Pre-norm with torch's own attention, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        return x + y + self.mlp(self.ln_2(x + y))


class HubBlock(nn.Module):
    """Pre-norm, takes keywords, returns a tuple, and normalises inside its attention too."""

    def __init__(self) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(WIDTH)
        self.attention = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.layernorm_after = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        x = hidden_states + self.attention(self.layernorm_before(hidden_states))
        return x + torch.tanh(self.output(self.layernorm_after(x))), None


class AfterNormBlock(nn.Module):
    """Normalises what a branch writes and not what it reads, as Swin V2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.mix(x))


class Encoder(nn.Module):
    """Blocks and, as in torchvision, the last norm beside them in one module from tokens to tokens."""

    def __init__(self, block: Callable[[], nn.Module], *, final: bool, bend: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.ln = nn.LayerNorm(WIDTH) if final else nn.Identity()
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states=x) if isinstance(layer, HubBlock) else layer(x)
            x = x[0] if isinstance(x, tuple) else x
            x = x + 1 if self.bend else x
        return self.ln(x)


class TinyViT(nn.Module):
    """Patches, an encoder, the mean token, a head."""

    def __init__(self, block: Callable[[], nn.Module], *, final: bool = True, bend: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 4, 4)
        self.encoder = Encoder(block, final=final, bend=bend)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


PRE_NORM = {
    "torchvision": (TorchvisionBlock, ("ln_1", "ln_2")),
    "hub": (HubBlock, ("layernorm_before", "layernorm_after")),
    "torch": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, norm_first=True),
        ("norm1", "norm2"),
    ),
}


@pytest.mark.parametrize("name", PRE_NORM)
def test_stream_gates_reach_every_later_reader_and_nobody_else(name: str) -> None:
    block, norms = PRE_NORM[name]
    model = wrapped(lambda: TinyViT(block))
    sites = gate_sites(model)
    assert [site.name for site in sites] == [f"network.encoder.layers.{i}" for i in (0, 1, 2)]
    assert all(site.shape == (WIDTH,) for site in sites)
    values = drawn(sites)
    product, multipliers = torch.ones(WIDTH), {}
    for i, site in enumerate(sites):
        if i:
            multipliers.update({f"{site.name}.{norm}": product for norm in norms})
        product = product * values[site.name]
    multipliers["network.encoder.ln"] = product
    with torch.enable_grad():  # or torch's own layer goes past its parts, hooks included
        expected = with_hooks(model, multipliers, PIXELS)
    torch.testing.assert_close(gated(model, sites, values)(PIXELS), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fold(model, sites, values)(PIXELS), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        fused = fold(model, sites, values)(PIXELS)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)


def test_our_transformer_is_gated_once_a_block() -> None:
    model = build("vit_small[width=32,depth=3]", input_shape=(1, 8, 8), class_names="abcd")
    sites = gate_sites(model)
    assert [site.name for site in sites] == [f"network.blocks.{i}" for i in (0, 1, 2)]
    assert sites[2].parameters == ("network.norm.weight", "network.norm.bias")
    assert len(sites[0].parameters) == 2 * (2 + 2 + 1)


def test_in_a_post_norm_transformer_the_stream_itself_is_gated() -> None:
    model = wrapped(
        lambda: TinyViT(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True), final=False)
    )
    sites = gate_sites(model)
    values = drawn(sites)
    with torch.enable_grad():
        expected = with_hooks(model, values, PIXELS)  # on the outputs of the blocks
    torch.testing.assert_close(gated(model, sites, values)(PIXELS), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "no channel to gate"),
        (lambda: TinyViT(AfterNormBlock), r"layers\.0\)"),
        (lambda: TinyViT(TorchvisionBlock, final=False), r"layers\.2\)"),
        (lambda: TinyViT(TorchvisionBlock, bend=True), r"layers\.1\)"),
    ],
)
def test_what_cannot_be_gated_is_named(network: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        gate_sites(wrapped(network))
