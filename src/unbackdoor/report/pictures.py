"""Image tensors as ``data:`` addresses, so that a page carries its pictures."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor

from unbackdoor.errors import InputError


def data_png(pixels: Tensor, *, largest: int | None = None) -> str:
    """Return uint8 pixels (C, H, W), C = 1 or 3, as the ``data:`` address of a PNG.

    The browser enlarges it: a PNG of 8 x 8 pixels is a hundred bytes, and stays sharp.

    Args:
        pixels: The image.
        largest: Longest side of the PNG in pixels; a larger image is made smaller. None keeps every pixel.

    Raises:
        InputError: If the image has another number of channels.
    """
    channels = int(pixels.shape[0])
    if channels not in (1, 3):
        raise InputError("the image cannot be shown", expected="1 or 3 channels", got=channels)
    values = pixels.cpu().permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    image = Image.fromarray(values[:, :, 0] if channels == 1 else values)
    longest = max(image.size)
    if largest is not None and longest > largest:
        # A mean over each new pixel's area: a patch of a few pixels gets fainter, but is never skipped.
        width, height = (max(1, round(side * largest / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
