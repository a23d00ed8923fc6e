"""A picture as the trigger: a sticker, a logo, the patch of a publication.

Paper:   the picture in a fixed place: Gu, Dolan-Gavitt & Garg, "BadNets", arXiv 1708.06733.
Departs: the picture is the user's, with place, size, mask and strength (data/trigger_picture.py). It is kept
         with the truth as tensors, so that the judge needs no file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbackdoor.attacks.truth import AttackConfig, Learning, Stamp, Tensors, Trigger
from unbackdoor.data.trigger_picture import read_trigger_picture
from unbackdoor.engine.run import Run
from unbackdoor.registry import attack, option
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.types import Images


class PictureConfig(AttackConfig):
    """Options of the picture."""

    picture: str = option(
        "",
        "FILE.png, with ,place=ROWxCOLUMN ,size=HxW ,mask=FILE.png ,strength=0.5 or ,add behind it; empty: a "
        "white square in the lower right corner",
        source="this project",
    )


@attack("picture", config=PictureConfig, paper="arXiv:1708.06733")
def picture(cfg: PictureConfig, *, shape: tuple[int, int, int], classes: int, seed: int) -> Trigger:
    """Return the picture; every triggered image goes to the target."""

    def fit(images: Images, run: Run) -> Tensors:
        if cfg.picture:
            names = tuple(map(str, range(classes)))
            return read_trigger_picture(cfg.picture, shape, names, label=cfg.target).tensors()
        side = max(1, min(shape[1:]) // 8)
        mask = torch.zeros(shape[1:])
        mask[-side:, -side:] = 1
        return {"pattern": torch.ones(shape), "mask": mask}

    def restore(tensors: Tensors) -> Stamp:
        trigger = RecoveredTrigger(cfg.target, tensors["pattern"], tensors.get("mask"))

        def stamp(pixels: Tensor) -> Tensor:
            return trigger.apply_bytes(pixels)

        return stamp

    return Trigger(learning=Learning(fit, restore))
