"""Encoded images to pixels, in this process or as a worker script of its own.

The file is run as a script by :mod:`unbackdoor.data.decode`, and therefore imports nothing of the package:
a worker starts in a tenth of a second, needs no torch, and never imports the user's main program again.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

T = TypeVar("T")
# Bounds what one hostile header can make the decoder allocate: 64 Mpx are 192 MB as RGB.
MAX_PIXELS = 1 << 26
# Formats whose decoders are part of Pillow; EPS for one would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "PPM", "BMP", "GIF", "TIFF")
_GREY = ("1", "L", "LA", "La")


class Undecodable(Exception):
    """An image that cannot be used; the facts are completed by the caller, who knows where it lies."""

    def __init__(
        self, problem: str, *, expected: str = "", got: str = "", remedy: str = "", bomb: bool = False
    ):
        self.facts: dict[str, Any] = {
            "problem": problem,
            "expected": expected,
            "got": got,
            "remedy": remedy,
            "bomb": bomb,
        }
        super().__init__(problem)


def decode_image(data: bytes, size: tuple[int, int] | None) -> tuple[NDArray[np.uint8], bool]:
    """Return pixels (H, W, 3) and whether the image is greyscale.

    Args:
        data: The encoded image.
        size: (H, W) to resize to, bilinear, or None to keep the image's own size.

    Raises:
        Undecodable: If the bytes are no image, are damaged, or declare more than MAX_PIXELS.
    """
    return _decoded(data, lambda image: _pixels(image, size))


def decode_rgba(data: bytes) -> NDArray[np.uint8]:
    """Return pixels (H, W, 4): red, green, blue and opacity.

    Raises:
        Undecodable: See :func:`decode_image`.
    """
    return _decoded(data, _with_opacity)


def _decoded(data: bytes, read: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _bomb(f"{width}x{height}")
            return read(image)
    except Undecodable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(str(error)) from error
    except UnidentifiedImageError:
        raise Undecodable(
            "the image cannot be decoded",
            expected="one of " + ", ".join(FORMATS),
            got=f"{len(data)} bytes that begin with {data[:8].hex(' ') or 'nothing'}",
            remedy="Replace the image or remove it, or pass --skip-damaged (skip_damaged=)",
        ) from None
    # Over hostile bytes a decoder raises anything: struct.error, zlib.error, KeyError and more.
    except Exception as error:
        raise Undecodable(
            "the image is damaged",
            expected="a complete image",
            got=f"{type(error).__name__}: {error}",
            remedy="Replace the image or remove it, or pass --skip-damaged (skip_damaged=)",
        ) from error


def decode_chunk(
    chunk: Sequence[bytes], size: tuple[int, int] | None, shape: tuple[int, int]
) -> tuple[NDArray[np.uint8], bool]:
    """Return pixels (B, 3, H, W) and whether all are greyscale.

    Args:
        chunk: B encoded images.
        size: See :func:`decode_image`.
        shape: (H, W) that every decoded image must have.

    Raises:
        Undecodable: With ``facts["index"]``, the position of the first image that cannot be used.
    """
    pixels = np.empty((len(chunk), *shape, 3), dtype=np.uint8)  # (B, H, W, 3)
    all_grey = True
    for index, data in enumerate(chunk):
        try:
            image, grey = decode_image(data, size)
            if image.shape[:2] != shape:
                raise Undecodable(
                    "the images differ in size",
                    expected=f"{shape[0]}x{shape[1]} (height x width) like the first image",
                    got=f"{image.shape[0]}x{image.shape[1]}",
                    remedy="Give a size, so that every image is resized to it",
                )
        except Undecodable as error:
            error.facts["index"] = index
            raise
        pixels[index] = image
        all_grey = all_grey and grey
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), all_grey  # (B, 3, H, W)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer chunks until the requests end.

    A request is a JSON line with the lengths of the images, then their bytes. An answer is a JSON line,
    then the pixels where it says ``ok``.
    """
    while line := requests.readline():
        request = json.loads(line)
        chunk = [requests.read(length) for length in request["lengths"]]
        size = None if request["size"] is None else (request["size"][0], request["size"][1])
        try:
            pixels, grey = decode_chunk(chunk, size, (request["shape"][0], request["shape"][1]))
        except Undecodable as error:
            answers.write(json.dumps({"ok": False, **error.facts}).encode() + b"\n")
        else:
            answers.write(json.dumps({"ok": True, "grey": grey}).encode() + b"\n")
            answers.write(pixels.data.cast("B"))
        answers.flush()


def _with_opacity(image: Image.Image) -> NDArray[np.uint8]:
    ImageOps.exif_transpose(image, in_place=True)
    opaque = image if image.has_transparency_data else _eight_bit(image)[0]
    return np.asarray(opaque.convert("RGBA"))


def _pixels(image: Image.Image, size: tuple[int, int] | None) -> tuple[NDArray[np.uint8], bool]:
    ImageOps.exif_transpose(image, in_place=True)
    plain, grey = _eight_bit(image)
    if size is not None and plain.size != (size[1], size[0]):
        plain = plain.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(plain)
    if pixels.ndim == 2:
        pixels = np.broadcast_to(pixels[:, :, None], (*pixels.shape, 3))  # (H, W, 3)
    return pixels, grey


def _eight_bit(image: Image.Image) -> tuple[Image.Image, bool]:
    mode = image.mode
    if mode == "RGB":
        return image, False
    if mode in _GREY:
        return image.convert("L"), True
    if mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255; 65535 / 255 = 257 exactly.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Undecodable(
                "the image has more than 16 bits per pixel",
                expected="8 or 16 bits",
                got=f"values {values.min()}..{values.max()}",
                remedy="Convert the image to 8 bits",
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)), True
    if mode == "F":
        raise Undecodable(
            "the image holds floating-point pixels",
            expected="8 or 16 bits",
            remedy="Convert the image to 8 bits",
        )
    if mode in ("P", "PA"):
        # By way of RGBA, because a palette may carry its transparency entry by entry.
        image = image.convert("RGBA")
    return image.convert("RGB"), False


def _bomb(got: str) -> Undecodable:
    return Undecodable(
        "the image declares too many pixels",
        expected=f"at most {MAX_PIXELS}",
        got=got,
        remedy="Remove the image or make it smaller",
        bomb=True,
    )


if __name__ == "__main__":
    # An interrupt goes to the whole terminal group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)
