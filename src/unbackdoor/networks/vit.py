"""A small vision transformer: 8 x 8 patches whatever the image size, and a class token.

Paper:   Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021, arXiv:2010.11929.
Keys:    those of timm's ``VisionTransformer``.
Departs: the patch side is an eighth of the image side (4 at 32 pixels), so that there are always 64.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unbackdoor.errors import UnsupportedModel
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import Config, architecture, option

_GRID = 8  # patches along each side
_EPS = 1e-6  # of the layer norms; the value of the authors' code


class ViTConfig(Config):
    """Options of the small vision transformer."""

    width: int = option(
        192,
        "embedding dimension; there is one head per 64, and one at the least",
        source="arXiv:2012.12877 (DeiT-Ti)",
        ge=1,
        le=4096,
    )
    depth: int = option(6, "transformer blocks", source="this package, half of DeiT-Ti", ge=1, le=48)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return max(1, self.width // 64)

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"a width from 128 on must divide into its {self.heads} heads; take a multiple of 64"
            )
        return self


class PatchEmbed(nn.Module):
    """One linear map for every patch, written as a strided convolution."""

    def __init__(self, geometry: Geometry, width: int) -> None:
        super().__init__()
        patch = (geometry.height // _GRID, geometry.width // _GRID)
        self.proj = nn.Conv2d(geometry.channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 64, D)."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)  # (B, D, 8, 8) -> (B, 64, D)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, heads, T, D / heads) each
        # The fused kernels have no second derivative, which some methods need; at 65 tokens they save 8 %.
        with sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, D / heads)
        mixed = mixed.transpose(1, 2).reshape(b, t, d)  # (B, T, D)
        out: Tensor = self.proj(mixed)
        return out


class MLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Patches and class token, blocks, layer norm, linear head on the class token."""

    def __init__(self, geometry: Geometry, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + _GRID * _GRID, width))
        self.patch_embed = PatchEmbed(geometry, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, geometry.classes)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) for normalised images (B, C, H, W)."""
        patches = self.patch_embed(x)  # (B, 64, D)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)  # (B, 65, D)
        tokens = self.norm(self.blocks(tokens + self.pos_embed))
        logits: Tensor = self.head(tokens[:, 0])  # (B, K)
        return logits


@architecture("vit_small", config=ViTConfig, paper="arXiv:2010.11929", traits={"transformer"})
def vit_small(cfg: ViTConfig, geometry: Geometry) -> nn.Module:
    """Vision transformer on 8 x 8 patches with a class token; timm's parameter names."""
    if geometry.height % _GRID or geometry.width % _GRID:
        raise UnsupportedModel(
            "the image does not divide into 8 x 8 patches",
            expected="height and width in multiples of 8 pixels",
            got=f"{geometry.height} x {geometry.width}",
            where="patch_embed.proj",
            remedy="Resize the images, or take a convolutional architecture",
        )
    return ViT(geometry, cfg.width, cfg.depth, cfg.heads)
