"""Whatever is an image without a doubt, paths, bytes, files, PIL images, arrays and tensors -> an RGB image."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import Reason, Refused, UsageError
from ..files import read_regular
from ..images.decode import MIN_SIDE, Exif, decode, refusal_of, to_rgb
from ..images.tiff import check_visible, scaled
from ..schema import shown

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
Made = TypeVar("Made")
_CHANNELS = (1, 3, 4)  # grey, RGB, RGB and alpha
_COLUMNS, _FIELDS = ("image", "img"), ("bytes", "path")  # of a row and of an image in `datasets`
_AHEAD = 4  # images per thread that are read before they are needed
_WANTED = (
    "give paths, encoded bytes, open files, PIL images, dictionaries with bytes, path or image, or arrays or tensors "
    "of (H, W) or (H, W, 1, 3 or 4), tensors also of (1, 3 or 4, H, W)"
)
_LEVELS = "numbers of 0 to 255 in uint8, of 0 to 65,535 in uint16, of 0 to 1 in floats, or booleans"


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
        iter(images)
    except Refused as refused:
        raise UsageError(f"images: {refused.detail}") from None
    except TypeError:  # not iterable, an array without axes
        raise UsageError(f"images: {_WANTED}; got {_shown(images)}") from None
    return cast("Iterable[Any]", images)


class Skipped(NamedTuple):
    """An image that cannot be read, and why."""

    place: int  # among the images given, from 0
    name: str  # its path, else its type
    reason: Reason
    detail: str  # a sentence for people

    def __str__(self) -> str:
        return f"image {self.place} ({self.name}): {self.detail} [{self.reason}]"


def each_made(
    images: Iterable[Any], work: Callable[[Image.Image], Made], threads: int
) -> Generator[Made | Skipped, None, None]:
    """Yield what `work` makes of each image in RGB, in the order given, or why the image cannot be read.

    Args:
        images: see `Encoder.embed`; of what is encoded, a few per thread are held at once, else one.
        work: must leave its image as it is.
        threads: number of threads that read paths and decode, 0 for none. What is pixels already is done here before
            the next image is asked for, which may be another state of the same object, as with the frames of a film.
    """
    if not threads:
        yield from (_made(image, place, _shown(image), work) for place, image in enumerate(images))
        return
    ahead = deque[Callable[[], Made | Skipped]]()
    pool = ThreadPoolExecutor(threads, "micl-zoo decoding")
    try:
        for place, image in enumerate(images):
            ahead.append(_begun(pool, image, place, work))
            if len(ahead) > _AHEAD * threads:
                yield ahead.popleft()()
        while ahead:
            yield ahead.popleft()()
    finally:
        pool.shutdown(cancel_futures=True)


def _begun(
    pool: ThreadPoolExecutor, image: Any, place: int, work: Callable[[Image.Image], Made]
) -> Callable[[], Made | Skipped]:
    name = _shown(image)
    held = _attempt(_held, image, place, name)
    if held is None or isinstance(held, Skipped):
        found = _made(image, place, name, work) if held is None else held
        return lambda: found
    return pool.submit(_made, held, place, name, work).result


def _held(image: Any) -> str | os.PathLike[str] | bytes | None:
    """Return what no later image changes: a path, or bytes, of a file too; None of pixels."""
    image = _of_dict(image)
    return image if isinstance(image, str | os.PathLike) else encoded(image)


def _made(image: Any, place: int, name: str, work: Callable[[Image.Image], Made]) -> Made | Skipped:
    return _attempt(lambda one: work(_rgb(one)), image, place, name)


def _attempt(function: Callable[[Any], Made], image: Any, place: int, name: str) -> Made | Skipped:
    try:
        return function(image)
    except Exception as error:  # images and files that others opened raise whatever damage makes them raise
        refused = error if isinstance(error, Refused) else refusal_of(error)
        if refused:
            return Skipped(place, name, refused.reason, refused.detail)
        reason: Reason = "unreadable" if isinstance(error, OSError) else "damaged"
        return Skipped(place, name, reason, str(error) or type(error).__name__)


def open_image(image: Any, place: int, exif: Exif = "upright") -> Image.Image:
    """Decode or convert whatever is an image to RGB; UsageError, which has its place, where that cannot be."""
    found = _attempt(lambda one: _rgb(one, exif), image, place, _shown(image))
    if isinstance(found, Skipped):
        raise UsageError(str(found))
    return found


def _rgb(image: Any, exif: Exif = "upright") -> Image.Image:
    found = _decoded(image)
    if min(found.size) < MIN_SIDE:
        raise Refused("too_small", f"{found.size}")
    return to_rgb(found, exif=exif)


def _decoded(image: Any) -> Image.Image:
    """Decode or convert whatever is an image without a doubt."""
    if (data := encoded(image)) is not None:
        return decode(data)
    image = _of_dict(image)
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        return _from_array(_channels_last(_on_host(image).numpy()))
    if isinstance(image, np.ma.MaskedArray):
        raise Refused(
            "unsupported", "a masked array has no pixels where it is masked: give array.filled(255), or another"
        )
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise Refused("unsupported", f"{_WANTED}; got {_shown(image)}")


def encoded(image: Any) -> bytes | None:
    """Return the bytes of an image that is encoded, be it in a file; None of one that is pixels already."""
    image = _of_dict(image)
    if isinstance(image, Bytes):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        path = os.fsdecode(image)
        if "://" in path and not Path(path).exists():
            raise Refused("unreadable", "an address is not fetched here: `extract` reads it, or give its bytes")
        if Path(path).is_dir():
            raise Refused("unreadable", "it is a folder: give its files; `extract` embeds all images of a folder")
        return read_regular(Path(path))
    return None if isinstance(image, Image.Image) or not hasattr(image, "read") else _read(image)


def _of_dict(image: Any) -> Any:
    """Take what the dictionaries of `datasets` hold: a row its image, an image its bytes, else the path of a file."""
    for key in (*_COLUMNS, *_FIELDS):
        if isinstance(image, dict) and image.get(key) is not None:
            image = image[key]
    if isinstance(image, dict):
        raise Refused("unsupported", f"{_WANTED}; got a dictionary of {shown(list(image))}")
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
    """Copy a tensor of pixels from wherever it is, in a type that NumPy has."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.is_quantized:
        kind = (
            "quantized"
            if tensor.is_quantized
            else "nested"
            if tensor.is_nested
            else "meta"
            if tensor.is_meta
            else str(tensor.layout)
        )
        raise Refused("unsupported", f"a tensor must be dense, with its pixels in memory; got a {kind} one")
    tensor = tensor.detach().cpu().resolve_neg().resolve_conj()
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Turn a tensor's (C, H, W), as torchvision makes it, into (H, W, C)."""
    if array.ndim != 3 or array.shape[0] not in _CHANNELS:
        return array
    if array.shape[2] in _CHANNELS:
        way_on = "give an array of (H, W, C): tensor.numpy(), or tensor.permute(1, 2, 0).numpy() where they are first"
        raise Refused("unsupported", f"a tensor of {array.shape} may have its channels first or last: {way_on}")
    return array.transpose(1, 2, 0)


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in _CHANNELS or not array.size:
        hint = ": move its first axis to the end" if array.ndim == 3 and array.shape[0] in _CHANNELS else ""
        raise Refused(
            "unsupported", f"an array must be (H, W), or (H, W, C) of {_CHANNELS} channels; got {array.shape}{hint}"
        )
    levels = _levels(array)
    return Image.fromarray(np.ascontiguousarray(levels[..., 0] if array.ndim == 3 and channels == 1 else levels))


