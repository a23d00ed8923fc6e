"""Image tensors as ``data:`` addresses, so that a page carries its pictures."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor

from unbackdoor.errors import InputError


def data_png(pixels: Tensor) -> str:
    """Return uint8 pixels (C, H, W), C = 1 or 3, as the ``data:`` address of a PNG of the same size.

    The browser enlarges it: a PNG of 8 x 8 pixels is a hundred bytes, and stays sharp.

    Raises:
        InputError: If the image has another number of channels.
    """
    channels = int(pixels.shape[0])
    if channels not in (1, 3):
        raise InputError("the image cannot be shown", expected="1 or 3 channels", got=channels)
    values = pixels.cpu().permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    image = Image.fromarray(values[:, :, 0] if channels == 1 else values)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
