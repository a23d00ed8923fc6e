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


def write_trigger(folder: Path, pattern: Tensor, mask: Tensor, facts: Mapping[str, Any]) -> dict[str, Path]:
    """Write a trigger into a folder, each file whole or not at all.

    Args:
        folder: Made where it is missing.
        pattern: (C, H, W) in [0, 1].
        mask: (H, W) in [0, 1].
        facts: JSON-ready; kept in the metadata of the tensors.

    Returns:
        ``picture``: a PNG, from left to right the pattern, the mask, and the pattern where the mask is; and
        ``tensors``: a safetensors file with ``pattern`` and ``mask``.
    """
    pattern, mask = pattern.detach().float().cpu(), mask.detach().float().cpu()
    channels = len(pattern)
    # A picture has 1 or 3 channels; of other patterns the mean is shown.
    shown = pattern if channels in (1, 3) else pattern.mean(0, keepdim=True)
    row = torch.cat([shown, mask.expand_as(shown), shown * mask], 2)  # (C, H, 3 W)
    pixels = (row * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture, tensors = folder / PNG, folder / TENSORS
    with atomic_write(picture) as draft:
        Image.fromarray(pixels[:, :, 0] if len(shown) == 1 else pixels).save(draft, format="PNG")
    metadata = {"facts": json.dumps(dict(facts), sort_keys=True, allow_nan=False)}
    with atomic_write(tensors) as draft:
        save_file({"pattern": pattern.contiguous(), "mask": mask.contiguous()}, draft, metadata=metadata)
    return {"picture": picture, "tensors": tensors}
