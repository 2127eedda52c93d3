"""Whatever is an image without a doubt, paths, bytes, files, PIL images, arrays and tensors -> an RGB image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import Refused, UsageError
from ..files import read_regular
from ..images.decode import MIN_SIDE, Exif, decode, refusal_of, to_rgb

ImageLike = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | dict[str, Any]
    | Image.Image
    | np.ndarray
    | Tensor
)
Bytes = bytes | bytearray | memoryview
_CHANNELS = (1, 3, 4)  # grey, RGB, RGB and alpha
_WANTED = (
    "give paths, encoded bytes, open files, PIL images, dictionaries with bytes or path, or uint8 arrays or tensors of "
    "(H, W) or (H, W, 1, 3 or 4)"
)


def one_or_many(images: Any) -> Iterable[Any]:
    """Go through what `Encoder.embed` takes image by image."""
    return [images] if _is_one(images) else _iterated(images)


def _is_one(images: Any) -> bool:
    """Tell one image from many: an array of three axes is one, for (N, H, W) and (3, H, W) cannot be told apart."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim in (2, 3)
    return isinstance(images, str | os.PathLike | Image.Image | dict | Bytes) or hasattr(images, "read")


def _iterated(images: Any) -> Iterable[Any]:
    try:
        if isinstance(images, Tensor):  # one by one they would be copied from their device one by one
            images = _on_host(images)
        if isinstance(images, np.generic):  # some iterate over nothing
            raise TypeError
        return iter(images)
    except Refused as refused:
        raise UsageError(f"images: {refused.detail}") from None
    except TypeError:  # not iterable, an array without axes
        raise UsageError(f"images: {_WANTED}; got {_shown(images)}") from None


def open_image(image: Any, place: int, exif: Exif = "upright") -> Image.Image:
    """Decode or convert whatever is an image to RGB; UsageError, which has its place, where that cannot be."""
    try:
        found = _decoded(image)
        if min(found.size) < MIN_SIDE:
            raise Refused("too_small", f"{found.size}")
        return to_rgb(found, exif=exif)
    except Exception as error:  # images and files that others opened raise whatever damage makes them raise
        refused = error if isinstance(error, Refused) else refusal_of(error)
        why = f"{refused.detail} [{refused.reason}]" if refused else str(error) or type(error).__name__
        raise UsageError(f"image {place} ({_shown(image)}): {why}") from None


def _decoded(image: Any) -> Image.Image:
    """Decode or convert whatever is an image without a doubt."""
    if (data := encoded(image)) is not None:
        return decode(data)
    image = _of_dict(image)
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        image = _on_host(image).numpy()
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise Refused("unsupported", _WANTED)


def encoded(image: Any) -> bytes | None:
    """Return the bytes of an image that is encoded, be it in a file; None of one that is pixels already."""
    image = _of_dict(image)
    if isinstance(image, Bytes):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        path = os.fsdecode(image)
        if "://" in path and not Path(path).exists():
            raise Refused("unreadable", "an address is not fetched here: `extract` reads it, or give its bytes")
        return read_regular(Path(path))
    return None if isinstance(image, Image.Image) or not hasattr(image, "read") else _read(image)


def _of_dict(image: Any) -> Any:
    """Take what a dictionary, as data sets have it, holds: bytes, else the path of a file."""
    if isinstance(image, dict):
        return next((image[key] for key in ("bytes", "path") if image.get(key) is not None), None)
    return image


def _read(file: BinaryIO) -> bytes:
    if getattr(file, "seekable", bool)():  # from its start, as Pillow reads it
        file.seek(0)
    data: object = file.read()
    if isinstance(data, Bytes):
        return bytes(data)
    if isinstance(data, str):
        raise Refused("unsupported", "the file is open as text: open it in mode 'rb'")
    raise Refused("unreadable", f"its read() gives {type(data).__name__}, not bytes")


def _on_host(tensor: Tensor) -> Tensor:
    """Copy a tensor of pixels from wherever it is."""
    if tensor.dtype != torch.uint8:
        got = str(tensor.dtype).removeprefix("torch.")
        raise Refused("unsupported", f"a tensor must be uint8, 0 to 255; got {got}: scale and convert it")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else str(tensor.layout)
        raise Refused("unsupported", f"a tensor must be dense, with its pixels in memory; got a {kind} one")
    return tensor.detach().cpu().resolve_neg()


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8:
        raise Refused("unsupported", f"an array must be uint8, 0 to 255; got {array.dtype}: scale and convert it")
    if array.ndim not in (2, 3) or channels not in _CHANNELS or not array.size:
        hint = ": move its first axis to the end" if array.ndim == 3 and array.shape[0] in _CHANNELS else ""
        raise Refused(
            "unsupported", f"an array must be (H, W), or (H, W, C) of {_CHANNELS} channels; got {array.shape}{hint}"
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))


def _shown(image: Any) -> str:
    return str(image) if isinstance(image, str | os.PathLike) else type(image).__name__
