"""The evaluation transform: resize, crop or pad, normalise. It comes from an encoder's record and nowhere else."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor

Filter = Literal["bicubic", "bilinear", "lanczos", "hamming", "box", "nearest"]  # of a resize: Pillow's, antialiased
Mode = Literal["center", "squash", "border"]  # timm's crop_mode

MAX_ASPECT = 8  # a longer strip is cut to its middle before it is resized: 2 x 50,000 pixels would become 3.7 GB
MAX_BETWEEN = 1 << 27  # pixels between the two passes of Pillow's resize, of 4 bytes


class Geometry(NamedTuple):
    """What a transform makes of a picture; all in (across, down)."""

    strip: tuple[int, int, int, int]  # left, top, right, bottom of what is resized
    resized: tuple[int, int]  # its size then
    start: tuple[int, int]  # of the crop in it; below 0 there is nothing, as behind its end


@dataclass(frozen=True)
class Transform:
    """Turns an upright RGB image into what the encoder sees, as timm's evaluation transform does.

    Attributes:
        size: (height, width) in pixels that the encoder takes.
        resize: (height, width) that the resize aims at, before `size` is cut out of the middle; timm's crop_pct is
            size / resize.
        mode: "center": both sides are at least `resize`, the aspect is kept; "squash": both are exactly that;
            "border": both are at most that, the aspect is kept, and what is missing is filled with the mean.
        interpolation: Pillow filter of the resize, antialiased.
        mean, std: RGB, for pixels in 0..1.

    Raises:
        UsageError: size or resize is no pair of whole numbers.
    """

    size: tuple[int, int] = (224, 224)
    resize: tuple[int, int] = (224, 224)
    mode: Mode = "center"
    interpolation: Filter = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name, pair in (("size", self.size), ("resize", self.resize)):
            if not (isinstance(pair, tuple) and [type(side) for side in pair] == [int, int]):
                way = "Transform.square(size, resize) makes one for squares"
                raise UsageError(f"{name} must be whole numbers (height, width), it is {pair!r}: {way}")

    @classmethod
    def square(cls, size: int, resize: int, interpolation: Filter = "bicubic", **others: Any) -> Transform:
        """Make one for squares of a side in pixels, whose resize aims at a square, too."""
        return cls((size, size), (resize, resize), interpolation=interpolation, **others)

    @property
    def is_plain(self) -> bool:
        """Whether it is a square cut from the centre: all that earlier versions had, under ids that stay."""
        return self.mode == "center" and all(pair[0] == pair[1] for pair in (self.size, self.resize))

    @property
    def id(self) -> str:
        """Name every choice: two stores with the same id saw the same pixels."""
        if self.is_plain:
            numbers = "-".join(f"{value:g}" for value in (*self.mean, *self.std))
            return f"pillow-{self.interpolation}-{self.resize[0]}-center{self.size[0]}-{numbers}"
        resize, size = ("x".join(map(str, pair)) for pair in (self.resize, self.size))  # height x width
        numbers = "-".join(str(float(value)) for value in (*self.mean, *self.std))
        return f"pillow-{self.interpolation}-{resize}-{self.mode}{size}-{numbers}"

    @property
    def fill(self) -> tuple[int, int, int]:
        """RGB of what is missing around a picture: the mean with mode "border", else black."""
        red, green, blue = (min(max(round(255 * value), 0), 255) for value in self.mean)
        return (red, green, blue) if self.mode == "border" else (0, 0, 0)

    def geometry(self, width: int, height: int) -> Geometry:
        """Say what is cut, resized and cut again of a picture of some pixels."""
        longest = MAX_ASPECT * min(width, height) if self.mode == "center" else max(width, height)
        kept, rows = min(width, longest), min(height, longest)
        left, top = (width - kept) // 2, (height - rows) // 2
        resized = self._resized(kept, rows)
        start = (_middle(resized[0], self.size[1]), _middle(resized[1], self.size[0]))
        return Geometry((left, top, left + kept, top + rows), resized, start)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Compute (width, height), of each at least 1, with the roundings of timm."""
        down, across = self.resize
        if self.mode == "squash":
            return across, down
        if self.mode == "center" and down == across:
            long = int(down * max(width, height) / min(width, height))
            return (down, long) if width <= height else (long, down)
        pick = max if self.mode == "border" else min
        ratio = pick(height / down, width / across)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize and crop an RGB image to (*size, 3) uint8."""
        import numpy as np
        from PIL import Image

        strip, resized, (left, top) = self.geometry(*image.size)
        if strip != (0, 0, *image.size):
            image = image.crop(strip)
        kernel = Image.Resampling[self.interpolation.upper()]
        if image.width < resized[0] and image.height * resized[0] > MAX_BETWEEN:
            image = image.resize((image.width, resized[1]), kernel)  # Pillow would widen it first, and each of its rows
        if image.size != resized:
            image = image.resize(resized, kernel)
        height, width = self.size
        if self.mode == "border" and (width > resized[0] or height > resized[1]):
            canvas = Image.new("RGB", (width, height), self.fill)
            canvas.paste(image, (-left, -top))
            return np.asarray(canvas)
        return np.asarray(image.crop((left, top, left + width, top + height)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise (B, *size, 3) uint8 on any device: (B, 3, *size) float32 there."""
        mean, std = (one[:, None, None] for one in statistics(self.mean, self.std, pixels.device))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into (3, *size) float32, normalised; for use in a data set of your own."""
        import torch

        return self.normalise(torch.from_numpy(self.pixels(image).copy())[None])[0]

    def at_size(self, size: tuple[int, int]) -> Transform:
        """Return the same for another (height, width), with as much of the resized picture in the crop."""
        return self.from_timm(self.to_timm() | {"input_size": (3, *size)})

    def to_dict(self) -> dict[str, Any]:
        """Return its fields as JSON holds them; of a plain one the sides alone, as earlier versions read them."""
        fields = dataclasses.asdict(self)
        if self.is_plain:
            del fields["mode"]
            fields |= {"size": self.size[0], "resize": self.resize[0]}
        return fields

    def to_timm(self) -> dict[str, Any]:
        """Return the same as the fields of a timm `pretrained_cfg`."""
        return {
            "input_size": [3, *self.size],
            "fixed_input_size": True,
            "interpolation": self.interpolation,
            "crop_pct": self._crop_pct(),
            "crop_mode": self.mode,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def _crop_pct(self) -> float:
        """Find the roundest share that leads to the resize: that of timm's table, of which the resize is a rounding."""
        most = min(side / aim for side, aim in zip(self.size, self.resize, strict=True))
        parts = (10**digits * half for digits in range(1, 16) for half in (1, 2))  # 0.1, 0.05, 0.01, 0.005 ...
        for share in (*(math.floor(most * one) / one for one in parts), most, math.nextafter(most, 0)):
            if share > 0 and _aims(self.size, share) == self.resize:
                return share
        raise UsageError(f"no crop_pct makes images of {self.size} from a resize to {self.resize}, as timm has one")

    @classmethod
    def from_timm(cls, config: dict[str, Any]) -> Transform:
        """Make one from the fields of a timm `pretrained_cfg`; what it leaves out has timm's default."""
        size = tuple(config.get("input_size", (3, 224, 224))[1:])
        resize = _aims(size, config.get("crop_pct", 0.875))
        mode, interpolation = config.get("crop_mode", "center"), config.get("interpolation", "bicubic")
        mean, std = tuple(config.get("mean", cls.mean)), tuple(config.get("std", cls.std))
        return cls(size, resize, mode, interpolation, mean, std)


def _aims(size: tuple[int, int], share: float) -> tuple[int, int]:
    """Compute what the resize aims at where the crop has a share of it."""
    return math.floor(size[0] / share), math.floor(size[1] / share)


def _middle(length: int, side: int) -> int:
    """Find where a side in the middle of a length starts, with the roundings of timm."""
    return round((length - side) / 2) if length >= side else -((side - length) // 2)


@functools.cache
def statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations on a device, kept there: sending them anew would wait for the device."""
    import torch

    with torch.inference_mode(False):  # what they first serve may be inference, what they serve later training
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)