def _levels(array: np.ndarray) -> np.ndarray:
    """Bring the numbers of an array to 0 to 255 in uint8, by what black and white are in its type."""
    kind = array.dtype.kind
    if kind == "b":
        return np.where(array, np.uint8(255), np.uint8(0))
    if kind == "u" and array.itemsize == 2:  # as a PNG of 16 bits is read
        check_visible(array, 16)
        return scaled(array, 16)
    if kind == "f":
        return _of_floats(array)
    if array.dtype != np.uint8:
        raise Refused("unsupported", f"numbers of {array.dtype} have no defined black and white: give {_LEVELS}")
    return array


def _of_floats(array: np.ndarray) -> np.ndarray:
    numbers = array.astype(np.float32) if array.itemsize < 4 else array  # in float16 255 times a number is no level
    least, most = numbers.min(), numbers.max()
    if not (least >= 0 and most <= 1):  # nor NaN
        found = "NaN" if np.isnan(least) else f"{least:.4g} to {most:.4g}"
        normalised = "what is normalised for the encoder already goes into encoder(pixel_values)"
        raise Refused(
            "unsupported",
            f"numbers of {array.dtype} must be 0, black, to 1, white; got {found}: scale them; {normalised}",
        )
    return np.rint(numbers * 255).astype(np.uint8)


def _shown(image: Any) -> str:
    return str(image) if isinstance(image, str | os.PathLike) else type(image).__name__
