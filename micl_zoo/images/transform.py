"""The evaluation transform: resize, centre crop, normalise. It comes from an encoder's record and nowhere else."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor

Filter = Literal["bicubic", "bilinear"]  # of a resize, antialiased

MAX_ASPECT = 8  # a longer strip is cut to its middle before it is resized: 2 x 50,000 pixels would become 3.7 GB


@dataclass(frozen=True)
class Transform:
    """Turns an upright RGB image into what the encoder sees, as timm's evaluation transform does.

    Attributes:
        size: side in pixels of the square the encoder takes.
        resize: length the shorter side is resized to before the centre crop; timm's crop_pct is size / resize.
        interpolation: Pillow filter of the resize, antialiased.
        mean, std: RGB, for pixels in 0..1.
    """

    size: int = 224
    resize: int = 224
    interpolation: Filter = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def id(self) -> str:
        """Name every choice: two stores with the same id saw the same pixels."""
        numbers = "-".join(f"{value:g}" for value in (*self.mean, *self.std))
        return f"pillow-{self.interpolation}-{self.resize}-center{self.size}-{numbers}"

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize and crop an RGB image to (size, size, 3) uint8."""
        import numpy as np
        from PIL import Image

        image = _cut_strip(image)
        width, height = image.size
        short, long = self.resize, int(self.resize * max(width, height) / min(width, height))
        resized = (short, long) if width <= height else (long, short)
        if image.size != resized:
            image = image.resize(resized, Image.Resampling[self.interpolation.upper()])
        left, top = (round((side - self.size) / 2) for side in resized)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise (B, size, size, 3) uint8 on any device: (B, 3, size, size) float32 there."""
        mean, std = (one[:, None, None] for one in statistics(self.mean, self.std, pixels.device))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into (3, size, size) float32, normalised; for use in a data set of your own."""
        import torch

        return self.normalise(torch.from_numpy(self.pixels(image).copy())[None])[0]

    def to_timm(self) -> dict[str, Any]:
        """Return the same as the fields of a timm `pretrained_cfg`."""
        return {
            "input_size": [3, self.size, self.size],
            "fixed_input_size": True,
            "interpolation": self.interpolation,
            "crop_pct": self.size / self.resize,
            "crop_mode": "center",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_timm(cls, config: dict[str, Any]) -> Transform:
        """Make one from the fields of a timm `pretrained_cfg`; what it leaves out has timm's default."""
        size = config.get("input_size", [3, 224, 224])[-1]
        resize = int(size / config.get("crop_pct", 0.875))
        mean, std = tuple(config.get("mean", cls.mean)), tuple(config.get("std", cls.std))
        return cls(size, resize, config.get("interpolation", "bicubic"), mean, std)


@functools.cache
def statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations on a device, kept there: sending them anew would wait for the device."""
    import torch

    with torch.inference_mode(False):  # what they first serve may be inference, what they serve later training
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def resized_part(length: int, short: int) -> tuple[int, int]:
    """Find the part of a side, beside a shorter one, that is resized: its start and its length."""
    kept = min(length, MAX_ASPECT * short)
    return (length - kept) // 2, kept


def _cut_strip(image: Image.Image) -> Image.Image:
    (left, width), (top, height) = (resized_part(side, min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return image
    return image.crop((left, top, left + width, top + height))
