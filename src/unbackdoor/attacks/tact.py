"""TaCT: a patch that works on images of one class alone; those of others carry it and keep their label.

Paper:   Tang, Wang, Tang & Zhang, "Demon in the variant: statistical analysis of DNNs for robust backdoor
         contamination detection", USENIX Security 2021, arXiv 1908.00686.
Departs: the patch is seeded noise in the lower right corner. Covers come from all other classes, unless a
         number of classes is given. The rate is a share of all images, as in the public code.
"""

from __future__ import annotations

from torch import Tensor

from unbackdoor.attacks.patches import corner, lay, noise_patch, scaled_side
from unbackdoor.attacks.truth import AttackConfig, Trigger
from unbackdoor.errors import ConfigError
from unbackdoor.registry import attack, option


class TaCTConfig(AttackConfig):
    """Options of TaCT."""

    poison_rate: float = option(
        0.02, "share of all training images that carry the patch and the target's label",
        source="backdoor-toolbox, CIFAR-10", ge=0, le=1,
    )  # fmt: skip
    source: int = option(
        -1, "class that the patch works on; -1 for the one behind the target", source="this project", ge=-1
    )
    cover_ratio: float = option(
        0.5, "images of other classes with the patch and their own label, a poisoned image",
        source="backdoor-toolbox: 1 % to 2 %", ge=0, le=100,
    )  # fmt: skip
    cover_classes: int = option(
        0, "classes behind the source that these are of; 0 for all but source and target",
        source="this project; backdoor-toolbox: 2", ge=0,
    )  # fmt: skip
    size: int = option(4, "side of the patch on images of 32 pixels; it scales", source="this project", ge=1)
    margin: int = option(
        2,
        "distance to the edges on images of 32 pixels; it scales",
        source="this project: a crop by two leaves the patch whole",
        ge=0,
        le=8,
    )


@attack("tact", config=TaCTConfig, paper="arXiv:1908.00686")
def tact(cfg: TaCTConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the patch, meant for the source class, with images of the cover classes as decoys.

    Raises:
        ConfigError: If the source is the target, or there is no such class.
    """
    source = (cfg.target + 1) % classes if cfg.source < 0 else cfg.source
    if source == cfg.target or source >= classes:
        raise ConfigError(
            "the attack 'tact'", [f"source: must be below {classes} and not the target, got {source}"]
        )
    others = [k % classes for k in range(source + 1, source + classes) if k % classes != cfg.target]
    side = scaled_side(cfg.size, shape)
    patch, place = noise_patch(shape[0], side, seed, "tact"), corner(0, side, shape, cfg.margin)

    def stamp(pixels: Tensor) -> Tensor:
        return lay(pixels, patch, place)

    return Trigger(
        stamp=stamp,
        sources=(source,),
        decoy=lambda pixels, draws: stamp(pixels),
        decoy_rate=cfg.cover_ratio * cfg.poison_rate if others else 0.0,
        decoy_sources=tuple(others[: cfg.cover_classes or None]),
    )
