"""A recovered trigger as files: what it looks like, and the exact numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from unbackdoor.files import atomic_write

PNG, TENSORS = "trigger.png", "trigger.safetensors"


def write_trigger(
    folder: Path, pattern: Tensor, mask: Tensor | None, facts: Mapping[str, Any]
) -> dict[str, Path]:
    """Write a trigger into a folder, each file whole or not at all.

    Args:
        folder: Made where it is missing.
        pattern: (C, H, W) in [0, 1]; without a mask, what is added to every image, in [-1, 1].
        mask: (H, W) in [0, 1], or None.
        facts: JSON-ready; kept in the metadata of the tensors.

    Returns:
        ``picture``: a PNG, from left to right the pattern, the mask, and the pattern where the mask is, or
        only the pattern around grey, stretched; and ``tensors``: a safetensors file with both.
    """
    pattern = pattern.detach().float().cpu()
    channels = len(pattern)
    # A picture has 1 or 3 channels; of other patterns the mean is shown.
    shown = pattern if channels in (1, 3) else pattern.mean(0, keepdim=True)
    tensors_of = {"pattern": pattern.contiguous()}
    if mask is None:
        row = 0.5 + shown / (2 * (float(shown.abs().max()) or 1.0))  # (C, H, W)
    else:
        mask = mask.detach().float().cpu()
        tensors_of["mask"] = mask.contiguous()
        row = torch.cat([shown, mask.expand_as(shown), shown * mask], 2)  # (C, H, 3 W)
    pixels = (row * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture, tensors = folder / PNG, folder / TENSORS
    with atomic_write(picture) as draft:
        Image.fromarray(pixels[:, :, 0] if len(shown) == 1 else pixels).save(draft, format="PNG")
    metadata = {"facts": json.dumps(dict(facts), sort_keys=True, allow_nan=False)}
    with atomic_write(tensors) as draft:
        save_file(tensors_of, draft, metadata=metadata)
    return {"picture": picture, "tensors": tensors}


def remove_trigger(folder: Path) -> None:
    """Remove what :func:`write_trigger` wrote, and the folder if nothing else is in it."""
    for name in (PNG, TENSORS):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
